"""Encoded images to pixels, as a person sees them: upright, RGB, transparency over white."""

from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from io import BytesIO

import numpy as np
import torch
from PIL import Image

from funmatch.errors import InputError

# Only what is an image (Pillow would also start an interpreter for PostScript), as far as Pillow has it here.
Image.init()
FORMATS = [
    name for name in ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF", "AVIF", "JPEG2000") if name in Image.OPEN
]
EXTENSIONS = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif", ".avif", ".jp2",
}  # fmt: skip
KINDS = ("greyscale", "palette", "transparent", "CMYK", "16-bit", "turned by EXIF", "animated", "floating-point")
DECODERS = ("pillow", "torchcodec")
MAX_PIXELS = 178_956_970  # what Pillow takes for a decompression bomb

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

Image.MAX_IMAGE_PIXELS = None  # the limit is ours, see `_opened`; Pillow's would only warn up to twice its value


@dataclass(frozen=True)
class Header:
    """What an image's header says.

    Attributes:
        height, width: upright, pixels.
        kinds: what is out of the ordinary, a bit for each of `KINDS`.
    """

    height: int
    width: int
    kinds: int


def header(encoded: bytes, max_pixels: int = MAX_PIXELS) -> Header:
    """Reads an image's header alone.

    Raises:
        ValueError: it is no image, or larger than `max_pixels`.
    """
    with _opened(encoded, max_pixels) as image:
        width, height = _stored_size(image)
        turned = _orientation(image)
        mode, deep_png = image.mode, encoded[:4] == b"\x89PNG" and encoded[24] == 16
        found = (
            mode in ("1", "L", "LA", "I", "F") or mode.startswith("I;16"),
            mode in ("P", "PA"),
            mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info,
            mode == "CMYK",
            mode.startswith("I") or deep_png,
            turned in UPRIGHT,
            image.format != "MPO" and getattr(image, "n_frames", 1) > 1,
            mode == "F",
        )
    if turned in (5, 6, 7, 8):
        height, width = width, height
    return Header(height, width, sum(1 << bit for bit, true in enumerate(found) if true))


Box = tuple[int, int, int, int]
"""Top, left, height and width in pixels."""


def decode(
    encoded: bytes,
    *,
    cap: int | None = None,
    decoder: str = "pillow",
    max_pixels: int = MAX_PIXELS,
    box: Box | None = None,
) -> np.ndarray:
    """The pixels of an encoded image.

    Colours of CMYK are converted, palettes resolved, transparency laid over white, 16 bits scaled to 8, floating-point
    values up to 1 taken for 0 … 1, the first frame of an animation taken, and what EXIF says about the camera's
    position is carried out.

    Args:
        encoded: the file's bytes.
        cap: an image whose short side is longer is scaled down to it (bilinear, antialiased), pixels. A JPEG of at
            least four times as many is first decoded at 1/2, 1/4 or 1/8 of its size, which is left at least twice
            as large as needed: a few times faster, and on photographs within 1/255 on average of the slow way.
        decoder: `pillow`, or `torchcodec` for what it decodes as Pillow does, JPEGs of ordinary colours; they differ
            by at most 2/255.
        max_pixels: larger images are refused as decompression bombs.
        box: what is wanted of the (upright, scaled) image. Of a JPEG, rows below are then not decoded, so damage
            there goes unnoticed.

    Returns:
        (height, width, 3) uint8.

    Raises:
        Exception: of many kinds, if it cannot be decoded.
    """
    with _opened(encoded, max_pixels) as image:
        turn = UPRIGHT.get(_orientation(image))
        if image.format == "TIFF":
            image.load()
            turn = None  # Pillow turns these itself
        size = cap_size(image.size, cap)
        plain = image.format == "JPEG" and image.mode == "RGB" and image.size == size and turn is None
        if plain and decoder == "torchcodec":
            with suppress(RuntimeError):  # damaged, which Pillow says in clearer words
                return _inside(torchcodec_decode(encoded), box)
        if plain and box:
            return _boxed(image, box)
        if image.format == "JPEG" and min(image.size) >= 4 * min(size):
            image.draft(image.mode, (2 * size[0], 2 * size[1]))
        image.load()
        upright = _rgb(image)
    if upright.size != size:
        upright = upright.resize(size, Image.Resampling.BILINEAR)
    return _inside(np.asarray(upright if turn is None else upright.transpose(turn)), box)


