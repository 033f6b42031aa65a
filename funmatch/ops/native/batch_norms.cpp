// Computes BatchNorm with the activation behind it on the CPU in training mode, in as few passes over memory as possible.
//
// The layout is that of `norms.cpp`: channels last, inner loops over channels. Each image is summed by a single thread, and
// the images' sums are added in their order, so results do not depend on the number of threads. Both directions are two
// functions, sums and then numbers, so that processes can add their sums in between.

#include <cmath>
#include <cstdint>
#include <vector>

#include "exponential.h"
#include "numbers.h"
#include "sums.h"

namespace {

// `library.BatchShape` must have the same fields in the same order.
struct Shape {
    int64_t images, pixels, channels;
    // Numbers of a channel in all processes.
    int64_t count;
    double eps, momentum;
    int activation, threads;
};

// The activations, in the order of `batch_norms.ACTIVATIONS`, and their derivatives as torch takes them.
enum { NONE, RELU, RELU6, HARDSWISH, SILU };

template <int ACTIVATION, typename F>
inline F activate(F x) {
    if (ACTIVATION == RELU) return x > 0 ? x : x * 0.0f;  // `x * 0` instead of 0 lets NaN through
    if (ACTIVATION == RELU6) return x > 0 ? (x < 6 ? x : 6 + (x - x)) : x * 0.0f;
    if (ACTIVATION == HARDSWISH) return x > -3 ? (x < 3 ? x * (x + 3) * (1.0f / 6) : x) : x * 0.0f;
    if (ACTIVATION == SILU) return x / (1 + exponential(-x));
    return x;
}

template <int ACTIVATION, typename F>
inline F slope(F x) {
    const F zero = {}, one = zero + 1;
    if (ACTIVATION == RELU) return x > 0 ? one : zero;
    if (ACTIVATION == RELU6) return x > 0 ? (x < 6 ? one : zero) : zero;
    if (ACTIVATION == HARDSWISH) return x > -3 ? (x < 3 ? x * (1.0f / 3) + 0.5f : one) : zero;
    if (ACTIVATION == SILU) {
        const F sigmoid = 1 / (1 + exponential(-x));
        return sigmoid * (1 + x * (1 - sigmoid));
    }
    return one;
}

// Writes the mean and the variance of each channel over all images to two lines of `statistics`.
template <typename T>
void batch_statistics(const T* x, double* statistics, const Shape& shape) {
    const int64_t channels = shape.channels, pixels = shape.pixels, images = shape.images;
    const double count = static_cast<double>(images) * static_cast<double>(pixels);
    // Differences from the first image's first pixel: for values far from 0, the mean of the squares less the square of
    // the mean would lose the deviation.
    std::vector<float> first(channels);
    std::vector<double> totals(2 * channels * images);
    for (int64_t c = 0; c < channels; ++c) first[c] = read(x + c);
#pragma omp parallel num_threads(shape.threads)
    {
        std::vector<float> sums(2 * channels);
#pragma omp for schedule(static)
        for (int64_t image = 0; image < images; ++image) {
            const T* from = x + image * pixels * channels;
            sum_image(&totals[2 * channels * image], sums.data(), pixels, channels,
                      [&](int64_t pixel, float* sum, float* square) {
                          const T* row = from + pixel * channels;
                          over_row(channels, [&](int64_t c, auto kind) {
                              using F = decltype(kind);
                              const F value = loaded<F>(row + c) - loaded<F>(first.data() + c);
                              store(sum + c, loaded<F>(sum + c) + value);
                              store(square + c, loaded<F>(square + c) + value * value);
                          });
                      });
        }
#pragma omp for schedule(static)
        for (int64_t c = 0; c < channels; ++c) {
            const Sums all = over_images(totals.data(), images, channels, c);
            const double offset = all.first / count, deviation = all.second / count - offset * offset;
            statistics[c] = first[c] + offset;
            // Rounding may leave a constant channel slightly below 0; `* 0` instead of 0 lets NaN through.
            statistics[channels + c] = deviation > 0 ? deviation : deviation * 0;
        }
    }
}

// The line that a channel's numbers are mapped to before the activation.
struct Lines {
    std::vector<float> scale, shift;
    Lines(const float* mean, const float* inverse, const float* weight, const float* bias, int64_t channels)
        : scale(channels), shift(channels) {
        for (int64_t c = 0; c < channels; ++c) {
            scale[c] = inverse[c] * weight[c];
            shift[c] = bias[c] - mean[c] * scale[c];
        }
    }
};

// y = activation((x − mean) / deviation · weight + bias). Writes the mean and the inverse deviation for the backward pass,
// and moves the running statistics as torch does, unless there are none.
template <int ACTIVATION, typename T>
void batch_norm(const T* x, T* y, const double* statistics, float* mean, float* inverse, float* running_mean,
                float* running_var, const float* weight, const float* bias, const Shape& shape) {
    const int64_t channels = shape.channels;
    const double count = static_cast<double>(shape.count);
    for (int64_t c = 0; c < channels; ++c) {
        const double variance = statistics[channels + c];
        mean[c] = static_cast<float>(statistics[c]);
        inverse[c] = static_cast<float>(1 / std::sqrt(variance + shape.eps));
        if (!running_mean) continue;
        running_mean[c] += static_cast<float>(shape.momentum * (statistics[c] - running_mean[c]));
        running_var[c] += static_cast<float>(shape.momentum * (variance * count / (count - 1) - running_var[c]));
    }
    const Lines lines(mean, inverse, weight, bias, channels);
    const float *scale = lines.scale.data(), *shift = lines.shift.data();
#pragma omp parallel for schedule(static) num_threads(shape.threads)
    for (int64_t pixel = 0; pixel < shape.images * shape.pixels; ++pixel) {
        const T* row = x + pixel * channels;
        T* to = y + pixel * channels;
        over_row(channels, [&](int64_t c, auto kind) {
            using F = decltype(kind);
            store(to + c, activate<ACTIVATION>(loaded<F>(row + c) * loaded<F>(scale + c) + loaded<F>(shift + c)));
        });
    }
}

// With d = dy · activation′ and z = (x − mean) / deviation, writes the sums of d and d · z of each channel over all images
// to two lines of `sums`: the gradients of bias and weight.
template <int ACTIVATION, typename T>
void batch_norm_sums(const T* dy, const T* x, double* sums, const float* mean, const float* inverse, const float* weight,
                     const float* bias, const Shape& shape) {
    const int64_t channels = shape.channels, pixels = shape.pixels, images = shape.images;
    std::vector<double> totals(2 * channels * images);
    const Lines lines(mean, inverse, weight, bias, channels);
    const float *scale = lines.scale.data(), *shift = lines.shift.data();
#pragma omp parallel num_threads(shape.threads)
    {
        std::vector<float> partial(2 * channels);
#pragma omp for schedule(static)
        for (int64_t image = 0; image < images; ++image) {
            const T* from = x + image * pixels * channels;
            const T* given = dy + image * pixels * channels;
            sum_image(&totals[2 * channels * image], partial.data(), pixels, channels,
                      [&](int64_t pixel, float* d_sum, float* dz_sum) {
                          const T *row = from + pixel * channels, *given_row = given + pixel * channels;
                          over_row(channels, [&](int64_t c, auto kind) {
                              using F = decltype(kind);
                              // The activation's slope is computed anew from x: memory costs more than the arithmetic.
                              const F value = loaded<F>(row + c), y = value * loaded<F>(scale + c) + loaded<F>(shift + c);
                              const F d = loaded<F>(given_row + c) * slope<ACTIVATION>(y);
                              store(d_sum + c, loaded<F>(d_sum + c) + d);
                              store(dz_sum + c, loaded<F>(dz_sum + c) + d * (value - loaded<F>(mean + c)));
                          });
                      });
        }
#pragma omp for schedule(static)
        for (int64_t c = 0; c < channels; ++c) {
            const Sums all = over_images(totals.data(), images, channels, c);
            sums[c] = all.first;
            sums[channels + c] = all.second * inverse[c];
        }
    }
}

// With d and z as above, and means over the images of all processes:
//
//     dx = weight · (d − mean(d) − z · mean(d · z)) / deviation.
template <int ACTIVATION, typename T>
void batch_norm_backward(const T* dy, const T* x, T* dx, const double* sums, const float* mean, const float* inverse,
                         const float* weight, const float* bias, const Shape& shape) {
    const int64_t channels = shape.channels;
    const double count = static_cast<double>(shape.count);
    const Lines lines(mean, inverse, weight, bias, channels);
    const float *scale = lines.scale.data(), *shift = lines.shift.data();
    std::vector<float> factors(2 * channels);
    float* __restrict factor = factors.data();
    float* __restrict constant = factor + channels;
    for (int64_t c = 0; c < channels; ++c) {
        // dx as a line in d and x, so that this pass is one expression.
        const double line = -static_cast<double>(scale[c]) * inverse[c] * sums[channels + c] / count;
        factor[c] = static_cast<float>(line);
        constant[c] = static_cast<float>(-scale[c] * sums[c] / count - line * mean[c]);
    }
#pragma omp parallel for schedule(static) num_threads(shape.threads)
    for (int64_t pixel = 0; pixel < shape.images * shape.pixels; ++pixel) {
        const T *row = x + pixel * channels, *given_row = dy + pixel * channels;
        T* to = dx + pixel * channels;
        over_row(channels, [&](int64_t c, auto kind) {
            using F = decltype(kind);
            const F value = loaded<F>(row + c), times = loaded<F>(scale + c);
            const F d = loaded<F>(given_row + c) * slope<ACTIVATION>(value * times + loaded<F>(shift + c));
            store(to + c, d * times + value * loaded<F>(factor + c) + loaded<F>(constant + c));
        });
    }
}

#define BY_ACTIVATION(FUNCTION, ...)                                                                                       \
    switch (shape->activation) {                                                                                           \
        case RELU: return FUNCTION<RELU>(__VA_ARGS__, *shape);                                                             \
        case RELU6: return FUNCTION<RELU6>(__VA_ARGS__, *shape);                                                           \
        case HARDSWISH: return FUNCTION<HARDSWISH>(__VA_ARGS__, *shape);                                                   \
        case SILU: return FUNCTION<SILU>(__VA_ARGS__, *shape);                                                             \
        default: return FUNCTION<NONE>(__VA_ARGS__, *shape);                                                               \
    }

}  // namespace

