// The exponential function, of a number or a vector.

#pragma once

#include <cstdint>
#include <cstring>

#include "numbers.h"

namespace {

inline int32_t whole(float n) { return static_cast<int32_t>(n); }
inline Integers whole(const Floats& n) { return __builtin_convertvector(n, Integers); }

// e^x within some 1e-7 of it, in steps that compilers turn into vectors: 2^n · e^r with |r| ≤ ln 2 / 2, e^r by Taylor.
template <typename F>
inline F exponential(F x) {
    x = x < -87.0f ? F{} - 87.0f : x > 87.0f ? F{} + 87.0f : x;
    const F shifted = x * 1.44269504f + 12582912.0f;  // 1.5 · 2²³: what is left of the fraction is rounded away
    const F n = shifted - 12582912.0f;
    const F r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    F power = 1.0f + r * (1.0f + r * (0.5f + r * (1.66666667e-1f + r * (4.16666667e-2f + r * (8.3333333e-3f + r * 1.3888889e-3f)))));
    decltype(whole(n)) bits;
    std::memcpy(&bits, &power, sizeof bits);
    bits += whole(n) * (1 << 23);
    std::memcpy(&power, &bits, sizeof power);
    return power;
}

}  // namespace
