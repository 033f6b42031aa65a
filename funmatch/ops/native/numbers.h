// Numbers in memory, float32 or bfloat16, alone and as vectors of 16 that are computed in float32.

#pragma once

#include <cstdint>
#include <cstring>

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

inline void store(bfloat16* to, const Floats& value) {
    Words bits;
    std::memcpy(&bits, &value, sizeof bits);
    const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Words is_number = reinterpret_cast<Words>(value == value);
    const Halves halves = __builtin_convertvector((rounded & is_number) | (0x7fc0u & ~is_number), Halves);
    std::memcpy(to, &halves, sizeof halves);
}

}  // namespace
