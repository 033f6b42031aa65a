"""Decodes images into the pixels that a viewer would show: upright, RGB, transparency over white."""

from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image

from funmatch.data.jpeg import Box, crop, decode_by_kernel, decode_plain
from funmatch.data.limits import DEFAULT_LIMITS, Limits, check_memory, decoding

# Only real image formats: Pillow would also start an interpreter for PostScript. Some builds of Pillow lack a few.
Image.init()
FORMATS = [
    name for name in ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF", "AVIF", "JPEG2000") if name in Image.OPEN
]
EXTENSIONS = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif", ".avif", ".jp2",
}  # fmt: skip
# Stored scans hold one bit for each, in this order: a new kind goes to the end.
KINDS = ("greyscale", "palette", "transparent", "CMYK", "16-bit", "turned by EXIF", "animated", "floating-point")
CONTENTS = {
    b"version https://git-lfs": "a pointer of Git LFS (git lfs pull)",
    b"<!doctype html": "a web page", b"<html": "a web page", b"<svg": "an SVG", b"<?xml": "XML", b"%pdf": "a PDF",
    b"pk\x03\x04": "a zip file", b"ftyphei": "HEIC, which must be converted first",
    b"ftypmif1": "HEIC, which must be converted first", b"ftyp": "a video",
}  # fmt: skip
"""What files are by their first bytes in lower case, or by those from the fifth on."""

ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# The limit is ours, see `Limits`: Pillow's would only warn up to twice its value.
Image.MAX_IMAGE_PIXELS = None


@dataclass(frozen=True)
class Header:
    """Size and properties of an image, from its header alone.

    Attributes:
        height, width: of the upright image, pixels.
        kinds: unusual properties, one bit for each of `KINDS`.
    """

    height: int
    width: int
    kinds: int


def header(encoded: bytes, limits: Limits = DEFAULT_LIMITS) -> Header:
    """Reads the header of an image without decoding its pixels.

    Raises:
        ValueError: it is not an image, or beyond the limits.
    """
    with _open_image(encoded, limits) as image:
        width, height = _stored_size(image)
        orientation = _orientation(image)
        # Pillow reads 16-bit RGB PNGs as 8-bit, so the bit depth comes from the file itself (byte 24, in IHDR).
        mode, deep_png = image.mode, encoded[:4] == b"\x89PNG" and encoded[24] == 16
        flags = (
            mode in ("1", "L", "LA", "I", "F") or mode.startswith("I;16"),
            mode in ("P", "PA"),
            mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info,
            mode == "CMYK",
            mode.startswith("I") or deep_png,
            orientation in UPRIGHT,
            # MPO is a JPEG with further pictures, such as a depth map: one photograph, not an animation.
            image.format != "MPO" and getattr(image, "n_frames", 1) > 1,
            mode == "F",
        )
    if orientation in (5, 6, 7, 8):
        height, width = width, height
    return Header(height, width, sum(1 << bit for bit, flag in enumerate(flags) if flag))


def decode(
    encoded: bytes,
    *,
    cap: int | None = None,
    decoder: str = "pillow",
    limits: Limits = DEFAULT_LIMITS,
    box: Box | None = None,
) -> np.ndarray:
    """Decodes an image.

    CMYK and palettes become RGB, transparency is composited over white, 16 bits are scaled to 8, floating-point images
    with values up to 1 are read as 0 … 1, animations give their first frame, and EXIF's rotation is applied.

    Args:
        encoded: the file's bytes.
        cap: longest short side, pixels; larger images are scaled down to it (bilinear, antialiased). A JPEG of at
            least four times this size is first decoded at 1/2, 1/4 or 1/8, which leaves it at least twice as large as
            needed: a few times faster, and on photographs within 1/255 on average of a full decode.
        decoder: `pillow`, or `torchcodec` for RGB JPEGs, where the two differ by at most 2/255.
        limits: images beyond them are rejected; large ones are decoded one at a time.
        box: part of the (upright, scaled) image to return. Rows of a JPEG below it are not decoded, so damage there
            goes unnoticed.

    Returns:
        (height, width, 3) uint8.

    Raises:
        OutOfMemory: there is too little memory.
        Exception: it cannot be decoded; decoders raise many types.
    """
    with _open_image(encoded, limits) as image, decoding(image.size):
        turn = UPRIGHT.get(_orientation(image))
        if image.format == "TIFF":
            image.load()
            turn = None  # Pillow has already rotated a TIFF while loading it
        size = cap_size(image.size, cap)
        if image.format == "JPEG":
            if image.size == size and turn is None:
                pixels = decode_plain(encoded, image, decoder, box)
                if pixels is not None:
                    return pixels
            elif min(image.size) >= 4 * min(size):
                image.draft(image.mode, (2 * size[0], 2 * size[1]))
            else:
                pixels = decode_by_kernel(encoded, image)
                if pixels is not None:
                    return crop(_pixels(Image.fromarray(pixels), size, turn), box)
        return crop(_pixels(image, size, turn), box)


