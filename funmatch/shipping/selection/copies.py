"""Finds near copies of images: the same picture in another size, encoding or brightness, mirrored, or cut a little."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from PIL import Image

LOW = 8  # frequencies in each direction that a code has the signs of
CODE_SIDE, VIEW_SIDE = 32, 24  # pixels of the grey thumbnails that codes and likeness are of
KEPT = (0.97, 0.94, 0.9)
"""Sides of the windows of an image that are compared with another image whole, relative to its own."""
BITS = 8
"""By how many of 64 bits the codes of images may differ that are compared at all."""
COMPARED = 3
"""Images of near codes that are compared, the nearest first."""
FLAT = 1e-3  # contrast, of 0 … 255, below which an image has no structure
_FREQUENCIES = np.cos(np.pi * np.outer(np.arange(LOW), np.arange(CODE_SIDE) + 0.5) / CODE_SIDE)
_MIRROR = np.where(np.arange(LOW) % 2, -1.0, 1.0)
_SET_BITS = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)

Window = tuple[float, float, float]
"""Top, left and side of a part of an image, in shares of its sides."""
WHOLE: Window = (0.0, 0.0, 1.0)
WINDOWS = (WHOLE, *((y, x, kept) for kept in KEPT for y in (0, (1 - kept) / 2, 1 - kept)
                    for x in (0, (1 - kept) / 2, 1 - kept)))  # fmt: skip


def code(pixels: np.ndarray) -> int:
    """Returns the code of an image, of 64 bits.

    It has a bit for each of the 63 lowest frequencies (of a discrete cosine transform) of the image in 32 × 32 grey
    pixels: whether it is above their median. Resizing and encoding change few of them.

    Args:
        pixels: (height, width, 3) uint8.
    """
    return int(_codes_of(pixels, [WHOLE])[0])


def codes_of_windows(pixels: np.ndarray) -> np.ndarray:
    """Returns the codes of an image, of windows of it, and of the mirror images of all of them, (n,) uint64.

    So an image that is cut out of this one, or is this one shifted by a few percent, has a code near one of them.
    """
    return _codes_of(pixels, WINDOWS)


def _codes_of(pixels: np.ndarray, windows: Sequence[Window]) -> np.ndarray:
    """Returns the code of each window, and then of the mirror image of each."""
    # Means over areas: filters with negative lobes ring at edges, by an amount that the size decides.
    thumbnails = _thumbnails(pixels, windows, CODE_SIDE, Image.Resampling.BOX)
    frequencies = _FREQUENCIES @ thumbnails @ _FREQUENCIES.T
    # A mirror image has the odd frequencies with the other sign.
    both = np.concatenate([frequencies, frequencies * _MIRROR]).reshape(-1, LOW * LOW)
    # Without the mean, which is the brightness.
    low = both[:, 1:]
    flat = np.tile(thumbnails.std((1, 2)) < FLAT, 2)
    bits = (low > np.median(low, 1, keepdims=True)) & ~flat[:, None]
    return np.packbits(np.pad(bits, ((0, 0), (1, 0))), 1).view(np.uint64).reshape(-1)


def _thumbnails(pixels: np.ndarray, windows: Sequence[Window], side: int, resample: Image.Resampling) -> np.ndarray:
    """Returns windows of an image in grey, (n, side, side) float64."""
    grey = Image.fromarray(pixels).convert("L")
    width, height = grey.size
    boxes = [(x * width, y * height, (x + kept) * width, (y + kept) * height) for y, x, kept in windows]
    return np.stack([np.asarray(grey.resize((side, side), resample, box=box), np.float64) for box in boxes])


def views_of(pixels: np.ndarray) -> np.ndarray:
    """Returns what `likeness` compares: an image and windows of it, mirrored too: (n, d) float32, mean 0, length 1."""
    views = _thumbnails(pixels, WINDOWS, VIEW_SIDE, Image.Resampling.BILINEAR)
    rows = np.concatenate([views, views[:, :, ::-1]]).reshape(2 * len(WINDOWS), -1)
    rows -= rows.mean(1, keepdims=True)
    return (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)).astype(np.float32)


def likeness(one: np.ndarray, other: np.ndarray) -> float:
    """Returns how alike two images are: the largest correlation of one of them with a window of the other.

    Args:
        one, other: of `views_of`.
    """
    return float(max((other @ one[0]).max(), (one @ other[0]).max()))


class CopyIndex:
    """Codes in which near ones are found without comparing all.

    Args:
        known: (n,) uint64.
        images: number of the image of each, (n,).
    """

    def __init__(self, known: np.ndarray, images: np.ndarray) -> None:
        self.known, self.images = known, images
        # Of codes that differ in so many bits, at least one of one part more is equal.
        edges = np.linspace(0, 64, BITS + 2).astype(int)
        self.parts = []
        for low, high in pairwise(edges.tolist()):
            mask = np.uint64((1 << (high - low)) - 1)
            values = known >> np.uint64(low) & mask
            order = np.argsort(values, kind="stable")
            self.parts.append((np.uint64(low), mask, values[order], order))

    def near(self, own: np.uint64) -> Iterator[int]:
        """Yields the numbers of the images that have a near code, the nearest first."""
        found = []
        for low, mask, values, order in self.parts:
            part = own >> low & mask
            found.append(order[np.searchsorted(values, part, "left") : np.searchsorted(values, part, "right")])
        places = np.unique(np.concatenate(found))
        return nearest_images(self.known[places], self.images[places], own)


def nearest_images(known: np.ndarray, images: np.ndarray, own: np.uint64) -> Iterator[int]:
    """Yields the numbers of the images, `COMPARED` at most, whose codes are near one, the nearest first.

    Args:
        known: codes, (n,) uint64.
        images: number of the image of each, (n,).
        own: the code.
    """
    differing = _SET_BITS[(known ^ own).reshape(-1, 1).view(np.uint8)].sum(1, dtype=np.int64)
    near = np.flatnonzero(differing <= BITS)
    ordered = images[near[np.argsort(differing[near], kind="stable")]]
    yield from list(dict.fromkeys(ordered.tolist()))[:COMPARED]
