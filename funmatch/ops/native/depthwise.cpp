// Computes the gradients of convolutions of one filter a channel on the CPU.
//
// Activations lie in memory with their channels last, so 16 neighbouring channels are a vector. The last vector begins
// 16 channels before the end and overlaps the one before, which gets the same values once more: no vector is cut. Sums
// are float32. Each image is summed by a single thread in a fixed order, so results do not depend on the number of threads.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "numbers.h"

namespace {

// Sizes of a batch and of its output. `library.Window` must have the same fields in the same order.
struct Window {
    int64_t images, height, width, channels, out_height, out_width;
    int taps, stride, padding, threads;
};

// The taps of a filter that lead from a position of the image to the output, along one axis: `first`, first + stride, …
// below `last`. The first leads to `out`, each further one to the position before.
struct Taps {
    int first, last;
    int64_t out;
    Taps(int64_t position, int64_t out_size, int taps, int stride, int padding) {
        const int64_t shifted = position + padding;
        // Taps below lead behind the end of the output, taps above before its beginning.
        const int64_t least = std::max<int64_t>(0, shifted - (out_size - 1) * stride);
        first = static_cast<int>(least + (shifted - least) % stride);
        last = static_cast<int>(std::min<int64_t>(taps, shifted + 1));
        out = (shifted - first) / stride;
    }
    bool is_full(int taps, int stride) const { return first < stride && last == taps; }
};

inline int64_t block_start(int64_t c, int64_t channels) { return std::min(c, channels - LANES); }

// Σ dy · weight over the taps of one row of the filter that begin at FIRST, all of them inside the output.
template <int K, int STRIDE, int FIRST, typename T>
inline void add_full(Floats& sum, const T* pixel, const Floats* taps, int64_t channels) {
#pragma GCC unroll 7
    for (int j = FIRST; j < K; j += STRIDE) {
        Floats value;
        load(value, pixel - (j - FIRST) / STRIDE * channels);
        sum += value * taps[j];
    }
}

// dx[row, column] = Σ dy[(row + padding − i) / stride, (column + padding − j) / stride] · weight[i, j].
template <int K, int STRIDE, typename T>
void backward_input(const T* dy, const float* weight, T* dx, const Window& w) {
    const int64_t channels = w.channels;
    std::vector<Taps> columns;
    for (int64_t column = 0; column < w.width; ++column) columns.emplace_back(column, w.out_width, K, STRIDE, w.padding);
#pragma omp parallel for collapse(2) num_threads(w.threads) schedule(static)
    for (int64_t image = 0; image < w.images; ++image) {
        for (int64_t row = 0; row < w.height; ++row) {
            const Taps rows(row, w.out_height, K, STRIDE, w.padding);
            T* into = dx + (image * w.height + row) * w.width * channels;
            for (int64_t block = 0; block < channels; block += LANES) {
                const int64_t c = block_start(block, channels);
                const T* given = dy + (image * w.out_height + rows.out) * w.out_width * channels + c;
                Floats taps[K * K];
                for (int t = 0; t < K * K; ++t) load(taps[t], weight + t * channels + c);
                for (int64_t column = 0; column < w.width; ++column) {
                    const Taps& own = columns[column];
                    const bool full = own.is_full(K, STRIDE);
                    Floats sum = {}, value;
                    const T* pixel = given + own.out * channels;
                    for (int i = rows.first; i < rows.last; i += STRIDE, pixel -= w.out_width * channels) {
                        if (full && own.first == 0) {
                            add_full<K, STRIDE, 0>(sum, pixel, taps + i * K, channels);
                        } else if (full) {
                            add_full<K, STRIDE, STRIDE - 1>(sum, pixel, taps + i * K, channels);
                        } else {
                            for (int j = own.first, back = 0; j < own.last; j += STRIDE, ++back) {
                                load(value, pixel - back * channels);
                                sum += value * taps[i * K + j];
                            }
                        }
                    }
                    store(into + column * channels + c, sum);
                }
            }
        }
    }
}

// Writes each image's share of the gradient of the weights, (images, taps · taps, channels).
template <int K, int STRIDE, typename T>
void backward_weight(const T* dy, const T* x, float* dweight, const Window& w) {
    const int64_t channels = w.channels;
    // Columns of the output whose filter lies inside the image.
    const int64_t inner = std::min(w.out_width, (w.padding + STRIDE - 1) / static_cast<int64_t>(STRIDE));
    const int64_t outer = std::max(inner, std::min(w.out_width, (w.width + w.padding - K) / STRIDE + 1));
#pragma omp parallel for collapse(2) num_threads(w.threads) schedule(static)
    for (int64_t image = 0; image < w.images; ++image) {
        for (int i = 0; i < K; ++i) {
            for (int64_t block = 0; block < channels; block += LANES) {
                const int64_t c = block_start(block, channels);
                Floats sums[K] = {};
                for (int64_t row = 0; row < w.out_height; ++row) {
                    const int64_t in_row = row * STRIDE - w.padding + i;
                    if (in_row < 0 || in_row >= w.height) continue;
                    const T* from = x + (image * w.height + in_row) * w.width * channels + c;
                    const T* given_row = dy + (image * w.out_height + row) * w.out_width * channels + c;
                    Floats given, value;
                    const auto at_border = [&](int64_t column) {
                        load(given, given_row + column * channels);
#pragma GCC unroll 7
                        for (int j = 0; j < K; ++j) {
                            const int64_t in_column = column * STRIDE - w.padding + j;
                            if (in_column < 0 || in_column >= w.width) continue;
                            load(value, from + in_column * channels);
                            sums[j] += given * value;
                        }
                    };
                    for (int64_t column = 0; column < inner; ++column) at_border(column);
                    for (int64_t column = inner; column < outer; ++column) {
                        const T* pixel = from + (column * STRIDE - w.padding) * channels;
                        load(given, given_row + column * channels);
#pragma GCC unroll 7
                        for (int j = 0; j < K; ++j) {
                            load(value, pixel + j * channels);
                            sums[j] += given * value;
                        }
                    }
                    for (int64_t column = outer; column < w.out_width; ++column) at_border(column);
                }
#pragma GCC unroll 7
                for (int j = 0; j < K; ++j) store(dweight + ((image * K + i) * K + j) * channels + c, sums[j]);
            }
        }
    }
}

// Calls a function for the filters and strides that `depthwise.SIZES` and `STRIDES` list.
#define BY_SIZE(FUNCTION, ...)                                                                                             \
    switch (10 * w.taps + w.stride) {                                                                                      \
        case 31: return FUNCTION<3, 1>(__VA_ARGS__);                                                                       \
        case 32: return FUNCTION<3, 2>(__VA_ARGS__);                                                                       \
        case 51: return FUNCTION<5, 1>(__VA_ARGS__);                                                                       \
        case 52: return FUNCTION<5, 2>(__VA_ARGS__);                                                                       \
        case 71: return FUNCTION<7, 1>(__VA_ARGS__);                                                                       \
        case 72: return FUNCTION<7, 2>(__VA_ARGS__);                                                                       \
    }

template <typename T>
void input_gradient(const T* dy, const float* weight, T* dx, const Window& w) {
    BY_SIZE(backward_input, dy, weight, dx, w)
}

template <typename T>
void weight_gradient(const T* dy, const T* x, float* dweight, const Window& w) {
    BY_SIZE(backward_weight, dy, x, dweight, w)
}

}  // namespace

// One entry point for each dtype, in C so that ctypes finds it by name; `library.SIGNATURES` lists the arguments.
#define KERNELS(T, NAME)                                                                                                   \
    void depthwise_input_##NAME(const void* dy, const float* weight, void* dx, const Window* w) {                          \
        input_gradient(static_cast<const T*>(dy), weight, static_cast<T*>(dx), *w);                                        \
    }                                                                                                                      \
    void depthwise_weight_##NAME(const void* dy, const void* x, float* dweight, const Window* w) {                         \
        weight_gradient(static_cast<const T*>(dy), static_cast<const T*>(x), dweight, *w);                                 \
    }

extern "C" {
KERNELS(float, float32)
KERNELS(bfloat16, bfloat16)
}