def _inside(image: np.ndarray, box: Box | None) -> np.ndarray:
    if box is None:
        return image
    top, left, height, width = box
    return image[top : top + height, left : left + width]


def _boxed(image: Image.Image, box: Box) -> np.ndarray:
    """A box of an ordinary JPEG, decoded as far down as it reaches: a fifth is saved on average, and a copy."""
    top, left, height, width = box
    tiles = getattr(image, "tile", [])
    if top + height < image.height and len(tiles) == 1 and hasattr(tiles[0], "_replace"):  # else an older Pillow's
        image.tile = [tiles[0]._replace(extents=(0, 0, image.width, top + height))]  # pyrefly: ignore
        with suppress(OSError):  # libjpeg tells that rows are missing, once all that are wanted are there
            image.load()
    return np.asarray(image.crop((left, top, left + width, top + height)))


def cap_size(size: tuple[int, int], cap: int | None) -> tuple[int, int]:
    """A size scaled down so that its shorter side is at most `cap`."""
    if cap is None or min(size) <= cap:
        return size
    first, second = (max(cap, round(length * cap / min(size))) for length in size)
    return first, second


def pick_decoder(name: str) -> str:
    """The decoder that `auto` means here.

    Raises:
        InputError: it is not installed, or cannot be loaded.
    """
    if name == "pillow" or (name == "auto" and find_spec("torchcodec") is None):
        return "pillow"
    try:
        _torchcodec()
    except Exception as error:  # it looks for shared libraries while it is imported
        if name == "auto":
            return "pillow"
        raise InputError(
            f"the decoder torchcodec cannot be used here ({str(error).splitlines()[0]}); pip install torchcodec, or "
            "say --decoder pillow"
        ) from None
    return "torchcodec"


def torchcodec_decode(encoded: bytes) -> np.ndarray:
    """A JPEG by torchcodec, (height, width, 3) uint8."""
    return _torchcodec()(torch.frombuffer(bytearray(encoded), dtype=torch.uint8)).permute(1, 2, 0).numpy()


@cache
def _torchcodec():
    from torchcodec.decoders import decode_image

    return decode_image


def _opened(encoded: bytes, max_pixels: int) -> Image.Image:
    if not encoded:
        raise ValueError("the file is empty")
    try:
        image = Image.open(BytesIO(encoded), formats=FORMATS)
    except Image.UnidentifiedImageError:
        raise ValueError("not an image") from None
    width, height = image.size
    if width * height > max_pixels:
        raise ValueError(f"{width:,} × {height:,} pixels are more than --max-pixels {max_pixels:,}")
    return image


def _stored_size(image: Image.Image) -> tuple[int, int]:
    """Width and height before EXIF's turn: Pillow's versions differ in whether a TIFF's size is that."""
    tags = getattr(image, "tag_v2", None)
    return (tags[256], tags[257]) if image.format == "TIFF" and tags else image.size


def _orientation(image: Image.Image) -> int:
    """EXIF's word on how the camera was held, 1 where there is none or it cannot be read."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # else Pillow would decode the whole image in search of one
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged EXIF is common, and no reason to lose an image
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        bright = np.nan_to_num(np.asarray(image, np.float64))
        image = Image.fromarray((bright * (255 if bright.max() <= 1 else 1)).clip(0, 255).astype(np.uint8))
    if image.mode.startswith("I"):
        deep = np.asarray(image)
        image = Image.fromarray((deep.clip(0, 65535) // 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
