// Computes GroupNorm and weight standardization on the CPU, in as few passes over memory as possible.
//
// Activations lie in memory with their channels last, so inner loops run over neighbouring values, with a sum for each
// channel: compilers turn these loops into the widest vector instructions there are. Each image (or filter) is summed by
// a single thread in a fixed order, so results do not depend on the number of threads.
//
// `__restrict` is needed for the vectors: without it a compiler must assume that a write changes what is read next.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "numbers.h"
#include "sums.h"

namespace {

// Shape of a batch (images, pixels, channels). `library.NormShape` must have the same fields in the same order.
struct Shape {
    int64_t images, pixels, channels, groups;
    int relu, threads;
    int64_t width() const { return channels / groups; }
    double count() const { return static_cast<double>(width()) * static_cast<double>(pixels); }
};

// The line that normalizes a channel. Forward and backward both compute it here: with another rounding they could
// disagree on where the ReLU cuts off.
inline float scale_of(float inverse, float weight) { return inverse * weight; }
inline float shift_of(float bias, float mean, float scale) { return bias - mean * scale; }

// y = x · scale + shift, cut off below 0 if there is a ReLU. Two passes over x: one for the sums, one for the result.
// Writes the mean and 1 / deviation of each group, (images, groups), for the backward pass.
template <typename T>
void group_norm(const T* x, T* y, float* mean, float* inverse, const float* weight, const float* bias, Shape shape,
                double eps) {
    const int64_t channels = shape.channels, pixels = shape.pixels, width = shape.width();
#pragma omp parallel num_threads(shape.threads)
    {
        std::vector<float> memory(5 * channels);
        std::vector<double> totals(2 * channels);
        double* __restrict sums = totals.data();
        double* __restrict squares = sums + channels;
        float* __restrict first = memory.data();
        float* __restrict block = first + channels;
        float* __restrict scale = block + 2 * channels;
        float* __restrict shift = scale + channels;
#pragma omp for schedule(static)
        for (int64_t image = 0; image < shape.images; ++image) {
            const T* from = x + image * pixels * channels;
            T* into = y + image * pixels * channels;
            // Sums of differences from each channel's first value: for values far from 0, the mean of the squares less the
            // square of the mean would lose the deviation.
            for (int64_t c = 0; c < channels; ++c) first[c] = read(from + c);
            sum_image(sums, block, pixels, channels,
                      [&](int64_t pixel, float* __restrict sum, float* __restrict square) {
                          const T* __restrict row = from + pixel * channels;
#pragma omp simd
                          for (int64_t c = 0; c < channels; ++c) {
                              const float value = read(row + c) - first[c];
                              sum[c] += value;
                              square[c] += value * value;
                          }
                      });
            for (int64_t g = 0; g < shape.groups; ++g) {
                double total = 0, deviation = 0;
                for (int64_t c = g * width; c < (g + 1) * width; ++c) total += sums[c] + pixels * static_cast<double>(first[c]);
                const double centre = total / shape.count();
                // From the channel's first value to the group's mean: Σ (v + o)² = Σ v² + o · (2 Σ v + n · o).
                for (int64_t c = g * width; c < (g + 1) * width; ++c) {
                    const double offset = first[c] - centre;
                    deviation += squares[c] + offset * (2.0 * sums[c] + pixels * offset);
                }
                // Rounding may leave a constant group slightly below 0; `* 0` instead of 0 lets NaN through.
                const double inverse_std = 1 / std::sqrt((deviation > 0 ? deviation : deviation * 0) / shape.count() + eps);
                // Rounded before they are used, since the backward pass reads the rounded ones.
                const float group_mean = mean[image * shape.groups + g] = static_cast<float>(centre);
                const float group_inverse = inverse[image * shape.groups + g] = static_cast<float>(inverse_std);
                for (int64_t c = g * width; c < (g + 1) * width; ++c) {
                    scale[c] = scale_of(group_inverse, weight[c]);
                    shift[c] = shift_of(bias[c], group_mean, scale[c]);
                }
            }
            for (int64_t pixel = 0; pixel < pixels; ++pixel) {
                const T* __restrict row = from + pixel * channels;
                T* __restrict to = into + pixel * channels;
                const bool relu = shape.relu;
#pragma omp simd
                for (int64_t c = 0; c < channels; ++c) {
                    const float value = read(row + c) * scale[c] + shift[c];
                    write(to + c, relu && value < 0 ? 0.0f : value);
                }
            }
        }
    }
}

// With d = dy where the ReLU let it through, z = (x − mean) / deviation, and means over a group:
//
//     dx = (weight · d − mean(weight · d) − z · mean(weight · d · z)) / deviation.
//
// Writes each image's share of the gradients of weight and bias, (images, channels): a sum over images in here would
// depend on which thread comes first.
template <typename T>
void group_norm_backward(const T* dy, const T* x, T* dx, float* dweight, float* dbias, const float* mean,
                         const float* inverse, const float* weight, const float* bias, Shape shape) {
    const int64_t channels = shape.channels, pixels = shape.pixels, width = shape.width();
#pragma omp parallel num_threads(shape.threads)
    {
        std::vector<float> memory(7 * channels);
        std::vector<double> totals(2 * channels);
        double* __restrict d_sums = totals.data();
        double* __restrict dz_sums = d_sums + channels;
        float* __restrict scale = memory.data();
        float* __restrict shift = scale + channels;
        float* __restrict centre = shift + channels;
        float* __restrict x_factor = centre + channels;
        float* __restrict constant = x_factor + channels;
        float* __restrict block = constant + channels;
#pragma omp for schedule(static)
        for (int64_t image = 0; image < shape.images; ++image) {
            const T* from = x + image * pixels * channels;
            const T* given = dy + image * pixels * channels;
            T* into = dx + image * pixels * channels;
            float* __restrict dw = dweight + image * channels;
            float* __restrict db = dbias + image * channels;
            const bool relu = shape.relu;
            for (int64_t c = 0; c < channels; ++c) {
                const int64_t g = image * shape.groups + c / width;
                centre[c] = mean[g];
                scale[c] = scale_of(inverse[g], weight[c]);
                shift[c] = shift_of(bias[c], mean[g], scale[c]);
            }
            // The ReLU's mask is computed anew from x instead of being kept: memory costs more than the arithmetic.
            sum_image(d_sums, block, pixels, channels,
                      [&](int64_t pixel, float* __restrict d_sum, float* __restrict dz_sum) {
                          const T* __restrict row = from + pixel * channels;
                          const T* __restrict given_row = given + pixel * channels;
#pragma omp simd
                          for (int64_t c = 0; c < channels; ++c) {
                              const float value = read(row + c);
                              const float d = relu && value * scale[c] + shift[c] <= 0 ? 0.0f : read(given_row + c);
                              d_sum[c] += d;
                              dz_sum[c] += d * (value - centre[c]);
                          }
                      });
            for (int64_t g = 0; g < shape.groups; ++g) {
                const double inverse_std = inverse[image * shape.groups + g], group_mean = mean[image * shape.groups + g];
                double weighted_d = 0, weighted_dz = 0;
                for (int64_t c = g * width; c < (g + 1) * width; ++c) {
                    dz_sums[c] *= inverse_std;
                    dw[c] = static_cast<float>(dz_sums[c]);
                    db[c] = static_cast<float>(d_sums[c]);
                    weighted_d += weight[c] * d_sums[c];
                    weighted_dz += weight[c] * dz_sums[c];
                }
                // dx as a line in d and x, so that the second pass is one expression.
                const double slope = -inverse_std * inverse_std * weighted_dz / shape.count();
                const double offset = -inverse_std * weighted_d / shape.count() - slope * group_mean;
                for (int64_t c = g * width; c < (g + 1) * width; ++c) {
                    x_factor[c] = static_cast<float>(slope);
                    constant[c] = static_cast<float>(offset);
                }
            }
            for (int64_t pixel = 0; pixel < pixels; ++pixel) {
                const T* __restrict row = from + pixel * channels;
                const T* __restrict given_row = given + pixel * channels;
                T* __restrict to = into + pixel * channels;
#pragma omp simd
                for (int64_t c = 0; c < channels; ++c) {
                    const float value = read(row + c);
                    const float d = relu && value * scale[c] + shift[c] <= 0 ? 0.0f : read(given_row + c);
                    write(to + c, d * scale[c] + value * x_factor[c] + constant[c]);
                }
            }
        }
    }
}

// Gives each filter mean 0 and deviation 1, in the precision in which it will be multiplied. Filters are short (4,608
// values for 3 × 3 × 512), so float32 sums in vectors suffice.
template <typename T>
void standardize(const float* w, T* y, float* mean, float* inverse, int64_t filters, int64_t length, double eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t f = 0; f < filters; ++f) {
        const float* __restrict own = w + f * length;
        T* __restrict to = y + f * length;
        float sum = 0, square = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < length; ++i) sum += own[i];
        const float centre = sum / static_cast<float>(length);
#pragma omp simd reduction(+ : square)
        for (int64_t i = 0; i < length; ++i) square += (own[i] - centre) * (own[i] - centre);
        // eps is 1e-10 for BiT, which float32 would not add to most variances.
        const float inverse_std = static_cast<float>(1 / std::sqrt(square / static_cast<double>(length) + eps));
        mean[f] = centre;
        inverse[f] = inverse_std;
#pragma omp simd
        for (int64_t i = 0; i < length; ++i) write(to + i, (own[i] - centre) * inverse_std);
    }
}