def decode_opened(image: Image.Image, cap: int | None = None) -> np.ndarray:
    """Returns the pixels of an image that Pillow has opened or made, as `decode` gives them, (height, width, 3) uint8.

    Args:
        image: stays as it is.
        cap: longest short side, pixels.
    """
    image.load()
    # Pillow has already rotated a TIFF while loading it.
    turn = None if image.format == "TIFF" else UPRIGHT.get(_orientation(image))
    return _pixels(image, cap_size(image.size, cap), turn)


def _pixels(image: Image.Image, size: tuple[int, int], turn: Image.Transpose | None) -> np.ndarray:
    """Returns the pixels of an image in RGB, scaled to a size (before it is turned), and turned."""
    check_memory(image.size)
    image.load()
    upright = _rgb(image)
    if upright.size != size:
        upright = upright.resize(size, Image.Resampling.BILINEAR)
    # Resize before rotating: the caps were computed for the stored size, and fewer pixels move.
    return np.asarray(upright if turn is None else upright.transpose(turn))


def cap_size(size: tuple[int, int], cap: int | None) -> tuple[int, int]:
    """Scales a size down so that its shorter side is at most `cap`."""
    if cap is None or min(size) <= cap:
        return size
    first, second = (max(cap, round(length * cap / min(size))) for length in size)
    return first, second


def _open_image(encoded: bytes, limits: Limits) -> Image.Image:
    if not encoded:
        raise ValueError("the file is empty")
    try:
        image = Image.open(BytesIO(encoded), formats=FORMATS)
    except Image.UnidentifiedImageError:
        raise ValueError("not an image" + _content(encoded)) from None
    limits.check(encoded, image.format, image.size)
    return image


def value_range(encoded: bytes) -> tuple[float, float]:
    """Returns the smallest and the largest stored value of an image of more than 8 bits, NaN and infinity left out."""
    with _open_image(encoded, DEFAULT_LIMITS) as image, decoding(image.size):
        # Pillow keeps the upper 8 of 16 bits of a colour PNG.
        scale = 1 if image.mode == "F" or image.mode.startswith("I") else 257
        values = np.asarray(image, np.float64)
    values = values[np.isfinite(values)] * scale
    return (float(values.min()), float(values.max())) if len(values) else (0.0, 0.0)


def _content(encoded: bytes) -> str:
    """Returns what a file that is not an image is by its first bytes, as a clause; empty where they do not tell."""
    start = encoded[:64].lstrip().lower()
    found = next((kind for mark, kind in CONTENTS.items() if start.startswith(mark) or start[4:].startswith(mark)), "")
    return f" but {found}" if found else ""


def _stored_size(image: Image.Image) -> tuple[int, int]:
    """Returns width and height before EXIF's rotation."""
    # Versions of Pillow differ in whether `size` of a TIFF is already rotated; its tags never are.
    tags = getattr(image, "tag_v2", None)
    return (tags[256], tags[257]) if image.format == "TIFF" and tags else image.size


def _orientation(image: Image.Image) -> int:
    """Returns EXIF's orientation, 1 where it is missing or unreadable."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # otherwise Pillow would decode the whole image in search of EXIF
    try:
        return image.getexif().get(ORIENTATION, 1)
    except MemoryError:  # the image would be stored unturned, for good
        raise
    except Exception:  # damaged EXIF is common, and not a reason to lose the image
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    """Converts an image of any mode to RGB."""
    # Pillow's own `convert` clips 16-bit and floating-point values at 255 instead of scaling them.
    if image.mode == "F":
        # NaN and infinity would become arbitrary bytes.
        bright = np.nan_to_num(np.asarray(image, np.float64))
        image = Image.fromarray((bright * (255 if bright.max() <= 1 else 1)).clip(0, 255).astype(np.uint8))
    if image.mode.startswith("I"):
        deep = np.asarray(image)
        # 65535 is 257 · 255: the darkest and the brightest value stay so.
        image = Image.fromarray((deep.clip(0, 65535) // 257).astype(np.uint8))
    # Palettes and plain colours can be transparent too, which only `info` says.
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
