// Decodes a box of a baseline JPEG: what lies outside of it is read, since codes follow one another, but not computed.
//
// The pixels are those of libjpeg-turbo's defaults. Whatever is rare, unusual or damaged is refused, for a decoder that
// knows all of JPEG: progressive images, CMYK, arithmetic codes, other layouts of colours, missing data.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "jpeg_codes.h"
#include "jpeg_header.h"
#include "jpeg_pixels.h"

namespace jpeg {
namespace {

// Bytes behind the codes: more than a minimum coded unit takes, 6 blocks of 64 coefficients of 31 bits, and what is read
// ahead. So it is enough to look after each unit whether its codes were there.
constexpr int64_t PADDING = 2048;

// The order of coefficients in a file, as places in `Pending`: they go diagonally, first to the right.
struct Zigzag {
    // Longer than a block, since the last symbol may point beyond it: to a place that is never used.
    uint8_t place[64 + END_OF_BLOCK] = {};
    constexpr Zigzag() {
        int row = 0, column = 0;
        for (int i = 0; i < 64 + END_OF_BLOCK; ++i) {
            place[i] = static_cast<uint8_t>(i < 64 ? 8 * BLOCKS * row + column : 64 * BLOCKS);
            const bool up = (row + column) % 2 == 0;
            if (up ? column == 7 : row == 7) {
                ++(up ? row : column);
            } else if (up ? row == 0 : column == 0) {
                ++(up ? column : row);
            } else {
                row += up ? -1 : 1;
                column += up ? 1 : -1;
            }
        }
    }
};
constexpr Zigzag ZIGZAG;

// The codes of an image without what is stuffed between them, and where the stretches between restarts end.
struct Scan {
    std::unique_ptr<uint8_t[]> codes;
    std::vector<const uint8_t*> ends;
    bool finished = false;  // whether the image ends as it should

    explicit Scan(const Header& of) : codes(new uint8_t[of.end - of.at + PADDING]) {
        const uint8_t* at = of.at;
        uint8_t* to = codes.get();
        while (true) {
            const void* found = at < of.end ? std::memchr(at, 0xFF, of.end - at) : nullptr;
            const uint8_t* stop = found ? static_cast<const uint8_t*>(found) : of.end;
            std::memcpy(to, at, stop - at);
            to += stop - at;
            const int marker = of.end - stop < 2 ? -1 : stop[1];
            at = stop + 2;
            if (marker == 0) {
                *to++ = 0xFF;
                continue;
            }
            ends.push_back(to);
            finished = marker == 0xD9;
            // Restarts are numbered from 0 to 7, again and again.
            if (marker != 0xD0 + static_cast<int>((ends.size() - 1) % 8)) break;
        }
        std::memset(to, 0, PADDING);
    }
};

// The samples of a component that a box needs, in whole blocks.
struct Samples {
    int64_t left, right, top, bottom, last_row;
    std::unique_ptr<uint8_t[]> values;
    int32_t last_dc = 0;

    int64_t row_bytes() const { return 8 * (right - left); }
    uint8_t* block(int64_t y, int64_t x) const { return values.get() + 8 * ((y - top) * row_bytes() + x - left); }
    // The values from the image's first column on, of a row that may lie beyond the image: there, its edge goes on.
    const uint8_t* row(int64_t y) const {
        return values.get() + (std::min(std::max<int64_t>(y, 0), last_row) - 8 * top) * row_bytes() - 8 * left;
    }
};

class Decoder {
public:
    explicit Decoder(const Header& of) : image(of), scan(of) {}

