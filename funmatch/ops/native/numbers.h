// Numbers in memory, float32 or bfloat16, alone and as vectors of 16 that are computed in float32.

#pragma once

#include <cstdint>
#include <cstring>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

struct bfloat16 {
    uint16_t bits;
};

inline float read(const float* from) { return *from; }

inline float read(const bfloat16* from) {
    const uint32_t bits = static_cast<uint32_t>(from->bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline void write(float* to, float value) { *to = value; }

// Rounds to nearest, ties to even, as torch does. NaN is set apart, since rounding could carry its bits over
// into another number.
inline void write(bfloat16* to, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    to->bits = value != value ? 0x7fc0u : static_cast<uint16_t>(rounded);
}

// Extensions of GCC and Clang, which they map to the widest registers that the processor has.
constexpr int64_t LANES = 16;
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

inline void load(Floats& value, const float* from) { std::memcpy(&value, from, sizeof value); }

inline void load(Floats& value, const bfloat16* from) {
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    const Words bits = __builtin_convertvector(halves, Words) << 16;
    std::memcpy(&value, &bits, sizeof value);
}

inline void store(float* to, const Floats& value) { std::memcpy(to, &value, sizeof value); }

// As `write` rounds. The processor's own instruction, where it has one, differs in numbers below 1.2e-38 alone, which
// become 0.
inline void store(bfloat16* to, const Floats& value) {
#ifdef __AVX512BF16__
    const __m256bh halves = _mm512_cvtneps_pbh((__m512)value);
    std::memcpy(to, &halves, sizeof halves);
#else
    Words bits;
    std::memcpy(&bits, &value, sizeof bits);
    const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Words is_number = reinterpret_cast<Words>(value == value);
    const Halves halves = __builtin_convertvector((rounded & is_number) | (0x7fc0u & ~is_number), Halves);
    std::memcpy(to, &halves, sizeof halves);
#endif
}

// The same names for a number alone, so that one piece of code computes vectors and what is left of a row.
template <typename T>
inline void load(float& value, const T* from) {
    value = read(from);
}

template <typename T>
inline void store(T* to, const float& value) {
    write(to, value);
}

// Calls `body(i, kind)` for each vector of a row, and for each number that is left; `kind` is of the type to compute with.
template <typename Body>
inline void over_row(int64_t count, Body body) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) body(i, Floats{});
    for (; i < count; ++i) body(i, 0.0f);
}

template <typename F, typename T>
inline F loaded(const T* from) {
    F value;
    load(value, from);
    return value;
}

// A sum over a row.
struct RowSum {
    Floats lanes = {};
    float rest = 0;
    void add(const Floats& value) { lanes += value; }
    void add(float value) { rest += value; }
    float total() const {
        float all = rest;
        for (int64_t i = 0; i < LANES; ++i) all += lanes[i];
        return all;
    }
};

}  // namespace
