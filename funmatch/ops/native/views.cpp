// Samples views of images on the CPU: crops, resizes and mirrors in one pass over the pixels that are needed.
//
// `__restrict` is needed for vector instructions: without it a compiler must assume that a write changes what is read next.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

// Where the pixels of a view are read along one axis: at clip(start + i · step, least, most), between two neighbours.
// float64, as in `grids.SamplingGrid`, whose rows of eight numbers are copied into two of these.
struct Axis {
    double start, step, least, most;
    double at(int64_t i) const {
        const double place = start + static_cast<double>(i) * step;
        return place < least ? least : (place > most ? most : place);
    }
};

// A pixel and the first value of the next one: four numbers fill a vector.
typedef float Pixel __attribute__((vector_size(16)));

inline Pixel load_pixel(const float* from) {
    Pixel pixel;
    std::memcpy(&pixel, from, sizeof pixel);
    return pixel;
}

// Samples a view, (side, side, 3) in [0, 1], of an image of bytes without antialias. Each row of the view takes three passes: two rows
// of the image are blended over the columns that are needed, where neighbours make full vectors; then columns are, pixel by
// pixel, since processors gather single values slowly; then the result is scaled.
void sample_view(const uint8_t* image, int64_t row_bytes, const Axis rows, const Axis columns, float* view, int64_t side) {
    const int64_t values = 3 * side;
    std::vector<int32_t> near(side), far(side);
    std::vector<float> share(side), blended(values + 1);
    // The columns' neighbours and weights are the same for all rows, so they are computed once.
    for (int64_t i = 0; i < side; ++i) {
        const double place = columns.at(i), left = std::floor(place), right = std::fmin(left + 1, columns.most);
        near[i] = static_cast<int32_t>(left);
        far[i] = static_cast<int32_t>(right);
        share[i] = static_cast<float>(place - left);
    }
    // A mirrored view runs from right to left, so the extremes may be at either end.
    const int32_t leftmost = *std::min_element(near.begin(), near.end()), rightmost = *std::max_element(far.begin(), far.end());
    const int64_t length = 3 * (static_cast<int64_t>(rightmost) - leftmost + 1);
    std::vector<float> between(length + 1);
    float* __restrict row = between.data();
    float* __restrict line = blended.data();
    for (int64_t i = 0; i < side; ++i) {
        const double place = rows.at(i), above = std::floor(place), below = std::fmin(above + 1, rows.most);
        const uint8_t* __restrict upper = image + static_cast<int64_t>(above) * row_bytes + 3 * leftmost;
        const uint8_t* __restrict lower = image + static_cast<int64_t>(below) * row_bytes + 3 * leftmost;
        const float down = static_cast<float>(place - above);
#pragma omp simd
        for (int64_t k = 0; k < length; ++k) {
            const float value = upper[k];
            row[k] = value + (static_cast<float>(lower[k]) - value) * down;
        }
        for (int64_t j = 0; j < side; ++j) {
            const Pixel value = load_pixel(row + 3 * (near[j] - leftmost)), next = load_pixel(row + 3 * (far[j] - leftmost));
            // The fourth number is written over by the next pixel.
            const Pixel pixel = value + (next - value) * share[j];
            std::memcpy(line + 3 * j, &pixel, sizeof pixel);
        }
        float* __restrict to = view + i * values;
#pragma omp simd
        for (int64_t k = 0; k < values; ++k) to[k] = line[k] / 255.0f;
    }
}

// The filters, by their number in `resample.FILTERS`: the weight of a pixel by its offset from the place, for views whose
// pixels are `step` pixels of the image apart.
enum Kind { BILINEAR = 1, BICUBIC = 2, AREA = 3 };

struct Filter {
    Kind kind;
    // With antialias a filter is as wide as a pixel of the view, but no narrower than one of the image.
    double width(double step) const { return std::max(1.0, step); }
    // In pixels of the image; 0 from there on.
    double radius(double step) const { return kind == AREA ? (step + 1) / 2 : width(step) * (kind == BICUBIC ? 2 : 1); }
    double operator()(double offset, double step) const {
        // The part of the pixel that lies in the pixel of the view.
        if (kind == AREA) return std::max(std::min(offset + 0.5, step / 2) - std::max(offset - 0.5, -step / 2), 0.0);
        const double d = std::fabs(offset / width(step));
        if (kind == BILINEAR) return d < 1 ? 1 - d : 0;
        // Keys' cubic with a = -1/2, as in Pillow.
        if (d < 1) return (1.5 * d - 2.5) * d * d + 1;
        return d < 2 ? (((d - 5) * d + 8) * d - 4) * -0.5 : 0;
    }
};

