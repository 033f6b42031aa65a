"""Two ways to a picture's pixels: resident, decoded once and mapped; or streaming, encoded and decoded when asked for.

Both give the same pixels, and neither lets a process grow with the number of pictures.
"""

import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from funmatch.data.decode import MAX_PIXELS, decode

INDEX = np.dtype(
    [("offset", "<i8"), ("length", "<i4"), ("height", "<i4"), ("width", "<i4"), ("label", "<i4"), ("crc", "<u4")]
)
"""Where a picture lies in its split's file, the size that views see, its label, and a CRC-32 of its bytes there."""

FORGET_AFTER = 32 << 20  # bytes


class Store(Protocol):
    """The pictures of a split."""

    decodes: ClassVar[bool]
    """Whether every look costs a decoding."""

    def picture(self, offset: int, length: int, height: int, width: int) -> Tensor:
        """(height, width, 3) uint8 of the picture that lies there."""
        ...


class Resident:
    """Decoded pictures in one mapped file. Processes share what is read of it.

    What was looked at is given back to the system every 32 MB: it stays in the system's cache, but the process does
    not seem to grow to the size of its data.
    """

    decodes: ClassVar[bool] = False

    def __init__(self, path: Path) -> None:
        with open(path, "rb") as file:
            # Copy on write, because torch warns about read-only memory; nothing ever writes there.
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.pixels = torch.frombuffer(self.map, dtype=torch.uint8)
        self.seen = 0

    def picture(self, offset: int, length: int, height: int, width: int) -> Tensor:
        """A view of the mapped file."""
        self.seen += length
        if self.seen > FORGET_AFTER:
            self.seen = 0
            self.map.madvise(mmap.MADV_DONTNEED)
        return self.pixels[offset : offset + length].view(height, width, 3)


@dataclass(frozen=True)
class Streaming:
    """Encoded pictures in one file, decoded when asked for.

    Attributes:
        path: of the file.
        cap: pictures with a longer short side are scaled down to it, as resident ones are.
        decoder: of `decode.DECODERS`.
        max_pixels: larger pictures are refused.
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

    def picture(self, offset: int, length: int, height: int, width: int) -> Tensor:
        """Decoded now; it has the size that the index says."""
        encoded = os.pread(self.file, length, offset)  # pyrefly: ignore[missing-attribute]
        pixels = decode(encoded, cap=self.cap, decoder=self.decoder, max_pixels=self.max_pixels)
        if pixels.shape[:2] != (height, width):
            raise ValueError(f"{self.path} is damaged: the picture at {offset} has another size than its index says")
        if not pixels.flags.writeable:
            pixels = pixels.copy()  # torch warns about read-only memory
        return torch.from_numpy(pixels)


@dataclass(frozen=True)
class CachedSplit:
    """The pictures of one split.

    Attributes:
        name: train, val or test.
        index: a row of `INDEX` for each picture, mapped.
        store: where the pixels come from.
    """

    name: str
    index: np.ndarray
    store: Store

    def __len__(self) -> int:
        return len(self.index)

    @property
    def labelled(self) -> bool:
        return bool((self.index["label"] >= 0).all())

    def pictures(self, indices) -> list[Tensor]:
        """Each (height, width, 3) uint8."""
        return [self.store.picture(*row[:4]) for row in self.index[indices].tolist()]

    def picture(self, i: int) -> Tensor:
        """(height, width, 3) uint8."""
        return self.pictures([i])[0]

    def labels(self, indices) -> Tensor:
        """(n,) int64."""
        return torch.from_numpy(self.index["label"][indices].astype(np.int64))

    def sizes(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Heights and widths in pixels, each (n,)."""
        rows = self.index[indices]
        return rows["height"], rows["width"]

    def without_labels(self) -> "CachedSplit":
        """The same pictures with their labels forgotten."""
        index = np.array(self.index)
        index["label"] = -1
        return CachedSplit(self.name, index, self.store)