    // Decodes a box of the image; returns whether that went without a fault.
    bool decode(int64_t top, int64_t left, int64_t rows, int64_t columns, uint8_t* pixels) {
        for (int i = 0; i < image.components; ++i) {
            const Component& each = image.component[i];
            Samples& mine = samples[i];
            reserve(i ? image.wide : 1, each.width, left, columns, mine.left, mine.right);
            reserve(i ? image.tall : 1, each.height, top, rows, mine.top, mine.bottom);
            mine.last_row = each.height - 1;
            mine.values.reset(new uint8_t[mine.row_bytes() * 8 * (mine.bottom - mine.top)]);
        }
        // Even if the box is all there: another decoder says what is missing from the rest.
        if (!scan.finished || !read(top + rows == image.height)) return false;
        for (int64_t y = top; y < top + rows; ++y, pixels += 3 * columns) {
            const uint8_t* bright = samples[0].row(y) + left;
            if (image.components == 1)
                write_grey(bright, columns, pixels);
            else
                write_colours(bright, enlarge(samples[1], 1, y, left, columns), enlarge(samples[2], 2, y, left, columns), columns, pixels);
        }
        return true;
    }

private:
    const Header& image;
    Scan scan;
    Samples samples[3];
    Pending pending;
    std::vector<uint16_t> sums;
    std::vector<uint8_t> wide[3];

    // Computes which blocks hold the samples of pixels `from` … `from + count` - 1 along one axis, with their neighbours
    // where a sample stands for two pixels.
    static void reserve(int step, int64_t length, int64_t from, int64_t count, int64_t& first, int64_t& last) {
        first = std::max<int64_t>(from / step - (step - 1), 0) / 8;
        last = std::min((from + count - 1) / step + (step - 1), length - 1) / 8 + 1;
    }

    // Reads the blocks down to those that are needed, or all of them to the image's end.
    bool read(bool to_end) {
        const int64_t units = (image.width + 8 * image.wide - 1) / (8 * image.wide);
        int64_t rows = 0, left = image.restart;
        size_t stretch = 0;
        for (int i = 0; i < image.components; ++i) {
            const int down = image.component[i].down;
            rows = std::max(rows, (samples[i].bottom + down - 1) / down);
        }
        Bits bits{scan.codes.get()};
        for (int64_t row = 0; row < rows; ++row)
            for (int64_t unit = 0; unit < units; ++unit) {
                if (image.restart && left-- == 0) {
                    // All of a stretch must have been read, and another must follow.
                    const uint8_t* begin = scan.ends[stretch];
                    if (bits.position() != begin || ++stretch == scan.ends.size()) return false;
                    bits = Bits{begin};
                    left = image.restart - 1;
                    for (Samples& each : samples) each.last_dc = 0;
                }
                if (!read_unit(bits, row, unit) || bits.position() > scan.ends[stretch]) return false;
            }
        if (pending.count && !pending.write()) return false;
        return !to_end || (bits.position() == scan.ends.back() && stretch + 1 == scan.ends.size());
    }

    bool read_unit(Bits& bits, int64_t row, int64_t unit) {
        for (int i = 0; i < image.components; ++i) {
            const Component& each = image.component[i];
            Samples& to = samples[i];
            for (int64_t y = row * each.down; y < (row + 1) * each.down; ++y)
                for (int64_t x = unit * each.across; x < (unit + 1) * each.across; ++x) {
                    if (!read_dc(bits, image.codes[each.dc], to.last_dc)) return false;
                    const bool needed = y >= to.top && y < to.bottom && x >= to.left && x < to.right;
                    if (!(needed ? read_block(bits, each, to, y, x) : skip_block(bits, image.codes[each.ac]))) return false;
                }
        }
        return true;
    }

    static bool read_dc(Bits& bits, const Codes& codes, int32_t& last) {
        bits.refill();
        const Symbol symbol = codes.next(bits);
        last += Codes::value(bits, symbol);
        bits.skip(symbol.length);
        return symbol.length && last >= -32768 && last < 32768;
    }

