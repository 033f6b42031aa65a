// Turns the coefficients of JPEGs into pixels: the arithmetic of libjpeg's defaults (its accurate integer transform, its
// smooth upsampling), to the last bit.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace jpeg {
namespace {

// Blocks that are transformed at once: as many as fit side by side in the processor's vectors.
#if defined(__AVX512F__)
constexpr int BLOCKS = 2;
#define FUNMATCH_LOW 0, 16, 1, 17, 2, 18, 3, 19, 8, 24, 9, 25, 10, 26, 11, 27
#define FUNMATCH_HIGH 4, 20, 5, 21, 6, 22, 7, 23, 12, 28, 13, 29, 14, 30, 15, 31
#else
constexpr int BLOCKS = 1;
#define FUNMATCH_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define FUNMATCH_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#endif

// A row of each block. Unsigned, since sums of damaged files' numbers may overflow.
typedef uint32_t Lanes __attribute__((vector_size(32 * BLOCKS)));
typedef int32_t SignedLanes __attribute__((vector_size(32 * BLOCKS)));
typedef uint8_t ByteLanes __attribute__((vector_size(8 * BLOCKS)));

// Takes numbers of two rows in turns: of the first halves of the blocks' rows, or of the second ones.
#if defined(__clang__)
#define FUNMATCH_MIX(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FUNMATCH_MIX(a, b, ...) __builtin_shuffle(a, b, Lanes{__VA_ARGS__})
#endif

// Exchanges rows and columns of each block.
inline void transpose(Lanes* rows) {
#if !defined(__AVX2__)
    // Compilers take shuffles of such vectors to pieces where the processor has none.
    uint32_t from[64], to[64];
    std::memcpy(from, rows, sizeof from);
    for (int i = 0; i < 64; ++i) to[i] = from[i % 8 * 8 + i / 8];
    std::memcpy(rows, to, sizeof to);
#else
    // Three times, numbers that are farther apart become neighbours.
    Lanes mixed[8];
    for (int times = 0; times < 3; ++times) {
        for (int i = 0; i < 4; ++i) {
            mixed[2 * i] = FUNMATCH_MIX(rows[i], rows[i + 4], FUNMATCH_LOW);
            mixed[2 * i + 1] = FUNMATCH_MIX(rows[i], rows[i + 4], FUNMATCH_HIGH);
        }
        std::copy_n(mixed, 8, rows);
    }
#endif
}

// The part of numbers that lies outside of -bound … bound - 1, for a power of two.
inline Lanes beyond(Lanes x, uint32_t bound) { return (x + bound) & ~(2 * bound - 1); }

// One dimension of the inverse cosine transform of Loeffler, Ligtenberg and Moschytz, with constants of 13 binary digits,
// of eight columns at once; the result is divided by 2^SHIFT and rounded.
template <int SHIFT>
inline void transform(Lanes* x) {
    const Lanes turn = (x[2] + x[6]) * 4433u, low = turn - x[6] * 15137u, high = turn + x[2] * 6270u;
    const Lanes sum = (x[0] + x[4]) << 13, difference = (x[0] - x[4]) << 13;
    const Lanes even[4] = {sum + high, difference + low, difference - low, sum - high};
    const Lanes all = (x[7] + x[3] + x[5] + x[1]) * 9633u;
    const Lanes a = all - (x[7] + x[3]) * 16069u, b = all - (x[5] + x[1]) * 3196u;
    const Lanes c = (x[7] + x[1]) * 7373u, d = (x[5] + x[3]) * 20995u;
    const Lanes odd[4] = {x[1] * 12299u - c + b, x[3] * 25172u - d + a, x[5] * 16819u - d + b, x[7] * 2446u - c + a};
    for (int i = 0; i < 4; ++i) {
        const Lanes half = Lanes{} + (1u << (SHIFT - 1));
        x[i] = (Lanes)((SignedLanes)(even[i] + odd[i] + half) >> SHIFT);
        x[7 - i] = (Lanes)((SignedLanes)(even[i] - odd[i] + half) >> SHIFT);
    }
}

// Blocks whose coefficients are read, until there are enough to transform.
struct Pending {
    // Row by row, of all blocks side by side; then numbers that are never used.
    int32_t coefficients[64 * BLOCKS + 8 * BLOCKS] = {};
    uint8_t* to[BLOCKS] = {};
    int64_t row_bytes[BLOCKS] = {};
    int count = 0;

