"""Finds image files: in folders, by patterns, and in lists of paths, one after the other."""

import fnmatch
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import IO

import numpy as np

from funmatch.data.dataset import read_file
from funmatch.data.decode import EXTENSIONS, decode
from funmatch.data.limits import DEFAULT_LIMITS, Limits
from funmatch.data.readers.folder_listing import LEFTOVERS, ending, is_cycle
from funmatch.errors import InputError

ANY_DEPTH = "**"
MAGIC = re.compile(r"[*?[]")
"""What makes a path a pattern."""
FIRST_BYTES = 1 << 16


@dataclass(frozen=True)
class Decoding:
    """How images are decoded, which is how the cache of `evaluate` holds them.

    Attributes:
        cap: longest short side, pixels; larger images are scaled down to it.
        decoder: pillow or torchcodec.
        limits: images beyond them are rejected.
    """

    cap: int
    decoder: str = "pillow"
    limits: Limits = DEFAULT_LIMITS


@dataclass(frozen=True)
class ImageFile:
    """An image that was found and not read yet.

    Attributes:
        path: its path, or its name in a data set.
        read: returns its encoded bytes; what it raises says why they cannot be read.
    """

    path: str
    read: Callable[[], bytes]

    def pixels(self, how: Decoding) -> np.ndarray:
        """Decodes it to (height, width, 3) uint8."""
        return decode(self.read(), cap=how.cap, decoder=how.decoder, limits=how.limits)


def one_file(path: str) -> ImageFile:
    """Returns an image file by its path."""
    return ImageFile(path, partial(read_file, path))


def _failing(path: str, error: OSError) -> ImageFile:
    """Returns a folder that cannot be listed, in the place of its images."""

    def read() -> bytes:
        raise error

    return ImageFile(path, read)


def walk_folder(folder: str) -> Iterator[ImageFile]:
    """Yields the images at any depth of a folder, in the order of their sorted paths, a folder at a time.

    Hidden files, and folders that systems add (`LEFTOVERS`), are skipped. Links are followed, unless they lead in a
    circle.
    """
    return _Walk(folder, lambda _: True, lambda _: True).images(folder)


def match_pattern(pattern: str) -> Iterator[ImageFile]:
    """Yields the images that match a pattern, in the order of their sorted paths, a folder at a time.

    As in a shell, `*`, `?` and `[…]` stand for signs within a name that is not hidden, and `**` for any number of
    folders. Matching folders give all images in them. Matching files count if they have the ending of an image, or
    the pattern ends in an ending of its own (`*.dat`).
    """
    parts = pattern.split("/")
    fixed = [*takewhile(lambda part: not MAGIC.search(part), parts)]
    parts, root = [part for part in parts[len(fixed) :] if part], "/".join(fixed) or ("/" if fixed else "")
    # A ** that stands last means every file below.
    parts += ["*"] if parts[-1] == ANY_DEPTH else []
    tests = [None if part == ANY_DEPTH else re.compile(fnmatch.translate(part)) for part in parts]
    named = not MAGIC.search(os.path.splitext(parts[-1])[1]) and "." in parts[-1]

    def is_wanted(names: tuple[str, ...]) -> bool:
        inside = any(_matches(names[:depth], tests) for depth in range(1, len(names)))
        return (named and _matches(names, tests)) or (
            ending(names[-1]) in EXTENSIONS and (inside or _matches(names, tests))
        )

    def may_hold(names: tuple[str, ...]) -> bool:
        return _leads_on(names, tests)

    return _Walk(root or ".", is_wanted, may_hold, only_images=False).images(root)


def _matches(names: Sequence[str], tests: Sequence[re.Pattern[str] | None]) -> bool:
    """Returns whether the names of a path match the parts of a pattern; None among these is `**`."""
    if not tests:
        return not names
    if tests[0] is None:
        return any(_matches(names[skip:], tests[1:]) for skip in range(len(names) + 1))
    return bool(names) and tests[0].match(names[0]) is not None and _matches(names[1:], tests[1:])


def _leads_on(names: Sequence[str], tests: Sequence[re.Pattern[str] | None]) -> bool:
    """Returns whether something in a folder may match."""
    for name, test in zip(names, tests, strict=False):
        if test is None:
            return True
        if not test.match(name):
            return False
    return True  # longer than the pattern: in a folder that matched


@dataclass(frozen=True)
class _Walk:
    """A walk through a folder.

    Attributes:
        root: where it begins.
        is_wanted: given the names from the root to a file, returns whether to yield it.
        may_hold: given the names from the root to a folder, returns whether to look into it.
        only_images: whether files are left out by their ending, before `is_wanted`.
    """

    root: str
    is_wanted: Callable[[tuple[str, ...]], bool]
    may_hold: Callable[[tuple[str, ...]], bool]
    only_images: bool = True

    def images(self, folder: str, names: tuple[str, ...] = ()) -> Iterator[ImageFile]:
        """Yields the wanted files of a folder and of those in it.

        Args:
            folder: its path as the user gave it; empty for the current one.
            names: from the root to this folder.
        """
        try:
            with os.scandir(folder or ".") as entries:
                # Names only, and a slash after those of folders: sorted so, paths come in the order of their text.
                found = sorted(filter(None, (_entry_name(entry, only_images=self.only_images) for entry in entries)))
        except OSError as error:
            yield _failing(folder, error)
            return
        for name in found:
            inner = (*names, name.rstrip("/"))
            path = os.path.join(folder, inner[-1])
            if not name.endswith("/"):
                if self.is_wanted(inner):
                    yield one_file(path)
            elif self.may_hold(inner) and not is_cycle(path, self.root):
                yield from self.images(path, inner)


def _entry_name(entry: os.DirEntry[str], *, only_images: bool) -> str:
    """Returns the name of an entry, with a slash after that of a folder; empty where it is to be skipped."""
    if entry.name[0] == ".":
        return ""
    try:
        is_folder = entry.is_dir()
    except OSError:
        is_folder = False  # it cannot be looked at: reading it says why
    if is_folder:
        return "" if entry.name.lower() in LEFTOVERS else f"{entry.name}/"
    return "" if only_images and ending(entry.name) not in EXTENSIONS else entry.name


def read_list(stream: IO[str]) -> Iterator[ImageFile]:
    """Yields the files of a list: a path a line, or, where a zero byte occurs at its beginning, with zeros between."""
    # Bytes, since names of files may not be valid in any encoding.
    source = getattr(stream, "buffer", None)
    if source is None:
        raise InputError("standard input has no list of paths here; pass the paths themselves")
    # As much as there is, without waiting for more: whoever writes the list may do so slowly.
    block: bytes = source.read1(FIRST_BYTES)
    zero = b"\0" in block
    rest = b""
    while block:
        *records, rest = (rest + block).split(b"\0" if zero else b"\n")
        yield from map(_of_record, filter(None, map(partial(_record, zero=zero), records)))
        block = source.read1(FIRST_BYTES)
    if last := _record(rest, zero=zero):
        yield _of_record(last)


def _record(record: bytes, *, zero: bool) -> bytes:
    # Windows ends lines with \r\n; between zeros every byte belongs to the name.
    return record if zero else record.removesuffix(b"\r")


def _of_record(record: bytes) -> ImageFile:
    path = os.fsdecode(record)
    return ImageFile(path, partial(read_file, os.path.expanduser(path)))
