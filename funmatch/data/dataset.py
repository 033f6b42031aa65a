"""Defines a listed data set, the options for reading one, and the helpers that all readers share.

Every reader (folders, shards, the catalog, the Hugging Face Hub) returns the same thing, a `Dataset`: class names,
splits, and a function that reads one encoded image on demand.
"""

import os
import re
import stat
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from funmatch.config.choices import TaskName
from funmatch.errors import InputError
from funmatch.runtime.text import decode

ORDER = ("train", "val", "test")
UNLABELLED = -1
NAMED_AT_MOST = 200
"""Files that an error lists one by one."""

Track = Callable[[Iterable, int, str], Iterable]
"""(items, total, description) to the same items, with progress shown while they are consumed."""


def untracked(items: Iterable, total: int, description: str) -> Iterable:  # noqa: ARG001
    """A `Track` that shows nothing."""
    return items


@dataclass(frozen=True)
class SplitListing:
    """The images of one split.

    Attributes:
        names: name of each image in messages, (n,).
        labels: class index of each image, or the number of its set of classes where the data set has such sets, (n,)
            int32; `UNLABELLED` where it has none.
        sources: number of the data set that each image is from, (n,) int32, where several are joined; ascending.
    """

    names: Sequence[str]
    labels: np.ndarray
    sources: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def labelled(self) -> bool:
        return bool(len(self.labels)) and bool((self.labels != UNLABELLED).all())

    def subset(self, rows: Sequence[int]) -> "SplitListing":
        """Returns the listing of some of the images."""
        chosen = np.array(rows, np.int64)
        sources = None if self.sources is None else self.sources[chosen]
        return SplitListing([self.names[i] for i in rows], self.labels[chosen], sources)


@dataclass(frozen=True)
class SplitSpec:
    """The parts of the training images to hold out as other splits.

    Attributes:
        shares: size by split, e.g. {"val": 1/10}: a Fraction below 1, or a number of images.
        seed: selects which images are held out.
    """

    shares: dict[str, Fraction | int]
    seed: int = 0


@dataclass(frozen=True)
class Dataset:
    """A data set, listed but not read.

    Attributes:
        name: of the data set.
        classes: class names by label; empty where nothing is labelled.
        splits: listing of each split by its name.
        read: (split, index) to the encoded image. It may raise any exception: an image that fails is reported by name.
        watched: files and folders whose size and time of change show whether the listing may be outdated.
        split_spec: splits still to be held out from the training images, by content.
        unnamed: whether class names are only numbers, because the source has no names.
        published_counts: images in each split as published; empty for data that is not in the catalog.
        notes: sentences about what may surprise a user in how the data was read.
        location: path, pattern or Hub name, for messages.
        lacking: why no image has a label although each should have one; empty where that is not so.
        task: `multiclass`, one class an image, or `multilabel`, any number of them.
        label_sets: of several classes an image, the sets that labels number, (sets, classes) uint8 in {0, 1}; None
            where labels are classes.
        root: folder that the names of images are relative to, where they are paths; empty where it is `location`.
        joined: number of data sets that this one joins.
    """

    name: str
    classes: tuple[str, ...]
    splits: dict[str, SplitListing]
    read: Callable[[str, int], bytes]
    watched: Sequence[str]
    split_spec: SplitSpec | None = None
    unnamed: bool = False
    published_counts: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    location: str = ""
    lacking: str = ""
    task: TaskName = "multiclass"
    label_sets: np.ndarray | None = None
    root: str = ""
    joined: int = 1

    @property
    def display_name(self) -> str:
        """Name and location, for messages; once where they are the same, as of a folder in the current one."""
        return f"{self.name} ({self.location})" if self.location not in ("", self.name) else self.name

    def jobs(self) -> list[tuple[str, int]]:
        """Every image as (split, index), in order."""
        return [(name, i) for name, split in self.splits.items() for i in range(len(split))]


OF_SHARDS = {"only": "shards and tables"}
"""Marks the options that folders do not have."""


@dataclass(frozen=True)
class ReadOptions:
    """Options for reading a data set. The fields that `config.Images` has too are filled from there by their names.

    Attributes:
        data_dir: folder of the catalog's data sets, existing or to be downloaded.
        split_spec: splits to hold out from the training images.
        unlabelled: whether labels may be missing.
        follow_links: whether symbolic links may lead out of a folder.
        image_feature, label_feature: their names in shards and tables; None tries the usual names, "none" reads no
            labels.
        first_label: number of the first class, where shards and tables have numbers.
        class_file: file of class names, one a line.
        task: `multiclass`, one class an image, or `multilabel`, any number of them.
        split_column: of a table of paths, the column of splits; None tries the usual names, "none" reads none.
        image_root: folder that the paths in a table are relative to; None is the table's own.
        label_separator: between several labels in a cell of a table.
        on_bad: `stop` with an error where a table names files that are not there, or `skip` them.
    """

    data_dir: Path | None = None
    split_spec: SplitSpec | None = None
    unlabelled: bool = False
    follow_links: bool = False
    image_feature: str | None = field(default=None, metadata=OF_SHARDS)
    label_feature: str | None = field(default=None, metadata=OF_SHARDS)
    first_label: int = field(default=0, metadata=OF_SHARDS)
    class_file: Path | None = field(default=None, metadata=OF_SHARDS)
    task: TaskName = "multiclass"
    split_column: str | None = field(default=None, metadata=OF_SHARDS)
    image_root: Path | None = field(default=None, metadata=OF_SHARDS)
    label_separator: str = field(default=";", metadata=OF_SHARDS)
    on_bad: str = "stop"