// With antialias, weights are whole numbers of 2^-22, as in Pillow, so that sums are exact and rounded alike. Where
// `resample.PRECISION` is applied in Python, its value must be the same. Means of areas are not rounded: as in TensorFlow.
constexpr int PRECISION = 22;

inline int32_t as_weight(double share, int32_t) {
    share *= 1 << PRECISION;
    return static_cast<int32_t>(share < 0 ? share - 0.5 : share + 0.5);
}
inline float as_weight(double share, float) { return static_cast<float>(share); }
inline int32_t finish(int32_t sum) { return std::min(std::max((sum + (1 << (PRECISION - 1))) >> PRECISION, 0), 255); }

// The pixels along one axis whose weighted mean each pixel of a view is: `taps` weights each, from pixel `first` on.
template <typename Value>
struct Taps {
    int64_t taps;
    std::vector<int64_t> first;
    std::vector<Value> weights;

    Taps(const Axis& axis, int64_t side, const Filter filter) : first(side) {
        const double step = std::fabs(axis.step), radius = filter.radius(step);
        taps = std::min(2 * static_cast<int64_t>(std::ceil(radius)) + 1, static_cast<int64_t>(axis.most - axis.least) + 1);
        weights.assign(side * taps, 0);
        std::vector<double> exact(taps);
        for (int64_t i = 0; i < side; ++i) {
            // Not clipped to pixels' centres: beyond the edge there is no pixel, so those inside share the weight.
            const double place = std::min(std::max(axis.start + static_cast<double>(i) * axis.step, axis.least - 0.5), axis.most + 0.5);
            // All taps lie inside the image; those that the filter does not reach have the weight 0.
            const double start = std::min(std::max(std::floor(place - radius), axis.least), axis.most - static_cast<double>(taps) + 1);
            first[i] = static_cast<int64_t>(start);
            double sum = 0;
            for (int64_t t = 0; t < taps; ++t) sum += exact[t] = filter(start + static_cast<double>(t) - place, step);
            for (int64_t t = 0; t < taps; ++t) weights[i * taps + t] = as_weight(exact[t] / sum, Value{});
        }
    }
};

// Rows of an image that are shortened together: side by side, their pixels fill a vector.
constexpr int ROWS = 16;
constexpr int LANES = 4 * ROWS;  // bytes of these pixels, each with a fourth one of no meaning
constexpr int BLOCK = 48;        // values of a row that are summed together: as many as stay in registers

// Computes weighted sums of bytes, rounded to bytes: `count` sums, of those that lie `stride` bytes apart.
template <int count, typename Result>
inline void sum_bytes(const uint8_t* __restrict from, int64_t stride, const int32_t* weight, int64_t taps, Result* __restrict to) {
    int32_t sum[count] = {};
    for (int64_t t = 0; t < taps; ++t, from += stride)
#pragma omp simd
        for (int k = 0; k < count; ++k) sum[k] += weight[t] * from[k];
#pragma omp simd
    for (int k = 0; k < count; ++k) to[k] = static_cast<Result>(finish(sum[k]));
}

