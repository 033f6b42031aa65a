"""Keeps what a teacher said of image files, so that an interrupted selection goes on, and the next begins with it."""

import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from funmatch.data.cache.resumable import recover_rows
from funmatch.runtime.disk.files import disk_errors
from funmatch.runtime.disk.locks import file_lock

ROW = np.dtype(
    [
        ("label", "<i4"), ("confidence", "<f4"), ("code", "<u8"), ("size", "<i8"), ("changed", "<i8"),
        ("end", "<i8"), ("crc", "<u4"),
    ]
)  # fmt: skip
"""What is known of an image: its class and the probability of it, its code, its file's size and time of change (ns; of
an image that is no file, a digest),
where its path ends in the file of paths, and a checksum of the row and the path."""
UNREADABLE = -1
"""The class of an image that cannot be read."""


class Memory:
    """What a teacher said of image files, in a folder; a context, in which no other process changes it.

    Args:
        place: the folder, which need not exist.

    Attributes:
        places: index in `rows` of the newest row of each path.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self.places: dict[str, int] = {}
        self._room, self._count = np.zeros(0, ROW), 0

    @property
    def rows(self) -> np.ndarray:
        """`ROW` of each image, in the order in which they were added."""
        return self._room[: self._count]

    def __enter__(self) -> Self:
        self.place.mkdir(parents=True, exist_ok=True)
        self.disk = disk_errors(self.place)
        self.disk.__enter__()
        # Two processes would mix their rows.
        self.lock = file_lock(self.place / "lock")
        self.lock.__enter__()
        paths = self._recover()
        self.places = {path: i for i, path in enumerate(paths)}
        self.files = open(self.place / "rows", "ab"), open(self.place / "paths", "ab")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self.files:
            file.close()
        self.lock.__exit__(kind, error, trace)
        self.disk.__exit__(kind, error, trace)

    def _recover(self) -> list[str]:
        """Reads the rows up to the first that is damaged or cut off, and removes the others; returns the paths."""
        self._room = recover_rows(self.place / "rows", ROW)
        text = self.place / "paths"
        content = text.read_bytes() if text.exists() else b""
        paths, begin = [], 0
        for row in self._room:
            end = int(row["end"])
            path = content[begin:end]
            if not begin < end <= len(content) or _checksum(row, path) != row["crc"]:
                break
            paths.append(os.fsdecode(path))
            begin = end
        self._count = len(paths)
        for name, size in (("rows", len(paths) * ROW.itemsize), ("paths", begin)):
            if (self.place / name).exists():
                os.truncate(self.place / name, size)
        return paths

    def find(self, path: str, state: tuple[int, int]) -> int | None:
        """Returns the index of a file's row, None if it has none or the file has changed since."""
        place = self.places.get(path)
        if place is None or (self.rows[place]["size"], self.rows[place]["changed"]) != state:
            return None
        return place

    def add(self, paths: Sequence[str], rows: np.ndarray) -> None:
        """Adds the rows of images, on the disk too.

        Args:
            rows: `ROW` of each, without `end` and `crc`.
        """
        end = int(self.rows["end"][-1]) if len(self.rows) else 0
        encoded = [os.fsencode(path) for path in paths]
        rows["end"] = end + np.cumsum([len(path) for path in encoded])
        rows["crc"] = [_checksum(row, path) for row, path in zip(rows, encoded, strict=True)]
        self.places |= {path: self._count + i for i, path in enumerate(paths)}
        if self._count + len(rows) > len(self._room):
            # Twice as much, so that a million images are not copied for each batch.
            self._room = np.concatenate([self.rows, np.zeros(self._count + len(rows), ROW)])
        self._room[self._count : self._count + len(rows)] = rows
        self._count += len(rows)
        of_rows, of_paths = self.files
        # Rows last: a row whose path is missing is damaged, a path without a row is removed.
        of_paths.write(b"".join(encoded))
        of_paths.flush()
        of_rows.write(rows.tobytes())
        of_rows.flush()


def _checksum(row: np.void, path: bytes) -> int:
    return zlib.crc32(path, zlib.crc32(row.tobytes()[: -ROW["crc"].itemsize]))
