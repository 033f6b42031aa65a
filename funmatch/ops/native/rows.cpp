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

int64_t blocks_of(int64_t rows) { return (rows + BLOCK - 1) / BLOCK; }

// y = softmax(x); `y` may be `x`.
template <typename T>
void softmax(const T* x, T* y, const Shape& shape) {
    const int64_t width = shape.width;
#pragma omp parallel num_threads(shape.threads)
    {
        std::vector<float> line(width);
        float* __restrict values = line.data();
#pragma omp for schedule(static)
        for (int64_t row = 0; row < shape.rows; ++row) {
            const T* from = x + row * width;
            T* to = y + row * width;
            float largest = -INFINITY, sum = 0;
#pragma omp simd reduction(max : largest)
            for (int64_t i = 0; i < width; ++i) {
                values[i] = read(from + i);
                largest = values[i] > largest ? values[i] : largest;
            }
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < width; ++i) {
                values[i] = exponential(values[i] - largest);
                sum += values[i];
            }
            const float factor = 1 / sum;
#pragma omp simd
            for (int64_t i = 0; i < width; ++i) write(to + i, values[i] * factor);
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
        float* __restrict values = line.data();
#pragma omp for schedule(static)
        for (int64_t row = 0; row < shape.rows; ++row) {
            const X* from = x + row * width;
            Y* to = y + row * width;
            float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < width; ++i) sum += values[i] = read(from + i);
            const float mean = sum / width;
#pragma omp simd reduction(+ : squares)
            for (int64_t i = 0; i < width; ++i) {
                values[i] -= mean;
                squares += values[i] * values[i];
            }
            const float inverse = 1 / std::sqrt(squares / width + static_cast<float>(shape.eps));
            means[row] = mean;
            inverses[row] = inverse;
#pragma omp simd
            for (int64_t i = 0; i < width; ++i) write(to + i, values[i] * inverse * weight[i] + bias[i]);
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
        float *__restrict normal = lines.data(), *__restrict d = normal + width;  // d: dy · weight
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; ++block) {
            float* __restrict to_weight = &sums[2 * width * block];
            float* __restrict to_bias = to_weight + width;
            for (int64_t row = block * BLOCK; row < std::min(shape.rows, (block + 1) * BLOCK); ++row) {
                const X* __restrict from = x + row * width;
                const Y* __restrict given = dy + row * width;
                X* __restrict to = dx + row * width;
                const float mean = means[row], inverse = inverses[row];
                float d_sum = 0, dz_sum = 0;
#pragma omp simd reduction(+ : d_sum, dz_sum)
                for (int64_t i = 0; i < width; ++i) {
                    const float value = read(given + i);
                    normal[i] = (read(from + i) - mean) * inverse;
                    to_weight[i] += value * normal[i];
                    to_bias[i] += value;
                    d[i] = value * weight[i];
                    d_sum += d[i];
                    dz_sum += d[i] * normal[i];
                }
                const float constant = d_sum / width, factor = dz_sum / width;
#pragma omp simd
                for (int64_t i = 0; i < width; ++i) write(to + i, (d[i] - constant - normal[i] * factor) * inverse);
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
            float* __restrict to = &sums[width * block];
            for (int64_t row = block * BLOCK; row < std::min(shape.rows, (block + 1) * BLOCK); ++row) {
                const T* __restrict from = x + row * width;
#pragma omp simd
                for (int64_t i = 0; i < width; ++i) to[i] += read(from + i);
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