// Samples a view, (side, side, 3) in [0, 1], with antialias: the bytes of Pillow. The rows that are needed are shortened
// first, and summed then, with rounding after both.
void antialias_view(const uint8_t* image, int64_t row_bytes, const Axis rows, const Axis columns, float* view, int64_t side,
                    const Filter filter) {
    const Taps<int32_t> down(rows, side, filter);
    Taps<int32_t> across(columns, side, filter);
    const auto [top, bottom] = std::minmax_element(down.first.begin(), down.first.end());
    const auto [left, right] = std::minmax_element(across.first.begin(), across.first.end());
    const int64_t first = *top, count = *bottom - first + down.taps, values = 3 * side;
    const int64_t begin = *left, width = *right - begin + across.taps;
    for (int64_t& each : across.first) each -= begin;
    // One byte more than a row, for the fourth one of its last pixel.
    const int64_t stride = values + 1;
    std::vector<uint8_t> lines((count + ROWS - 1) / ROWS * ROWS * stride);
    std::vector<uint8_t> pixels(LANES * width);
    for (int64_t r = 0; r < count; r += ROWS) {
        for (int each = 0; each < ROWS; ++each) {
            const uint8_t* from = image + (first + std::min(r + each, count - 1)) * row_bytes + 3 * begin;
            uint8_t* to = pixels.data() + 4 * each;
            // The last pixel without a fourth byte: behind the image there may be none.
            for (int64_t x = 1; x < width; ++x, to += LANES, from += 3) std::memcpy(to, from, 4);
            std::memcpy(to, from, 3);
        }
        uint8_t* to = lines.data() + r * stride;
        for (int64_t j = 0; j < side; ++j, to += 3) {
            uint8_t shortened[LANES];
            sum_bytes<LANES>(pixels.data() + LANES * across.first[j], LANES, across.weights.data() + j * across.taps, across.taps, shortened);
            // The fourth byte is written over by the next pixel.
            for (int each = 0; each < ROWS; ++each) std::memcpy(to + each * stride, shortened + 4 * each, 4);
        }
    }
    for (int64_t i = 0; i < side; ++i) {
        const uint8_t* from = lines.data() + (down.first[i] - first) * stride;
        const int32_t* weight = down.weights.data() + i * down.taps;
        float* __restrict to = view + i * values;
        int64_t k = 0;
        for (; k + BLOCK <= values; k += BLOCK) sum_bytes<BLOCK>(from + k, stride, weight, down.taps, to + k);
        for (; k < values; ++k) sum_bytes<1>(from + k, stride, weight, down.taps, to + k);
#pragma omp simd
        for (int64_t v = 0; v < values; ++v) to[v] /= 255.0f;
    }
}

// Samples a view, (side, side, 3) in [0, 1], by the means of areas. The rows that are needed are shortened first, and summed
// then.
void area_view(const uint8_t* image, int64_t row_bytes, const Axis rows, const Axis columns, float* view, int64_t side) {
    const Filter filter{AREA};
    const Taps<float> down(rows, side, filter), across(columns, side, filter);
    const auto [top, bottom] = std::minmax_element(down.first.begin(), down.first.end());
    const int64_t first = *top, count = *bottom - first + down.taps, values = 3 * side;
    std::vector<float> lines(count * values), sums(values);
    for (int64_t r = 0; r < count; ++r) {
        float* to = lines.data() + r * values;
        for (int64_t j = 0; j < side; ++j) {
            const float* weight = across.weights.data() + j * across.taps;
            const uint8_t* from = image + (first + r) * row_bytes + 3 * across.first[j];
            float red = 0, green = 0, blue = 0;
            for (int64_t t = 0; t < across.taps; ++t) {
                red += weight[t] * from[3 * t];
                green += weight[t] * from[3 * t + 1];
                blue += weight[t] * from[3 * t + 2];
            }
            to[3 * j] = red;
            to[3 * j + 1] = green;
            to[3 * j + 2] = blue;
        }
    }
    float* __restrict sum = sums.data();
    for (int64_t i = 0; i < side; ++i) {
        std::fill(sums.begin(), sums.end(), 0.0f);
        for (int64_t t = 0; t < down.taps; ++t) {
            const float weight = down.weights[i * down.taps + t];
            const float* __restrict from = lines.data() + (down.first[i] - first + t) * values;
#pragma omp simd
            for (int64_t k = 0; k < values; ++k) sum[k] += weight * from[k];
        }
        float* __restrict to = view + i * values;
#pragma omp simd
        for (int64_t k = 0; k < values; ++k) to[k] = sum[k] / 255.0f;
    }
}

}  // namespace

extern "C" {
// Samples n views. `corners` holds for each the address of the pixel that coordinates are counted from and the bytes of
// a row, `axes` the eight numbers of its rows and columns; `filter` is a number of `resample.FILTERS`. One thread: batches
// are prepared by several already.
void sample_views(const int64_t* corners, const double* axes, float* views, int64_t n, int64_t side, int filter) {
    for (int64_t i = 0; i < n; ++i) {
        Axis both[2];
        std::memcpy(both, axes + 8 * i, sizeof both);
        const uint8_t* image = reinterpret_cast<const uint8_t*>(corners[2 * i]);
        float* view = views + i * 3 * side * side;
        if (filter == 0)
            sample_view(image, corners[2 * i + 1], both[0], both[1], view, side);
        else if (filter == AREA)
            area_view(image, corners[2 * i + 1], both[0], both[1], view, side);
        else
            antialias_view(image, corners[2 * i + 1], both[0], both[1], view, side, Filter{static_cast<Kind>(filter)});
    }
}
}