// dw = (d − mean(d) − z · mean(d · z)) / deviation, with z the standardized filter and means over a filter.
template <typename T>
void standardize_backward(const T* dy, const float* w, float* dw, const float* mean, const float* inverse, int64_t filters,
                          int64_t length, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t f = 0; f < filters; ++f) {
        const T* __restrict d = dy + f * length;
        const float* __restrict own = w + f * length;
        float* __restrict to = dw + f * length;
        const float centre = mean[f], inverse_std = inverse[f];
        float d_mean = 0, dz_mean = 0;
#pragma omp simd reduction(+ : d_mean, dz_mean)
        for (int64_t i = 0; i < length; ++i) {
            d_mean += read(d + i);
            dz_mean += read(d + i) * (own[i] - centre) * inverse_std;
        }
        d_mean /= static_cast<float>(length);
        dz_mean /= static_cast<float>(length);
#pragma omp simd
        for (int64_t i = 0; i < length; ++i) to[i] = inverse_std * (read(d + i) - d_mean - (own[i] - centre) * inverse_std * dz_mean);
    }
}

}  // namespace

// One entry point for each dtype, in C so that ctypes finds it by name; `library.SIGNATURES` lists the arguments.
#define KERNELS(T, NAME)                                                                                                   \
    void group_norm_##NAME(const void* x, void* y, float* mean, float* inverse, const float* weight, const float* bias,    \
                           const Shape* shape, double eps) {                                                               \
        group_norm(static_cast<const T*>(x), static_cast<T*>(y), mean, inverse, weight, bias, *shape, eps);                \
    }                                                                                                                      \
    void group_norm_backward_##NAME(const void* dy, const void* x, void* dx, float* dweight, float* dbias,                 \
                                    const float* mean, const float* inverse, const float* weight, const float* bias,       \
                                    const Shape* shape) {                                                                  \
        group_norm_backward(static_cast<const T*>(dy), static_cast<const T*>(x), static_cast<T*>(dx), dweight, dbias,      \
                            mean, inverse, weight, bias, *shape);                                                          \
    }                                                                                                                      \
    void standardize_##NAME(const float* w, void* y, float* mean, float* inverse, int64_t filters, int64_t length,         \
                            double eps, int threads) {                                                                     \
        standardize(w, static_cast<T*>(y), mean, inverse, filters, length, eps, threads);                                  \
    }                                                                                                                      \
    void standardize_backward_##NAME(const void* dy, const float* w, float* dw, const float* mean, const float* inverse,   \
                                     int64_t filters, int64_t length, int threads) {                                       \
        standardize_backward(static_cast<const T*>(dy), w, dw, mean, inverse, filters, length, threads);                   \
    }

extern "C" {
KERNELS(float, float32)
KERNELS(bfloat16, bfloat16)
}