    bool read_block(Bits& stream, const Component& component, const Samples& to, int64_t y, int64_t x) {
        const Codes& codes = image.codes[component.ac];
        const uint8_t* steps = image.quantization[component.quantization];
        Bits bits = stream;  // a copy, which stays in registers
        int32_t* coefficients = pending.coefficients + 8 * pending.count;
        coefficients[0] = to.last_dc * steps[0];
        int next = 1;
        Symbol symbol;
        do {
            bits.refill();
            symbol = codes.next(bits);
            if (!symbol.length) return false;
            next += symbol.advance;
            coefficients[ZIGZAG.place[next - 1]] = Codes::value(bits, symbol) * steps[next - 1];
            bits.skip(symbol.length);
        } while (next < 64);
        stream = bits;
        if (next > 64 && symbol.advance != END_OF_BLOCK) return false;
        if (next == 1 + END_OF_BLOCK) return write_flat_block(coefficients[0], to.block(y, x), to.row_bytes());
        pending.to[pending.count] = to.block(y, x);
        pending.row_bytes[pending.count] = to.row_bytes();
        return ++pending.count < BLOCKS || pending.write();
    }

    static bool skip_block(Bits& stream, const Codes& codes) {
        Bits bits = stream;
        for (int next = 1; next < 64;) {
            bits.refill();
            Group group = codes.groups[bits.window >> (64 - LOOK)];
            // One by one where a group would go on in the next block.
            if (!group.length || next + group.advance > (group.advance < END_OF_BLOCK ? 64 : 63 + END_OF_BLOCK)) {
                const Symbol symbol = codes.next(bits);
                group = {symbol.advance, symbol.length};
                if (!symbol.length || (symbol.advance != END_OF_BLOCK && next + symbol.advance > 64)) return false;
            }
            bits.skip(group.length);
            next += group.advance;
        }
        stream = bits;
        return true;
    }

    // Returns a row of a component at the image's resolution, from a column on.
    const uint8_t* enlarge(const Samples& of, int number, int64_t y, int64_t left, int64_t columns) {
        if (image.wide == 1) return of.row(y) + left;
        const bool halved = image.tall == 2;
        // Of the samples' rows, the one that the pixel lies in counts three times as much as the next one.
        const uint8_t* near = of.row(halved ? y / 2 : y);
        const uint8_t* far = of.row(y % 2 ? y / 2 + 1 : y / 2 - 1);
        const int64_t first = left / 2, count = (left + columns - 1) / 2 - first + 1;
        const int64_t from = std::max<int64_t>(first - 1, 0), to = std::min(first + count + 1, image.component[number].width);
        sums.resize(count + 2);
        uint16_t* sum = sums.data() + from - (first - 1);
        for (int64_t i = 0; i < to - from; ++i) sum[i] = halved ? 3 * near[from + i] + far[from + i] : near[from + i];
        // Beyond the image, its edge goes on.
        sums.front() = *sum;
        sums.back() = sum[to - from - 1];
        wide[number].resize(2 * count);
        widen(sums.data(), count, halved, wide[number].data());
        return wide[number].data() + left % 2;
    }
};

}  // namespace
}  // namespace jpeg

extern "C" {
// Decodes a box, (rows, columns, 3) of bytes in `pixels`. Sets `decoded` to 1 if that went well; otherwise another decoder
// must do it, or say what is wrong. Several threads may do so at a time.
void decode_jpeg_box(const uint8_t* data, int64_t length, const int64_t* box, uint8_t* pixels, int32_t* decoded) {
    *decoded = 0;
    try {
        jpeg::Header header(data, length);
        const int64_t top = box[0], left = box[1], rows = box[2], columns = box[3];
        if (!header.read() || top < 0 || left < 0 || rows < 1 || columns < 1) return;
        if (rows > header.height || columns > header.width || top > header.height - rows || left > header.width - columns) return;
        *decoded = jpeg::Decoder(header).decode(top, left, rows, columns, pixels);
    } catch (const std::bad_alloc&) {
        // The other decoder words it.
    }
}
}
