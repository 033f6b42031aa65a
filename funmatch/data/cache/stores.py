"""Reads the images of a cache: decoded ones from a mapped file (resident), or encoded ones at each use (streaming).

Both give the same pixels, and neither lets a process's memory grow with the number of images.
"""

import hashlib
import mmap
import os
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from funmatch.config.choices import TaskName
from funmatch.data.decode import decode
from funmatch.data.jpeg import Box
from funmatch.data.limits import MAX_PIXELS, Limits
from funmatch.errors import InputError
from funmatch.runtime.disk.files import close_with

INDEX = np.dtype(
    [("offset", "<i8"), ("length", "<i4"), ("height", "<i4"), ("width", "<i4"), ("label", "<i4"), ("crc", "<u4")]
)
"""Position of an image in its split's file, its size as stored, its label, and the CRC-32 of its bytes there."""

Row = tuple[int, int, int, int, int, int]
"""A row of `INDEX`."""

RELEASE_AFTER = 32 << 20  # bytes
READ_AROUND = 128 << 10  # bytes that the system maps around each access
SMALL = 64 * 64  # pixels up to which an image is decoded whole even if only a box of it is needed


class Store(Protocol):
    """Source of a split's pixels."""

    decodes: ClassVar[bool]
    """Whether every access decodes an image."""

    def verify(self, rows: np.ndarray) -> None:
        """Raises `InputError` if the bytes of these images, rows of `INDEX`, are not what was written."""
        ...

    def image(self, row: Row, box: Box | None = None) -> Tensor:
        """Returns an image or a box of it, (height, width, 3) uint8."""
        ...


class Resident:
    """Decoded images in one mapped file, shared between processes.

    Mapped pages are released every 32 MB: they stay in the system's cache, but no longer count as this process's
    memory, which would otherwise appear to grow to the size of the data.

    Each image is compared with its checksum once, when it is first used. What a disk or a memory damages after that, in
    the same process, goes unnoticed.
    """

    decodes: ClassVar[bool] = False

    def __init__(self, path: Path, index: np.ndarray) -> None:
        """Maps the file.

        Args:
            path: of the file.
            index: of all its images, in their order in the file.
        """
        self.path = path
        self.file = os.open(path, os.O_RDONLY)
        close_with(self, self.file)
        # Copy on write only because torch warns about read-only memory; nothing writes to it.
        self.map = mmap.mmap(self.file, 0, access=mmap.ACCESS_COPY)
        self.pixels = torch.frombuffer(self.map, dtype=torch.uint8)
        self.mapped = 0
        # A copy: `searchsorted` would make one of the mapped column at each call.
        self.offsets = np.array(index["offset"])
        self.verified = np.zeros(len(index), bool)
        self.all_verified = False

    def verify(self, rows: np.ndarray) -> None:
        # Each time: touching pages beyond the end of a file that was cut kills the process without a word. A cut
        # between this and the use of the pixels still does.
        if os.fstat(self.file).st_size < len(self.map):
            raise damaged(self.path)
        if self.all_verified:
            return
        numbers = np.searchsorted(self.offsets, rows["offset"])
        pending = ~self.verified[numbers]
        for number, row in zip(numbers[pending].tolist(), rows[pending].tolist(), strict=True):
            offset, length, *_, crc = row
            if zlib.crc32(memoryview(self.map)[offset : offset + length]) != crc:
                raise damaged(self.path)
            # Without a lock: if two threads come here at once, both compare the image.
            self.verified[number] = True
        if pending.any():
            self.all_verified = bool(self.verified.all())

    def image(self, row: Row, box: Box | None = None) -> Tensor:
        """Returns a view of the mapped file."""
        offset, length, height, width, *_ = row
        # Without a lock: if two threads lose an addition, pages are released a little later.
        self.mapped += length + READ_AROUND
        if self.mapped > RELEASE_AFTER:
            self.mapped = 0
            # Harmless to views that are in use: their pages are read from the file again.
            self.map.madvise(mmap.MADV_DONTNEED)
        image = self.pixels[offset : offset + length].view(height, width, 3)
        if box is None:
            return image
        top, left, height, width = box
        return image[top : top + height, left : left + width]


def damaged(path: Path) -> InputError:
    """Returns the error about pixels that are not what was written."""
    return InputError(f"{path} is damaged; run `funmatch prepare` with the same data and options to rebuild it")


@dataclass(frozen=True)
class Streaming:
    """Encoded images in one file, decoded at each use.

    Attributes:
        path: of the file.
        cap: longest short side, pixels; larger images are scaled down to it, as resident ones are.
        decoder: one of `jpeg.DECODERS`.
        max_pixels: larger images are rejected.
    """

    path: Path
    cap: int
    decoder: str
    max_pixels: int = MAX_PIXELS
    decodes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        # A bare handle and pread: threads share it without a lock, since no position is kept.
        file = os.open(self.path, os.O_RDONLY)
        close_with(self, file)
        object.__setattr__(self, "file", file)

    def verify(self, rows: np.ndarray) -> None:
        """Does nothing: each image is verified when it is decoded."""

    def image(self, row: Row, box: Box | None = None) -> Tensor:
        """Decodes an image or a box of it.

        Raises:
            InputError: the file was damaged after it was written.
        """
        offset, length, _, _, _, crc = row
        encoded = os.pread(self.file, length, offset)
        # At each use: decoders read many damaged JPEGs without an error, as other pixels.
        if zlib.crc32(encoded) != crc:
            raise damaged(self.path)
        # Without counting scans, which takes a part of the time of decoding: they were counted when it was stored.
        limits = Limits(self.max_pixels, scans=0)
        pixels = decode(encoded, cap=self.cap, decoder=self.decoder, limits=limits, box=box)
        if not pixels.flags.writeable:
            pixels = pixels.copy()  # torch warns about read-only memory
        return torch.from_numpy(pixels)