    // Writes the 8 × 8 bytes of each block. Returns whether they are those of every build of libjpeg: numbers that only
    // damaged files have overflow here and there in the 16 bits that vector instructions take.
    bool write() {
        Lanes x[8], wild{};
        std::memcpy(x, coefficients, sizeof x);
        std::memset(coefficients, 0, sizeof coefficients);
        for (const Lanes& row : x) wild |= beyond(row, 1 << 14);
        transform<11>(x);
        for (const Lanes& row : x) wild |= beyond(row, 1 << 14);
        transpose(x);
        transform<18>(x);
        for (const Lanes& row : x) wild |= beyond(row, 1 << 9);
        transpose(x);
        for (int i = 0; i < 8; ++i) {
            SignedLanes row = (SignedLanes)x[i] + 128;
            row = row < 0 ? SignedLanes{} : row;
            row = row > 255 ? SignedLanes{} + 255 : row;
            const ByteLanes bytes = __builtin_convertvector(row, ByteLanes);
            for (int j = 0; j < count; ++j) std::memcpy(to[j] + i * row_bytes[j], reinterpret_cast<const uint8_t*>(&bytes) + 8 * j, 8);
        }
        count = 0;
        uint32_t any = 0;
        for (int i = 0; i < 8 * BLOCKS; ++i) any |= wild[i];
        return !any;
    }
};

// Writes a block of one coefficient, whose bytes are all equal. Returns the same as `Pending::write`.
inline bool write_flat_block(int32_t coefficient, uint8_t* to, int64_t row_bytes) {
    const int32_t level = (4 * coefficient + 16) >> 5;
    for (int i = 0; i < 8; ++i) std::memset(to + i * row_bytes, std::min(std::max(level + 128, 0), 255), 8);
    return level >= -512 && level < 512;
}

// Doubles a row of samples: each new one is three quarters of the nearer, a quarter of the farther one. `sums` holds the
// samples, or their weighted sums of two rows, one more on either side.
inline void widen(const uint16_t* __restrict sums, int64_t count, bool two_rows, uint8_t* __restrict to) {
    // Rounding alternates, so that errors do not add up.
    const int left = two_rows ? 8 : 1, right = two_rows ? 7 : 2, shift = two_rows ? 4 : 2;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
        to[2 * i] = static_cast<uint8_t>((3 * sums[i + 1] + sums[i] + left) >> shift);
        to[2 * i + 1] = static_cast<uint8_t>((3 * sums[i + 1] + sums[i + 2] + right) >> shift);
    }
}

inline uint8_t as_byte(int32_t value) { return static_cast<uint8_t>(std::min(std::max(value, 0), 255)); }

// Converts a row of brightness and two differences of colour to red, green and blue.
inline void write_colours(const uint8_t* __restrict y, const uint8_t* __restrict blue, const uint8_t* __restrict red, int64_t count,
                          uint8_t* __restrict to) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
        const int32_t cb = blue[i] - 128, cr = red[i] - 128;
        to[3 * i] = as_byte(y[i] + ((91881 * cr + 32768) >> 16));
        to[3 * i + 1] = as_byte(y[i] + ((-22554 * cb - 46802 * cr + 32768) >> 16));
        to[3 * i + 2] = as_byte(y[i] + ((116130 * cb + 32768) >> 16));
    }
}

inline void write_grey(const uint8_t* __restrict y, int64_t count, uint8_t* __restrict to) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) to[3 * i] = to[3 * i + 1] = to[3 * i + 2] = y[i];
}

}  // namespace
}  // namespace jpeg
