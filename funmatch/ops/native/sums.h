// Sums over the pixels of images whose channels lie last in memory.

#pragma once

#include <cstdint>

namespace {

// Pixels that are summed in float32, which makes full vectors; the sums of blocks are summed in float64. Float32 alone
// would lose digits over the 57,600 pixels of an image of 240 × 240.
constexpr int64_t BLOCK = 128;

// Adds up what `add(pixel, first, second)` adds for each pixel of an image; writes two sums a channel.
template <typename Add>
void sum_image(double* __restrict totals, float* __restrict sums, int64_t pixels, int64_t channels, Add add) {
    for (int64_t c = 0; c < 2 * channels; ++c) totals[c] = sums[c] = 0;
    for (int64_t pixel = 0; pixel < pixels; ++pixel) {
        add(pixel, sums, sums + channels);
        if (pixel % BLOCK != BLOCK - 1 && pixel != pixels - 1) continue;
#pragma omp simd
        for (int64_t c = 0; c < 2 * channels; ++c) {
            totals[c] += sums[c];
            sums[c] = 0;
        }
    }
}

// Two sums of a channel.
struct Sums {
    double first, second;
};

// Adds the sums that `sum_image` wrote for each image, in the images' order.
inline Sums over_images(const double* totals, int64_t images, int64_t channels, int64_t c) {
    Sums all = {0, 0};
    for (int64_t image = 0; image < images; ++image) {
        all.first += totals[2 * channels * image + c];
        all.second += totals[2 * channels * image + channels + c];
    }
    return all;
}

}  // namespace