def parse_share(text: str) -> Fraction | int:
    """Parses the size of a split: `10%` or `0.1` to 1/10, `500` to a number of images, `none` to 0.

    Raises:
        InputError: the text is none of these.
    """
    if text == "none":
        return 0
    if re.fullmatch(r"[1-9]\d{0,11}", text):
        return int(text)
    if re.fullmatch(r"\d{1,3}(\.\d{1,9})?%?", text):
        # A Fraction: as floats, 0.29 * 100 falls just below 29, and the split would lack an image.
        share = Fraction(text.rstrip("%")) / (100 if text.endswith("%") else 1)
        if 0 < share < 1:
            return share
    raise InputError(
        f"{text!r} is not a valid share of the training images; expected 10%, 0.1, a number of images, or none"
    )


def sort_splits(splits: dict[str, SplitListing]) -> dict[str, SplitListing]:
    """Orders splits as train, val, test."""
    # Always in one order, which is part of the cache's key.
    return {name: splits[name] for name in ORDER if name in splits}


def read_file(path: str | Path) -> bytes:
    """Reads a regular file."""
    # Opening a pipe or a device could block forever.
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("not a regular file")
    with open(path, "rb") as file:
        return file.read()


def check_classes(names: Sequence[str], where: object) -> tuple[str, ...]:
    """Returns the class names as a tuple.

    Raises:
        InputError: two names are equal, or differ only in case, in spaces at their ends, or in how accents are encoded.
    """
    first: dict[str, str] = {}
    for name in names:
        # Always a mistake: file systems of other machines would merge the two folders, and people read them as one.
        other = first.setdefault(unicodedata.normalize("NFC", name.casefold().strip()), name)
        if other == name:
            continue
        if other.casefold() == name.casefold():
            raise InputError(f"{where}: the classes {other!r} and {name!r} differ only in case; merge them")
        if other.strip() != name.strip():
            raise InputError(
                f"{where}: the classes {other!a} and {name!a} are the same letters in two encodings (macOS writes "
                "accents as characters of their own); merge them"
            )
        raise InputError(f"{where}: the classes {other!r} and {name!r} differ only in spaces; merge them")
    if len(first) != len(names):
        raise InputError(f"{where}: the same class is listed twice")
    return tuple(names)


def read_class_file(path: Path) -> tuple[str, ...]:
    """Reads class names, one a line, as TensorFlow Datasets writes them (`label.labels.txt`)."""
    try:
        # Not splitlines, which also splits at separators that a class name may contain.
        lines = decode(path.read_bytes()).split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read class names from {path}: {reason}") from None
    # Windows ends lines with \r\n; other blanks at the end may belong to a name.
    names = [line.rstrip("\r") for line in lines if line.strip()]
    if not names:
        raise InputError(f"{path} has no class names; expected one a line")
    return check_classes(names, path)


def mosaic(folder: Path, name: str, classes: tuple[str, ...], tile: int) -> Dataset:
    """Opens a small data set stored as one greyscale PNG per split: tiles in rows, sorted by class, as many of each.

    Args:
        folder: holds `<split>.png`.
        name: of the data set.
        classes: class names.
        tile: side of a tile in pixels.
    """
    tiles, splits = {}, {}
    for split in ORDER:
        if (path := folder / f"{split}.png").exists():
            sheet = np.asarray(Image.open(path))
            grid = sheet.reshape(sheet.shape[0] // tile, tile, sheet.shape[1] // tile, tile)
            tiles[split] = grid.swapaxes(1, 2).reshape(-1, tile, tile)
            labels = np.repeat(np.arange(len(classes), dtype=np.int32), len(tiles[split]) // len(classes))
            splits[split] = SplitListing([f"{split}/{classes[label]}/{i}" for i, label in enumerate(labels)], labels)
    watched = [str(folder / f"{split}.png") for split in splits]
    return Dataset(name, classes, splits, lambda split, i: encode_pnm(tiles[split][i]), watched)


def encode_pnm(pixels: np.ndarray) -> bytes:
    """Encodes pixels, (height, width) or (height, width, 3) uint8, as a PNM image."""
    # The simplest lossless format: data sets of raw arrays then pass through the same path as files do.
    magic = b"P5" if pixels.ndim == 2 else b"P6"
    return b"%b\n%d %d\n255\n" % (magic, pixels.shape[1], pixels.shape[0]) + pixels.tobytes()
