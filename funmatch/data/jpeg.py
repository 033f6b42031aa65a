"""Decodes JPEGs by whatever is quickest: a native kernel, torchcodec or Pillow.

The kernel reads ordinary JPEGs, computes nothing outside of a box, and refuses all others; those are for the decoder
that it stands in for. It is compared with that decoder before it is used, so that it changes no pixel.
"""

import ctypes
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from io import BytesIO

import numpy as np
from PIL import Image

from funmatch.data.limits import check_memory, has_memory
from funmatch.errors import InputError, first_line, is_out_of_memory
from funmatch.ops.native import library

DECODERS = ("pillow", "torchcodec")
Box = tuple[int, int, int, int]
"""Top, left, height and width in pixels."""


def decode_plain(encoded: bytes, image: Image.Image, decoder: str, box: Box | None) -> np.ndarray | None:
    """Decodes a JPEG that is neither scaled nor turned, or a box of it; None where Pillow must do it as any image.

    Args:
        encoded: the file's bytes.
        image: as Pillow has opened it.
        decoder: one of `DECODERS`.
        box: part to decode; None for all of it.
    """
    pixels = decode_by_kernel(encoded, image, decoder, box)
    # Where the kernel does not read an image, or finds it damaged, all goes on as without it.
    if pixels is not None or image.mode != "RGB":
        return pixels
    if decoder == "torchcodec":
        # Damaged files fall through to Pillow, whose error message is clearer.
        try:
            return crop(torchcodec_decode(encoded), box)
        except RuntimeError as error:
            # Without memory Pillow could succeed, with slightly other pixels.
            if is_out_of_memory(error):
                raise
    return pillow_rows(image, box) if box else None


def decode_by_kernel(
    encoded: bytes, image: Image.Image, decoder: str = "pillow", box: Box | None = None
) -> np.ndarray | None:
    """Decodes a JPEG, or a box of it, by the native kernel, as `decode_plain`; None if it does not read it."""
    # Decoders differ in what they make of greyscale, which is always Pillow's.
    if not _kernel_stands_in(decoder if image.mode == "RGB" else "pillow", image.mode):
        return None
    if box is None:
        check_memory(image.size)
    return kernel_decode(encoded, box or (0, 0, image.height, image.width))


def kernel_decode(encoded: bytes, box: Box) -> np.ndarray | None:
    """Decodes a box of a JPEG by the native kernel, (height, width, 3) uint8; None if the kernel does not read it."""
    corner = np.array(box, np.int64)
    pixels = np.empty((*box[2:], 3), np.uint8)
    decoded = ctypes.c_int32()
    pointers = corner.ctypes.data, pixels.ctypes.data, ctypes.byref(decoded)
    library.load_library().decode_jpeg_box(encoded, len(encoded), *pointers)
    return pixels if decoded.value else None


def crop(image: np.ndarray, box: Box | None) -> np.ndarray:
    """Returns a box of an image, or the image."""
    if box is None:
        return image
    top, left, height, width = box
    return image[top : top + height, left : left + width]


def pillow_decode(encoded: bytes) -> np.ndarray:
    """Decodes an image with Pillow to (height, width, 3) uint8."""
    with Image.open(BytesIO(encoded)) as image:
        return np.asarray(image.convert("RGB"))


def pillow_rows(image: Image.Image, box: Box) -> np.ndarray:
    """Decodes an RGB JPEG down to the last row of a box, which saves a fifth of the time on average, and a copy."""
    top, left, height, width = box
    tiles = getattr(image, "tile", [])
    # Older versions of Pillow have plain tuples here; they decode the whole image below.
    if top + height < image.height and len(tiles) == 1 and hasattr(tiles[0], "_replace"):
        image.tile = [tiles[0]._replace(extents=(0, 0, image.width, top + height))]  # pyrefly: ignore
        # libjpeg complains about the rows that we left out, after all the rows of the box are there.
        try:
            image.load()
        except OSError:
            # Without memory it complains in the same words, and the rows of the box are not there.
            if not has_memory(image.width * image.height):
                raise
    return np.asarray(image.crop((left, top, left + width, top + height)))


def pick_decoder(name: str) -> str:
    """Resolves `auto` to a decoder, and checks that the requested one works.

    Raises:
        InputError: the decoder is not installed, or cannot be loaded.
    """
    if name == "pillow" or (name == "auto" and find_spec("torchcodec") is None):
        return "pillow"
    try:
        _torchcodec()
    except Exception as error:  # importing it loads FFmpeg's shared libraries, which fails in many ways
        if name == "auto":
            return "pillow"
        raise InputError(
            f"the decoder torchcodec is unavailable ({str(error).splitlines()[0]}); pip install torchcodec, or pass "
            "--decoder pillow"
        ) from None
    return "torchcodec"


def torchcodec_decode(encoded: bytes) -> np.ndarray:
    """Decodes a JPEG with torchcodec to (height, width, 3) uint8."""
    # Here, since this module also tells what an image is, and that must not wait for torch.
    import torch

    # A copy, since torch warns about memory that it must not write to.
    return _torchcodec()(torch.frombuffer(bytearray(encoded), dtype=torch.uint8)).permute(1, 2, 0).numpy()


@cache
def _torchcodec():
    # Here, since it is optional and loads FFmpeg.
    from torchcodec.decoders import decode_image

    return decode_image


@cache
def _kernel_stands_in(decoder: str, mode: str) -> bool:
    """Returns whether the native kernel decodes JPEGs of a mode of Pillow's with the pixels of a decoder."""
    decode = torchcodec_decode if decoder == "torchcodec" else pillow_decode
    return mode in ("RGB", "L") and not why_unavailable(decode, mode)


def why_unavailable(decode: Callable[[bytes], np.ndarray], mode: str) -> str:
    """Returns why the kernel cannot stand in for a decoder of whole JPEGs; an empty string if it can.

    Args:
        decode: the decoder.
        mode: Pillow's name of the images' kind, RGB or L.
    """
    if why := library.why_unavailable():
        return why
    try:
        agrees = all(map(partial(_agrees, decode), _examples(mode)))
    except Exception as error:  # decoders raise many types, and this one must not end what the other can do
        return first_line(error)
    return "" if agrees else "the decoder computes other pixels"


@cache
def _examples(mode: str) -> list[bytes]:
    """Returns JPEGs of all sorts that the kernel reads, of noise, which shows every difference."""
    noise = np.random.Generator(np.random.Philox(0)).random((57, 83, 3))
    image = Image.fromarray((noise * 256).astype(np.uint8)).convert(mode)
    options = [{"subsampling": number} for number in range(3)]
    options += [{"quality": 97, "optimize": True}, {"quality": 30, "restart_marker_rows": 1}]

    def encode(**options) -> bytes:
        file = BytesIO()
        image.save(file, "JPEG", **options)
        return file.getvalue()

    return [encode(**each) for each in options]


def _agrees(decode: Callable[[bytes], np.ndarray], encoded: bytes) -> bool:
    """Compares boxes at each edge of an image, and inside, with what a decoder gives there."""
    whole = decode(encoded)
    for top, left, height, width in ((0, 0, 57, 83), (0, 21, 9, 30), (23, 17, 25, 39), (40, 60, 17, 23)):
        box = kernel_decode(encoded, (top, left, height, width))
        if box is None or not np.array_equal(box, whole[top : top + height, left : left + width]):
            return False
    return True