// One entry point for each dtype, in C so that ctypes finds it by name; `library.SIGNATURES` lists the arguments.
#define KERNELS(T, NAME)                                                                                                   \
    void batch_statistics_##NAME(const void* x, double* statistics, const Shape* shape) {                                  \
        batch_statistics(static_cast<const T*>(x), statistics, *shape);                                                    \
    }                                                                                                                      \
    void batch_norm_##NAME(const void* x, void* y, const double* statistics, float* mean, float* inverse,                  \
                           float* running_mean, float* running_var, const float* weight, const float* bias,                \
                           const Shape* shape) {                                                                           \
        BY_ACTIVATION(batch_norm, static_cast<const T*>(x), static_cast<T*>(y), statistics, mean, inverse, running_mean,   \
                      running_var, weight, bias)                                                                           \
    }                                                                                                                      \
    void batch_norm_sums_##NAME(const void* dy, const void* x, double* sums, const float* mean, const float* inverse,      \
                                const float* weight, const float* bias, const Shape* shape) {                              \
        BY_ACTIVATION(batch_norm_sums, static_cast<const T*>(dy), static_cast<const T*>(x), sums, mean, inverse, weight,   \
                      bias)                                                                                                \
    }                                                                                                                      \
    void batch_norm_backward_##NAME(const void* dy, const void* x, void* dx, const double* sums, const float* mean,        \
                                    const float* inverse, const float* weight, const float* bias, const Shape* shape) {    \
        BY_ACTIVATION(batch_norm_backward, static_cast<const T*>(dy), static_cast<const T*>(x), static_cast<T*>(dx), sums, \
                      mean, inverse, weight, bias)                                                                         \
    }

extern "C" {
KERNELS(float, float32)
KERNELS(bfloat16, bfloat16)
}
