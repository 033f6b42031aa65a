// Computes what is done to rows of a matrix on the CPU: softmax, LayerNorm and sums of columns.
//
// Rows lie one after the other. Each is computed by a single thread, and sums over rows are taken in blocks of a fixed size
// that are added in their order, so results do not depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "exponential.h"
#include "numbers.h"

namespace {

// `library.RowsShape` must have the same fields in the same order.
struct Shape {
    int64_t rows, width;
    double eps;
    int threads;
};

// Rows that are summed in float32; the sums of blocks are summed in float64.
constexpr int64_t BLOCK = 128;

inline void keep_larger(Floats& lanes, float&, const Floats& value) { lanes = value > lanes ? value : lanes; }
inline void keep_larger(Floats&, float& largest, float value) { largest = value > largest ? value : largest; }

int64_t blocks_of(int64_t rows) { return (rows + BLOCK - 1) / BLOCK; }

// y = softmax(x); `y` may be `x`.
template <typename T>
void softmax(const T* x, T* y, const Shape& shape) {
    const int64_t width = shape.width;
#pragma omp parallel num_threads(shape.threads)
    {
        std::vector<float> line(width);
        float* values = line.data();
#pragma omp for schedule(static)
        for (int64_t row = 0; row < shape.rows; ++row) {
            const T* from = x + row * width;
            T* to = y + row * width;
            Floats lanes = Floats{} - INFINITY;
            float largest = -INFINITY;
            over_row(width, [&](int64_t i, auto kind) {
                const auto value = loaded<decltype(kind)>(from + i);
                store(values + i, value);
                keep_larger(lanes, largest, value);
            });
            for (int64_t i = 0; i < LANES; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
            RowSum sum;
            over_row(width, [&](int64_t i, auto kind) {
                const auto power = exponential(loaded<decltype(kind)>(values + i) - largest);
                store(values + i, power);
                sum.add(power);
            });
            const float factor = 1 / sum.total();
            over_row(width, [&](int64_t i, auto kind) { store(to + i, loaded<decltype(kind)>(values + i) * factor); });
        }
    }
}

// y = (x − mean) / deviation · weight + bias, with mean and deviation of each row. Writes both for the backward pass.
template <typename X, typename Y>
void layer_norm(const X* x, Y* y, float* means, float* inverses, const float* weight, const float* bias, const Shape& shape) {
    const int64_t width = shape.width;
#pragma omp parallel num_threads(shape.threads)
    {
        std::vector<float> line(width);
        float* values = line.data();
#pragma omp for schedule(static)
        for (int64_t row = 0; row < shape.rows; ++row) {
            const X* from = x + row * width;
            Y* to = y + row * width;
            RowSum sum, squares;
            over_row(width, [&](int64_t i, auto kind) {
                const auto value = loaded<decltype(kind)>(from + i);
                store(values + i, value);
                sum.add(value);
            });
            const float mean = sum.total() / width;
            over_row(width, [&](int64_t i, auto kind) {
                const auto value = loaded<decltype(kind)>(values + i) - mean;
                squares.add(value * value);
            });
            const float inverse = 1 / std::sqrt(squares.total() / width + static_cast<float>(shape.eps));
            means[row] = mean;
            inverses[row] = inverse;
            over_row(width, [&](int64_t i, auto kind) {
                using F = decltype(kind);
                store(to + i, (loaded<F>(values + i) - mean) * inverse * loaded<F>(weight + i) + loaded<F>(bias + i));
            });
        }
    }
}

// With z = (x − mean) / deviation, d = dy · weight, and means over the row: dx = (d − mean(d) − z · mean(d · z)) / deviation.
template <typename X, typename Y>
void layer_norm_backward(const Y* dy, const X* x, X* dx, float* dweight, float* dbias, const float* means, const float* inverses,
                         const float* weight, const Shape& shape) {
    const int64_t width = shape.width, blocks = blocks_of(shape.rows);
    // Of each block of rows what it adds to the gradient of the weight, and to that of the bias.
    std::vector<float> sums(2 * width * blocks);
#pragma omp parallel num_threads(shape.threads)
    {
        std::vector<float> lines(2 * width);
        float *normal = lines.data(), *weighted = normal + width;
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; ++block) {
            float *to_weight = &sums[2 * width * block], *to_bias = to_weight + width;
            for (int64_t row = block * BLOCK; row < std::min(shape.rows, (block + 1) * BLOCK); ++row) {
                const X* from = x + row * width;
                const Y* given = dy + row * width;
                X* to = dx + row * width;
                const float mean = means[row], inverse = inverses[row];
                RowSum d_sum, dz_sum;
                over_row(width, [&](int64_t i, auto kind) {
                    using F = decltype(kind);
                    const F value = loaded<F>(given + i), z = (loaded<F>(from + i) - mean) * inverse;
                    const F d = value * loaded<F>(weight + i);
                    store(to_weight + i, loaded<F>(to_weight + i) + value * z);
                    store(to_bias + i, loaded<F>(to_bias + i) + value);
                    store(normal + i, z);
                    store(weighted + i, d);
                    d_sum.add(d);
                    dz_sum.add(d * z);
                });
                const float constant = d_sum.total() / width, factor = dz_sum.total() / width;
                over_row(width, [&](int64_t i, auto kind) {
                    using F = decltype(kind);
                    store(to + i, (loaded<F>(weighted + i) - constant - loaded<F>(normal + i) * factor) * inverse);
                });
            }
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < width; ++i) {
            double of_weight = 0, of_bias = 0;
            for (int64_t block = 0; block < blocks; ++block) {
                of_weight += sums[2 * width * block + i];
                of_bias += sums[2 * width * block + width + i];
            }
            dweight[i] = static_cast<float>(of_weight);
            dbias[i] = static_cast<float>(of_bias);
        }
    }
}

// The sums of a matrix' columns.
template <typename T>
void column_sums(const T* x, float* totals, const Shape& shape) {
    const int64_t width = shape.width, blocks = blocks_of(shape.rows);
    std::vector<float> sums(width * blocks);
#pragma omp parallel num_threads(shape.threads)
    {
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; ++block) {
            float* to = &sums[width * block];
            for (int64_t row = block * BLOCK; row < std::min(shape.rows, (block + 1) * BLOCK); ++row) {
                const T* from = x + row * width;
                over_row(width, [&](int64_t i, auto kind) {
                    using F = decltype(kind);
                    store(to + i, loaded<F>(to + i) + loaded<F>(from + i));
                });
            }
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < width; ++i) {
            double total = 0;
            for (int64_t block = 0; block < blocks; ++block) total += sums[width * block + i];
            totals[i] = static_cast<float>(total);
        }
    }
}

}  // namespace