def label_table(sets: np.ndarray | None) -> Tensor | None:
    """Returns what maps labels that number sets of classes to labels of classes: (sets + 1, classes) float32.

    Args:
        sets: (sets, classes) in {0, 1}; None where labels are classes.
    """
    if sets is None:
        return None
    # The last row is that of an image without a label, whose number is -1.
    return torch.cat([torch.from_numpy(sets).float(), torch.full((1, sets.shape[1]), torch.nan)])


@dataclass(frozen=True)
class CachedSplit:
    """Images of one split in a cache.

    Attributes:
        name: train, val or test.
        index: one row of `INDEX` an image, mapped.
        store: source of the pixels.
        digests: of the encoded images, (n,) of 16 bytes, mapped.
        task: `multiclass`, one class an image, or `multilabel`, any number of them.
        label_table: of `label_table` where the labels of the index number sets of classes; None where they are classes.
        sources: where several data sets were joined to the training images, how many each has, one after another; empty
            otherwise.
    """

    name: str
    index: np.ndarray
    store: Store
    digests: np.ndarray
    task: TaskName = "multiclass"
    label_table: Tensor | None = None
    sources: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.index)

    @property
    def labelled(self) -> bool:
        return bool((self.index["label"] >= 0).all())

    @property
    def content(self) -> str:
        """Digest of all images, in their order."""
        # Tapes and caches of teachers' logits hold it in their key.
        return hashlib.blake2b(self.digests.tobytes(), digest_size=16).hexdigest()

    def images(self, indices) -> list[Tensor]:
        """Returns images, each (height, width, 3) uint8."""
        rows = self.index[indices]
        self.store.verify(rows)
        return [self.store.image(row) for row in rows.tolist()]

    def read_boxes(self, indices, boxes: np.ndarray) -> tuple[list[Tensor], np.ndarray]:
        """Reads boxes of images; of large encoded images only the box is decoded.

        Args:
            indices: of the images, (n,).
            boxes: (n, 4) top, left, height, width, pixels.

        Returns:
            images, whole or boxes of them, and the boxes relative to what is returned.
        """
        self.store.verify(self.index[indices])
        rows = self.index[indices].tolist()
        # All whole if any is small: images of one size are then cropped together.
        if not self.store.decodes or any(height * width <= SMALL for _, _, height, width, _, _ in rows):
            return [self.store.image(row) for row in rows], boxes
        inside = boxes.copy()
        inside[:, :2] = 0
        return [self.store.image(row, tuple(box)) for row, box in zip(rows, boxes.tolist(), strict=True)], inside

    def image(self, i: int) -> Tensor:
        """Returns one image, (height, width, 3) uint8."""
        return self.images([i])[0]

    def labels(self, indices) -> Tensor:
        """Returns labels, (n,) int64; -1 where there is none.

        Of several classes an image (n, classes) float32 in {0, 1}; NaN where there is none but others have some.
        """
        numbers = torch.from_numpy(self.index["label"][indices].astype(np.int64))
        return numbers if self.label_table is None else self.label_table[numbers]

    def classes_of(self, indices) -> list[list[int]]:
        """Returns the classes of each image, none where it has no label."""
        labels = self.labels(indices)
        if self.label_table is None:
            return [[number] if number >= 0 else [] for number in labels.tolist()]
        return [torch.nonzero(each == 1).flatten().tolist() for each in labels]

    def class_counts(self, classes: int) -> np.ndarray:
        """Returns the number of images of each class, (classes,) int64; those without a label are in none."""
        numbers = self.index["label"][self.index["label"] >= 0]
        if self.label_table is None:
            return np.bincount(numbers, minlength=classes)
        # By sets, since the labels of all images may not fit in memory.
        counts = torch.from_numpy(np.bincount(numbers, minlength=len(self.label_table) - 1))
        return (counts.double() @ self.label_table[:-1].double()).long().numpy()

    def sizes(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns heights and widths in pixels, each (n,)."""
        rows = self.index[indices]
        return rows["height"], rows["width"]

    def without_labels(self) -> "CachedSplit":
        """Returns the same images without labels."""
        index = np.array(self.index)  # a copy: the mapped file must not change
        index["label"] = -1
        return replace(self, index=index, label_table=None)

    def subset(self, indices: np.ndarray) -> "CachedSplit":
        """Returns a split of some of the images."""
        return replace(self, index=self.index[indices], digests=self.digests[indices], sources=())
