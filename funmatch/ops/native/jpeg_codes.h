// Reads the Huffman codes of baseline JPEGs, by tables of the bits that come next.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace jpeg {
namespace {

constexpr int LOOK = 11;           // bits that a look-up takes; more would crowd the processor's nearest cache
constexpr int END_OF_BLOCK = 128;  // `advance` where no coefficient follows in a block

// Bits from the top of a window. Memory is read up to eight bytes beyond what was asked for.
struct Bits {
    const uint8_t* at;
    uint64_t window = 0;
    int count = 0;

    // Makes at least 56 bits ready. What lies below `count` in the window are the true next bits, which are read again.
    void refill() {
        uint64_t next = 0;
        for (int i = 0; i < 8; ++i) next = next << 8 | at[i];
        window |= next >> count;
        at += (63 - count) >> 3;
        count |= 56;
    }
    void skip(int length) {
        window <<= length;
        count -= length;
    }
    // Where the next bit lies, rounded up to whole bytes: those that are partly read count as read.
    const uint8_t* position() const { return at - count / 8; }
};

// A code: of a coefficient, and of zeros before it. Its value follows, whose bits count as its own.
struct alignas(4) Symbol {
    uint8_t advance;  // places in the block, the coefficient's own included
    uint8_t length;   // bits, at most 31; 0 of what is no code
    uint8_t code;     // bits of the code itself
    uint8_t rest;     // 63 less the bits of the value
};

// Several symbols that lie in one look-up, for blocks whose coefficients are not needed.
struct alignas(2) Group {
    uint8_t advance, length;
};

class Codes {
public:
    Group groups[1 << LOOK];

    // Makes the tables of a definition: 16 counts of codes by length, then the codes' names. Returns whether it is valid.
    bool define(const uint8_t* counts, const uint8_t* codes, int total, bool of_dc) {
        // Most images have the tables of the one before them, or even those of the standard.
        if (total == known && of_dc == dc && !std::memcmp(counts, lengths, 16) && !std::memcmp(codes, names, total)) return true;
        known = -1;
        dc = of_dc;
        std::memcpy(lengths, counts, 16);
        std::memcpy(names, codes, total);
        std::memset(symbols, 0, sizeof symbols);
        int code = 0, first = 0;
        for (int length = 1; length <= 16; ++length) {
            const int number = counts[length - 1], spare = LOOK - length;
            // The code of all ones stays unused, so that what fills the last byte is no code.
            if (number && code + number >= 1 << length) return false;
            offset[length] = first - code;
            limit[length] = number ? (code + number) << (16 - length) : 0;
            for (int i = 0; i < number; ++i, ++code, ++first) {
                if (dc && names[first] > 15) return false;
                // Wherever the code begins a look-up.
                if (spare >= 0) std::fill_n(symbols + (code << spare), 1 << spare, make(names[first], length));
            }
            code <<= 1;
        }
        for (uint32_t bits = 0; !dc && bits < 1 << LOOK; ++bits) groups[bits] = group(bits);
        known = total;
        return true;
    }

    // Reads the next symbol; 32 bits must be ready.
    Symbol next(const Bits& bits) const {
        const Symbol symbol = symbols[bits.window >> (64 - LOOK)];
        return __builtin_expect(symbol.length != 0, 1) ? symbol : search(static_cast<int32_t>(bits.window >> 48));
    }

    // Returns the value of the next symbol: those that begin with 0 are negative. Without branches, as nobody can tell
    // which sign is next.
    static int32_t value(const Bits& bits, const Symbol of) {
        const uint64_t from = bits.window << of.code;
        const uint64_t flip = (from >> 63) - 1;
        // In two shifts, since values of no bits would need one by 64.
        const uint64_t size = (from ^ flip) >> 1 >> of.rest;
        return static_cast<int32_t>((size ^ flip) - flip);
    }

private:
    Symbol symbols[1 << LOOK];
    bool dc = false;
    int known = -1;
    uint8_t lengths[16], names[256];
    int32_t limit[17], offset[17];

    Symbol make(int name, int length) const {
        const int size = name & 15, run = name >> 4;
        // As in libjpeg, any run without a value ends the block, except of 16 zeros.
        const bool ends = !dc && size == 0 && run != 15;
        return {static_cast<uint8_t>(ends ? END_OF_BLOCK : run + 1), static_cast<uint8_t>(length + size), static_cast<uint8_t>(length), static_cast<uint8_t>(63 - size)};
    }

    // Joins the symbols whose codes lie in a look-up, up to the end of a block. The last one's value may go on beyond it.
    Group group(uint32_t bits) const {
        int advance = 0, length = 0;
        while (advance < END_OF_BLOCK && length < LOOK) {
            const Symbol next = symbols[(bits << length) & ((1 << LOOK) - 1)];
            // Codes are known by their beginning, so that the bits must all be there. What does not fit into a block is an
            // error, which is told elsewhere.
            if (!next.length || length + next.code > LOOK) break;
            if (next.advance != END_OF_BLOCK && advance + next.advance > 64) break;
            advance += next.advance;
            length += next.length;
        }
        return {static_cast<uint8_t>(advance), static_cast<uint8_t>(length)};
    }

    // Finds a code that is longer than a look-up.
    Symbol search(int32_t bits) const {
        for (int length = LOOK + 1; length <= 16; ++length)
            if (bits < limit[length]) return make(names[(bits >> (16 - length)) + offset[length]], length);
        return {0, 0, 0, 0};
    }
};

}  // namespace
}  // namespace jpeg
