// Views, GroupNorm and weight standardisation on the CPU, each in as few looks at its memory as can be.
//
// Pictures lie in memory with their channels last, so inner loops run along what lies side by side, with a sum for each
// channel: compilers turn that into the widest instructions there are. What a picture sums to does not depend on the
// number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

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

// Rounds to the nearest, ties to even; what is not a number stays none.
inline void write(bfloat16* to, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    to->bits = value != value ? 0x7fc0u : static_cast<uint16_t>(rounded);
}

struct Shape {
    int64_t pictures, places, channels, groups;  // of (pictures, places, channels)
    int relu, threads;
    int64_t width() const { return channels / groups; }
    double count() const { return static_cast<double>(width()) * static_cast<double>(places); }
};

// The line that normalises a channel; both ways take it from here, so that they agree on where a ReLU cuts off.
inline float scale_of(float inverse, float weight) { return inverse * weight; }
inline float shift_of(float bias, float mean, float scale) { return bias - mean * scale; }

constexpr int64_t AT_ONCE = 128;  // places whose sums float32 holds; sums of these are in float64

// y = x · scale + shift, cut off below 0 if there is a ReLU; mean and 1 / deviation of each group are kept for the way back.
template <typename T>
void norm(const T* x, T* y, float* mean, float* inverse, const float* weight, const float* bias, Shape shape, double eps) {
    const int64_t channels = shape.channels, places = shape.places, width = shape.width();
#pragma omp parallel num_threads(shape.threads)
    {
        std::vector<float> memory(5 * channels);
        std::vector<double> totals(2 * channels);
        double* __restrict sums = totals.data();
        double* __restrict squares = sums + channels;
        float* __restrict first = memory.data();
        float* __restrict sum = first + channels;
        float* __restrict square = sum + channels;
        float* __restrict scale = square + channels;
        float* __restrict shift = scale + channels;
#pragma omp for schedule(static)
        for (int64_t picture = 0; picture < shape.pictures; ++picture) {
            const T* from = x + picture * places * channels;
            T* into = y + picture * places * channels;
            // Counted from each channel's first value: squares of what lies far from 0 would lose the deviation.
            for (int64_t c = 0; c < channels; ++c) {
                first[c] = read(from + c);
                sums[c] = squares[c] = sum[c] = square[c] = 0;
            }
            for (int64_t place = 0; place < places; ++place) {
                const T* __restrict row = from + place * channels;
#pragma omp simd
                for (int64_t c = 0; c < channels; ++c) {
                    const float value = read(row + c) - first[c];
                    sum[c] += value;
                    square[c] += value * value;
                }
                if (place % AT_ONCE != AT_ONCE - 1 && place != places - 1) continue;
#pragma omp simd
                for (int64_t c = 0; c < channels; ++c) {
                    sums[c] += sum[c];
                    squares[c] += square[c];
                    sum[c] = square[c] = 0;
                }
            }
            for (int64_t g = 0; g < shape.groups; ++g) {
                double total = 0, spread = 0;
                for (int64_t c = g * width; c < (g + 1) * width; ++c) total += sums[c] + places * static_cast<double>(first[c]);
                const double centre = total / shape.count();
                for (int64_t c = g * width; c < (g + 1) * width; ++c) {
                    const double off = first[c] - centre;
                    spread += squares[c] + off * (2.0 * sums[c] + places * off);
                }
                const double steep = 1 / std::sqrt((spread > 0 ? spread : spread * 0) / shape.count() + eps);
                const float middle = mean[picture * shape.groups + g] = static_cast<float>(centre);
                const float slope = inverse[picture * shape.groups + g] = static_cast<float>(steep);
                for (int64_t c = g * width; c < (g + 1) * width; ++c) {
                    scale[c] = scale_of(slope, weight[c]);
                    shift[c] = shift_of(bias[c], middle, scale[c]);
                }
            }
            for (int64_t place = 0; place < places; ++place) {
                const T* __restrict row = from + place * channels;
                T* __restrict to = into + place * channels;
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
// dx = (weight · d − mean(weight · d) − z · mean(weight · d · z)) / deviation. Of weight and bias each picture's share.
template <typename T>
void norm_back(const T* dy, const T* x, T* dx, float* dweight, float* dbias, const float* mean, const float* inverse,
               const float* weight, const float* bias, Shape shape) {
    const int64_t channels = shape.channels, places = shape.places, width = shape.width();
#pragma omp parallel num_threads(shape.threads)
    {
        std::vector<float> memory(7 * channels);
        std::vector<double> totals(2 * channels);
        double* __restrict plains = totals.data();
        double* __restrict slopes = plains + channels;
        float* __restrict scale = memory.data();
        float* __restrict shift = scale + channels;
        float* __restrict centre = shift + channels;
        float* __restrict along = centre + channels;
        float* __restrict rest = along + channels;
        float* __restrict plain_part = rest + channels;
        float* __restrict sloped_part = plain_part + channels;
#pragma omp for schedule(static)
        for (int64_t picture = 0; picture < shape.pictures; ++picture) {
            const T* from = x + picture * places * channels;
            const T* given = dy + picture * places * channels;
            T* into = dx + picture * places * channels;
            float* __restrict dw = dweight + picture * channels;
            float* __restrict db = dbias + picture * channels;
            const bool relu = shape.relu;
            for (int64_t c = 0; c < channels; ++c) {
                const int64_t g = picture * shape.groups + c / width;
                centre[c] = mean[g];
                scale[c] = scale_of(inverse[g], weight[c]);
                shift[c] = shift_of(bias[c], mean[g], scale[c]);
                plains[c] = slopes[c] = plain_part[c] = sloped_part[c] = 0;
            }
            for (int64_t place = 0; place < places; ++place) {
                const T* __restrict row = from + place * channels;
                const T* __restrict up = given + place * channels;
#pragma omp simd
                for (int64_t c = 0; c < channels; ++c) {
                    const float value = read(row + c);
                    const float gradient = relu && value * scale[c] + shift[c] <= 0 ? 0.0f : read(up + c);
                    plain_part[c] += gradient;
                    sloped_part[c] += gradient * (value - centre[c]);
                }
                if (place % AT_ONCE != AT_ONCE - 1 && place != places - 1) continue;
#pragma omp simd
                for (int64_t c = 0; c < channels; ++c) {
                    plains[c] += plain_part[c];
                    slopes[c] += sloped_part[c];
                    plain_part[c] = sloped_part[c] = 0;
                }
            }
            for (int64_t g = 0; g < shape.groups; ++g) {
                const double steep = inverse[picture * shape.groups + g], middle = mean[picture * shape.groups + g];
                double plain = 0, sloped = 0;
                for (int64_t c = g * width; c < (g + 1) * width; ++c) {
                    slopes[c] *= steep;
                    dw[c] = static_cast<float>(slopes[c]);
                    db[c] = static_cast<float>(plains[c]);
                    plain += weight[c] * plains[c];
                    sloped += weight[c] * slopes[c];
                }
                const double slope = -steep * steep * sloped / shape.count();
                const double offset = -steep * plain / shape.count() - slope * middle;
                for (int64_t c = g * width; c < (g + 1) * width; ++c) {
                    along[c] = static_cast<float>(slope);
                    rest[c] = static_cast<float>(offset);
                }
            }
            for (int64_t place = 0; place < places; ++place) {
                const T* __restrict row = from + place * channels;
                const T* __restrict up = given + place * channels;
                T* __restrict to = into + place * channels;
#pragma omp simd
                for (int64_t c = 0; c < channels; ++c) {
                    const float value = read(row + c);
                    const float gradient = relu && value * scale[c] + shift[c] <= 0 ? 0.0f : read(up + c);
                    write(to + c, gradient * scale[c] + value * along[c] + rest[c]);
                }
            }
        }
    }
}

// Each filter with mean 0 and deviation 1, in the precision in which it will be multiplied.
template <typename T>
void standardise(const float* w, T* y, float* mean, float* inverse, int64_t filters, int64_t length, double eps, int threads) {
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
        const float steep = static_cast<float>(1 / std::sqrt(square / static_cast<double>(length) + eps));
        mean[f] = centre;
        inverse[f] = steep;
#pragma omp simd
        for (int64_t i = 0; i < length; ++i) write(to + i, (own[i] - centre) * steep);
    }
}

template <typename T>
void standardise_back(const T* dy, const float* w, float* dw, const float* mean, const float* inverse, int64_t filters,
                      int64_t length, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t f = 0; f < filters; ++f) {
        const T* __restrict up = dy + f * length;
        const float* __restrict own = w + f * length;
        float* __restrict to = dw + f * length;
        const float centre = mean[f], steep = inverse[f];
        float plain = 0, sloped = 0;
#pragma omp simd reduction(+ : plain, sloped)
        for (int64_t i = 0; i < length; ++i) {
            plain += read(up + i);
            sloped += read(up + i) * (own[i] - centre) * steep;
        }
        plain /= static_cast<float>(length);
        sloped /= static_cast<float>(length);
#pragma omp simd
        for (int64_t i = 0; i < length; ++i) to[i] = steep * (read(up + i) - plain - (own[i] - centre) * steep * sloped);
    }
}

// Where the pixels of one axis of a view are read: at clip(start + i · step, least, most), between two that lie side by side.
struct Axis {
    double start, step, least, most;
    double at(int64_t i) const {
        const double place = start + static_cast<double>(i) * step;
        return place < least ? least : (place > most ? most : place);
    }
};

// A view of a picture of bytes, (side, side, 3) in [0, 1]: its rows first, over the columns that are needed, then these.
void look(const uint8_t* picture, int64_t row_bytes, const Axis rows, const Axis columns, float* view, int64_t side) {
    const int64_t values = 3 * side;
    std::vector<int32_t> near(values), far(values);
    std::vector<float> share(values);
    int32_t leftmost = INT32_MAX, rightmost = INT32_MIN;
    for (int64_t i = 0; i < side; ++i) {
        const double place = columns.at(i), left = std::floor(place), right = std::fmin(left + 1, columns.most);
        for (int64_t channel = 0; channel < 3; ++channel) {
            near[3 * i + channel] = static_cast<int32_t>(left);
            far[3 * i + channel] = static_cast<int32_t>(right);
            share[3 * i + channel] = static_cast<float>(place - left);
        }
        leftmost = std::min(leftmost, near[3 * i]);
        rightmost = std::max(rightmost, far[3 * i]);
    }
    for (int64_t k = 0; k < values; ++k) {
        near[k] = 3 * (near[k] - leftmost) + static_cast<int32_t>(k % 3);
        far[k] = 3 * (far[k] - leftmost) + static_cast<int32_t>(k % 3);
    }
    const int64_t length = 3 * (static_cast<int64_t>(rightmost) - leftmost + 1);
    std::vector<float> between(length);
    const int32_t* __restrict before = near.data();
    const int32_t* __restrict after = far.data();
    const float* __restrict part = share.data();
    float* __restrict row = between.data();
    for (int64_t i = 0; i < side; ++i) {
        const double place = rows.at(i), above = std::floor(place), below = std::fmin(above + 1, rows.most);
        const uint8_t* __restrict upper = picture + static_cast<int64_t>(above) * row_bytes + 3 * leftmost;
        const uint8_t* __restrict lower = picture + static_cast<int64_t>(below) * row_bytes + 3 * leftmost;
        const float down = static_cast<float>(place - above);
#pragma omp simd
        for (int64_t k = 0; k < length; ++k) {
            const float value = upper[k];
            row[k] = value + (static_cast<float>(lower[k]) - value) * down;
        }
        float* __restrict to = view + i * values;
#pragma omp simd
        for (int64_t k = 0; k < values; ++k) {
            const float value = row[before[k]];
            to[k] = (value + (row[after[k]] - value) * part[k]) / 255.0f;
        }
    }
}

}  // namespace

#define KERNELS(T, NAME)                                                                                                   \
    void norm_##NAME(const void* x, void* y, float* mean, float* inverse, const float* weight, const float* bias,          \
                     const Shape* shape, double eps) {                                                                     \
        norm(static_cast<const T*>(x), static_cast<T*>(y), mean, inverse, weight, bias, *shape, eps);                      \
    }                                                                                                                      \
    void norm_back_##NAME(const void* dy, const void* x, void* dx, float* dweight, float* dbias, const float* mean,        \
                          const float* inverse, const float* weight, const float* bias, const Shape* shape) {              \
        norm_back(static_cast<const T*>(dy), static_cast<const T*>(x), static_cast<T*>(dx), dweight, dbias, mean, inverse, \
                  weight, bias, *shape);                                                                                   \
    }                                                                                                                      \
    void standardise_##NAME(const float* w, void* y, float* mean, float* inverse, int64_t filters, int64_t length,         \
                            double eps, int threads) {                                                                     \
        standardise(w, static_cast<T*>(y), mean, inverse, filters, length, eps, threads);                                  \
    }                                                                                                                      \
    void standardise_back_##NAME(const void* dy, const float* w, float* dw, const float* mean, const float* inverse,       \
                                 int64_t filters, int64_t length, int threads) {                                           \
        standardise_back(static_cast<const T*>(dy), w, dw, mean, inverse, filters, length, threads);                       \
    }

extern "C" {
// As `resample.Looks` has them: addresses of the pixels that places are counted from, and bytes of a row; rows and columns.
void look(const int64_t* corners, const double* axes, float* views, int64_t n, int64_t side) {
    for (int64_t i = 0; i < n; ++i) {
        Axis both[2];
        std::memcpy(both, axes + 8 * i, sizeof both);
        look(reinterpret_cast<const uint8_t*>(corners[2 * i]), corners[2 * i + 1], both[0], both[1],
             views + i * 3 * side * side, side);
    }
}

KERNELS(float, float32)
KERNELS(bfloat16, bfloat16)
}
