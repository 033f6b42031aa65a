// Reads the headers of baseline JPEGs, of the ordinary kind only.

#pragma once

#include <cstdint>
#include <cstring>
#include <memory>

#include "jpeg_codes.h"

namespace jpeg {
namespace {

// One of brightness and two differences of colour.
struct Component {
    int id = 0, across = 1, down = 1;  // blocks in a minimum coded unit
    int quantization = 0, dc = 0, ac = 0;
    int64_t width = 0, height = 0;  // samples
};

class Header {
public:
    int64_t width = 0, height = 0, restart = 0;
    int components = 0, wide = 1, tall = 1;  // pixels that a sample of colour stands for, across and down
    Component component[3];
    // Longer than a block, see `Zigzag`.
    uint8_t quantization[4][64 + END_OF_BLOCK] = {};
    const Codes* codes = tables();
    const uint8_t *at, *end;

    Header(const uint8_t* data, int64_t length) : at(data), end(data + length) {}

    // Reads everything up to the codes, where `at` is then. Returns whether the image is of the ordinary kind.
    bool read() {
        if (end - at < 4 || at[0] != 0xFF || at[1] != 0xD8) return false;
        at += 2;
        while (end - at >= 4 && at[0] == 0xFF) {
            const int marker = at[1], length = at[2] << 8 | at[3];
            if (length < 2 || length > end - at - 2) return false;
            const uint8_t* body = at + 4;
            at += 2 + length;
            if (marker == 0xDA) return read_scan(body, length - 2) && complete();
            if (!read_segment(marker, body, length - 2)) return false;
        }
        return false;
    }

private:
    unsigned codes_defined = 0, quantizations_defined = 0;
    int adobe = -1;
    bool jfif = false;

    // Tables of this thread, which are kept from image to image: of direct coefficients, then of the others.
    static Codes* tables() {
        static thread_local std::unique_ptr<Codes[]> kept(new Codes[4]);
        return kept.get();
    }

    bool read_segment(int marker, const uint8_t* body, int length) {
        if (marker == 0xC0 || marker == 0xC1) return read_frame(body, length);
        if (marker == 0xC4) return read_codes(body, length);
        if (marker == 0xDB) return read_quantization(body, length);
        if (marker == 0xDD) {
            restart = length == 2 ? body[0] << 8 | body[1] : -1;
            return restart >= 0;
        }
        if (marker == 0xE0 && length >= 14 && !std::memcmp(body, "JFIF", 5)) jfif = true;
        if (marker == 0xEE && length >= 12 && !std::memcmp(body, "Adobe", 5)) adobe = body[11];
        return (marker >= 0xE0 && marker <= 0xEF) || marker == 0xFE;
    }

    bool read_frame(const uint8_t* body, int length) {
        if (components || length < 6 || body[0] != 8) return false;
        height = body[1] << 8 | body[2];
        width = body[3] << 8 | body[4];
        components = body[5];
        if (!height || !width || (components != 1 && components != 3) || length != 6 + 3 * components) return false;
        for (int i = 0; i < components; ++i) {
            const uint8_t* from = body + 6 + 3 * i;
            int layout = from[1];
            // Differences of colour have the resolution of brightness, or half of it across, or half of it both ways.
            const bool halved = i == 0 && (layout == 0x21 || layout == 0x22);
            if ((layout != 0x11 && !halved) || from[2] > 3) return false;
            // Brightness alone lies in single blocks, whatever its layout.
            if (components == 1) layout = 0x11;
            if (i == 0) wide = layout >> 4, tall = layout & 15;
            Component& each = component[i];
            each.id = from[0];
            each.across = layout >> 4;
            each.down = layout & 15;
            each.quantization = from[2];
            each.width = i ? (width + wide - 1) / wide : width;
            each.height = i ? (height + tall - 1) / tall : height;
            // libjpeg enlarges so narrow ones in another way.
            if (i && wide == 2 && each.width <= 2) return false;
        }
        return true;
    }

    bool read_codes(const uint8_t* body, int length) {
        while (length >= 17) {
            const int kind = body[0] >> 4, number = body[0] & 15;
            int total = 0;
            for (int i = 1; i <= 16; ++i) total += body[i];
            if (kind > 1 || number > 1 || total > 256 || length < 17 + total) return false;
            if (!tables()[2 * kind + number].define(body + 1, body + 17, total, kind == 0)) return false;
            codes_defined |= 1u << (2 * kind + number);
            body += 17 + total;
            length -= 17 + total;
        }
        return length == 0;
    }

    bool read_quantization(const uint8_t* body, int length) {
        for (; length >= 65; body += 65, length -= 65) {
            if (body[0] > 3) return false;  // another number, or values of 16 bits
            std::memcpy(quantization[body[0]], body + 1, 64);
            quantizations_defined |= 1u << body[0];
        }
        return length == 0;
    }

    bool read_scan(const uint8_t* body, int length) {
        if (!components || length != 4 + 2 * components || body[0] != components) return false;
        for (int i = 0; i < components; ++i) {
            const uint8_t* from = body + 1 + 2 * i;
            component[i].dc = from[1] >> 4;
            component[i].ac = 2 + (from[1] & 15);
            if (from[0] != component[i].id || component[i].dc > 1 || component[i].ac > 3) return false;
        }
        const uint8_t* rest = body + 1 + 2 * components;
        return rest[0] == 0 && rest[1] == 63 && rest[2] == 0;
    }

    // Returns whether all tables are there, and the components are brightness and differences of colour for sure.
    bool complete() const {
        for (int i = 0; i < components; ++i) {
            const unsigned wanted = 1u << component[i].dc | 1u << component[i].ac;
            if ((codes_defined & wanted) != wanted || !(quantizations_defined >> component[i].quantization & 1)) return false;
        }
        const bool numbered = component[0].id == 1 && component[1].id == 2 && component[2].id == 3;
        return components == 1 || adobe == 1 || (adobe < 0 && (jfif || numbered));
    }
};

}  // namespace
}  // namespace jpeg
