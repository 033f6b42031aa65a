"""Two ways to an image's pixels: resident, decoded once and mapped; or streaming, encoded and decoded when asked for.

Both give the same pixels, and neither lets a process grow with the number of images.
"""

import mmap
import os
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from funmatch.data.decode import MAX_PIXELS, Box, decode
from funmatch.errors import InputError

INDEX = np.dtype(
    [("offset", "<i8"), ("length", "<i4"), ("height", "<i4"), ("width", "<i4"), ("label", "<i4"), ("crc", "<u4")]
)
"""Where an image lies in its split's file, the size that views see, its label, and a CRC-32 of its bytes there."""

Row = tuple[int, int, int, int, int, int]
"""A row of `INDEX`."""

FORGET_AFTER = 32 << 20  # bytes
AROUND = 128 << 10  # bytes: the system maps so much around what is looked at
SMALL = 64 * 64  # pixels of an image that is decoded whole even if a box is wanted


class Store(Protocol):
    """The images of a split."""

    decodes: ClassVar[bool]
    """Whether every look costs a decoding."""

    def image(self, row: Row, box: Box | None = None) -> Tensor:
        """(height, width, 3) uint8 of an image, or of a box of it."""
        ...


class Resident:
    """Decoded images in one mapped file. Processes share what is read of it.

    What was looked at is given back to the system every 32 MB: it stays in the system's cache, but the process does
    not seem to grow to the size of its data.
    """

    decodes: ClassVar[bool] = False

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as file:
            # Copy on write, because torch warns about read-only memory; nothing ever writes there.
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.pixels = torch.frombuffer(self.map, dtype=torch.uint8)
        self.seen = 0

    def image(self, row: Row, box: Box | None = None) -> Tensor:
        """A view of the mapped file."""
        offset, length, height, width, *_ = row
        self.seen += length + AROUND
        if self.seen > FORGET_AFTER:
            self.seen = 0
            self.map.madvise(mmap.MADV_DONTNEED)
        image = self.pixels[offset : offset + length].view(height, width, 3)
        if box is None:
            return image
        top, left, height, width = box
        return image[top : top + height, left : left + width]


@dataclass(frozen=True)
class Streaming:
    """Encoded images in one file, decoded when asked for.

    Attributes:
        path: of the file.
        cap: images with a longer short side are scaled down to it, as resident ones are.
        decoder: of `decode.DECODERS`.
        max_pixels: larger images are refused.
    """

    path: Path
    cap: int
    decoder: str
    max_pixels: int = MAX_PIXELS
    decodes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "file", os.open(self.path, os.O_RDONLY))

    def __del__(self) -> None:
        if (file := getattr(self, "file", None)) is not None:
            os.close(file)

    def image(self, row: Row, box: Box | None = None) -> Tensor:
        """Decoded now.

        Raises:
            InputError: the file is no longer what was written.
        """
        offset, length, _, _, _, crc = row
        encoded = os.pread(self.file, length, offset)
        if zlib.crc32(encoded) != crc:
            raise InputError(f"{self.path} is damaged; `funmatch prepare` with the same words makes it again")
        pixels = decode(encoded, cap=self.cap, decoder=self.decoder, max_pixels=self.max_pixels, box=box)
        if not pixels.flags.writeable:
            pixels = pixels.copy()  # torch warns about read-only memory
        return torch.from_numpy(pixels)


@dataclass(frozen=True)
class CachedSplit:
    """The images of one split.

    Attributes:
        name: train, val or test.
        index: a row of `INDEX` for each image, mapped.
        store: where the pixels come from.
        digests: of the encoded images, (n,) of 16 bytes, mapped.
    """

    name: str
    index: np.ndarray
    store: Store
    digests: np.ndarray

    def __len__(self) -> int:
        return len(self.index)

    @property
    def labelled(self) -> bool:
        return bool((self.index["label"] >= 0).all())

    def images(self, indices) -> list[Tensor]:
        """Each (height, width, 3) uint8."""
        return [self.store.image(row) for row in self.index[indices].tolist()]

    def read_boxes(self, indices, boxes: np.ndarray) -> tuple[list[Tensor], np.ndarray]:
        """What is needed of images for these boxes, and the boxes in it: of large ones no more is decoded.

        Args:
            boxes: (n, 4) top, left, height, width, pixels.
        """
        rows = self.index[indices].tolist()
        if not self.store.decodes or any(height * width <= SMALL for _, _, height, width, _, _ in rows):
            return [self.store.image(row) for row in rows], boxes
        inside = boxes.copy()
        inside[:, :2] = 0
        return [self.store.image(row, tuple(box)) for row, box in zip(rows, boxes.tolist(), strict=True)], inside

    def image(self, i: int) -> Tensor:
        """(height, width, 3) uint8."""
        return self.images([i])[0]

    def labels(self, indices) -> Tensor:
        """(n,) int64."""
        return torch.from_numpy(self.index["label"][indices].astype(np.int64))

    def sizes(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Heights and widths in pixels, each (n,)."""
        rows = self.index[indices]
        return rows["height"], rows["width"]

    def without_labels(self) -> "CachedSplit":
        """The same images with their labels forgotten."""
        index = np.array(self.index)
        index["label"] = -1
        return replace(self, index=index)

    def subset(self, indices: np.ndarray) -> "CachedSplit":
        """Some of the images."""
        return replace(self, index=self.index[indices], digests=self.digests[indices])
