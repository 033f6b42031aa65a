// The exponential function, as code that compilers turn into vectors.

#pragma once

#include <cstdint>
#include <cstring>

namespace {

// e^x within some 1e-7 of it, in steps that compilers turn into vectors: 2^n · e^r with |r| ≤ ln 2 / 2, e^r by Taylor.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 87.0f ? 87.0f : x;
    const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 · 2²³: what is left of the fraction is rounded away
    const float n = shifted - 12582912.0f;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float power = 1.0f + r * (1.0f + r * (0.5f + r * (1.66666667e-1f + r * (4.16666667e-2f + r * (8.3333333e-3f + r * 1.3888889e-3f)))));
    int32_t bits;
    std::memcpy(&bits, &power, sizeof bits);
    bits += static_cast<int32_t>(n) * (1 << 23);
    std::memcpy(&power, &bits, sizeof power);
    return power;
}

}  // namespace