// Entry points for each dtype, in C so that ctypes finds them by name; `library.SIGNATURES` lists the arguments.
#define KERNELS(T, NAME)                                                                                                   \
    void softmax_##NAME(const void* x, void* y, const Shape* shape) {                                                      \
        softmax(static_cast<const T*>(x), static_cast<T*>(y), *shape);                                                     \
    }                                                                                                                      \
    void column_sums_##NAME(const void* x, float* totals, const Shape* shape) {                                            \
        column_sums(static_cast<const T*>(x), totals, *shape);                                                             \
    }

// LayerNorms by the dtype of their inputs and that of their results.
#define LAYER_NORMS(X, Y, NAME)                                                                                            \
    void layer_norm_##NAME(const void* x, void* y, float* means, float* inverses, const float* weight, const float* bias,  \
                           const Shape* shape) {                                                                           \
        layer_norm(static_cast<const X*>(x), static_cast<Y*>(y), means, inverses, weight, bias, *shape);                   \
    }                                                                                                                      \
    void layer_norm_backward_##NAME(const void* dy, const void* x, void* dx, float* dweight, float* dbias,                 \
                                    const float* means, const float* inverses, const float* weight, const Shape* shape) {  \
        layer_norm_backward(static_cast<const Y*>(dy), static_cast<const X*>(x), static_cast<X*>(dx), dweight, dbias,      \
                            means, inverses, weight, *shape);                                                              \
    }

extern "C" {
KERNELS(float, float32)
KERNELS(bfloat16, bfloat16)
LAYER_NORMS(float, float, float32_float32)
LAYER_NORMS(float, bfloat16, float32_bfloat16)
LAYER_NORMS(bfloat16, bfloat16, bfloat16_bfloat16)
}
