"""Where images come from: listed once, read on demand.

Every door (folders, shards, the catalog, the Hub) gives the same thing, a `Source`: classes, splits, and a function
that reads one encoded image.
"""

import os
import re
import stat
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from funmatch.errors import InputError

ORDER = ("train", "val", "test")
SPLIT_NAMES = {
    "train": "train", "training": "train", "trn": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
UNLABELLED = -1
NAMED_AT_MOST = 200

Track = Callable[[Iterable, int, str], Iterable]
"""(things, how many in all, what is done) to the same things, shown as progress."""


def untracked(things: Iterable, total: int, what: str) -> Iterable:  # noqa: ARG001
    """A `Track` that shows nothing."""
    return things


@dataclass(frozen=True)
class SplitListing:
    """The images of one split.

    Attributes:
        names: how messages call each image, (n,).
        labels: index of each image's class, (n,) int32, `UNLABELLED` where there is none.
    """

    names: Sequence[str]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def labelled(self) -> bool:
        return bool(len(self.labels)) and bool((self.labels != UNLABELLED).all())


@dataclass(frozen=True)
class SplitSpec:
    """Which shares of the training images become other splits: {"val": 1/10}, or a number of images.

    Attributes:
        shares: by split; a Fraction below 1, or an int.
        seed: another seed cuts elsewhere.
    """

    shares: dict[str, Fraction | int]
    seed: int = 0


@dataclass(frozen=True)
class Dataset:
    """A data set, listed.

    Attributes:
        name: of the data set.
        classes: their names by label; empty where nothing is labelled.
        splits: by name.
        read: (split, index) to the encoded image; any failure is an exception.
        watched: files and folders whose size and time tell whether anything may have changed.
        cut: what is still to be cut from the training images, by content.
        unnamed: whether the classes are only numbers, because nothing says their names.
        counts: images a split as published, where the data set is.
        notes: what a person may not expect of how this was read, a sentence each.
        place: where it lies, for messages.
    """

    name: str
    classes: tuple[str, ...]
    splits: dict[str, SplitListing]
    read: Callable[[str, int], bytes]
    watched: Sequence[str]
    cut: SplitSpec | None = None
    unnamed: bool = False
    counts: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    place: str = ""

    @property
    def called(self) -> str:
        """Name and place, for messages."""
        return f"{self.name} ({self.place})" if self.place else self.name

    def jobs(self) -> list[tuple[str, int]]:
        """Every image as (split, index), in order."""
        return [(name, i) for name, split in self.splits.items() for i in range(len(split))]


@dataclass(frozen=True)
class ReadOptions:
    """How a person wants a data set read.

    Attributes:
        data_dir: where the data sets of the catalog lie, or are put.
        cut: what to cut from the training images.
        unlabelled: whether labels may be missing.
        follow_links: whether links may lead out of a folder.
        image_feature, label_feature: in shards and tables; None tries the usual names, "none" is no label.
        first_label: the number that shards give the first class.
        class_file: names of the classes, a line each.
    """

    data_dir: Path | None = None
    cut: SplitSpec | None = None
    unlabelled: bool = False
    follow_links: bool = False
    image_feature: str | None = None
    label_feature: str | None = None
    first_label: int = 0
    class_file: Path | None = None


def parse_share(text: str) -> Fraction | int:
    """`10%` or `0.1` to a tenth, `500` to so many images.

    Raises:
        InputError: it is neither.
    """
    if re.fullmatch(r"[1-9]\d{0,11}", text):
        return int(text)
    if re.fullmatch(r"\d{1,3}(\.\d{1,9})?%?", text):
        share = Fraction(text.rstrip("%")) / (100 if text.endswith("%") else 1)
        if 0 < share < 1:
            return share
    raise InputError(f"{text!r} is no share of the training images; wanted 10%, 0.1, or a number of images")


def split_of(words: Sequence[str]) -> str | None:
    """The split that the first of these words names, if one does."""
    return next((SPLIT_NAMES[word.lower()] for word in words if word.lower() in SPLIT_NAMES), None)


def sort_splits(splits: dict[str, SplitListing]) -> dict[str, SplitListing]:
    """Splits as train, val, test."""
    return {name: splits[name] for name in ORDER if name in splits}


def read_file(path: str | Path) -> bytes:
    """A regular file's bytes; a pipe or a device, which might never end, is an error."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("not a regular file")
    with open(path, "rb") as file:
        return file.read()


def check_classes(names: Sequence[str], where: object) -> tuple[str, ...]:
    """The names as classes, or an `InputError` where two differ in nothing but case, which is always a mistake."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            raise InputError(f"{where}: the classes {other!r} and {name!r} differ only in case; make them one")
    if len(seen) != len(names):
        raise InputError(f"{where}: the same class is named twice")
    return tuple(names)


def read_class_file(path: Path) -> tuple[str, ...]:
    """The class names in a file, a line each, as TensorFlow Datasets writes them (`label.labels.txt`)."""
    try:
        lines = path.read_bytes().decode(errors="surrogateescape").split("\n")
    except OSError as error:
        raise InputError(f"class names cannot be read from {path}: {error}") from None
    names = [line.rstrip("\r") for line in lines if line.strip()]
    if not names:
        raise InputError(f"{path} names no class; wanted a class a line")
    return check_classes(names, path)


def join_datasets(sources: Sequence[Dataset]) -> Dataset:
    """Several data sets as one: splits of one name are joined, classes of one name are one class.

    Raises:
        InputError: some have names for their classes and some only numbers.
    """
    if len(sources) == 1:
        return sources[0]
    labelled = [source for source in sources if source.classes]
    if len({source.unnamed for source in labelled}) > 1:
        raise InputError("some of these data sets name their classes, some only number them; give --class-file")
    names = {name for source in labelled for name in source.classes}
    classes = tuple(sorted(names, key=int if labelled and labelled[0].unnamed else None))
    if len({source.classes for source in labelled}) == 1:
        classes = labelled[0].classes  # in their own order
    check_classes(classes, " + ".join(source.name for source in sources))
    alike = len({source.name for source in sources}) < len(sources)
    places = {name: i for i, name in enumerate(classes)}
    parts: dict[str, list[tuple[Dataset, int]]] = {}
    splits: dict[str, SplitListing] = {}
    for name in ORDER:
        having = [source for source in sources if name in source.splits]
        if having:
            parts[name] = [(source, i) for source in having for i in range(len(source.splits[name]))]
            called = [
                f"{source.place if alike else source.name}/{each}"
                for source in having
                for each in source.splits[name].names
            ]
            splits[name] = SplitListing(
                called, np.concatenate([_renumbered(source, name, places) for source in having])
            )

    def read(split: str, index: int) -> bytes:
        source, i = parts[split][index]
        return source.read(split, i)

    cuts = [source.cut for source in sources if source.cut]
    if any(cut != cuts[0] for cut in cuts) or (cuts and len(cuts) < len(sources) and "val" in splits):
        raise InputError("these data sets are cut into splits in different ways; prepare them one by one")
    watched = [path for source in sources for path in source.watched]
    unnamed = bool(labelled) and labelled[0].unnamed
    name = " + ".join(source.name for source in sources)
    notes = tuple(note for source in sources for note in source.notes)
    return Dataset(name, classes, splits, read, watched, cuts[0] if cuts else None, unnamed, notes=notes)


def _renumbered(source: Dataset, split: str, places: dict[str, int]) -> np.ndarray:
    """A split's labels as indices into the joint classes."""
    table = np.array([places[name] for name in source.classes] + [UNLABELLED], np.int32)  # -1 finds the last
    return table[source.splits[split].labels]


def mosaic(folder: Path, name: str, classes: tuple[str, ...], tile: int) -> Dataset:
    """A small data set kept as one grey PNG a split, tiles in rows, equally many a class and sorted by class.

    Args:
        folder: holding `<split>.png`.
        name: of the data set.
        classes: their names.
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
    """Pixels, (height, width) or (height, width, 3) uint8, as an encoded image."""
    kind = b"P5" if pixels.ndim == 2 else b"P6"
    return b"%b\n%d %d\n255\n" % (kind, pixels.shape[1], pixels.shape[0]) + pixels.tobytes()
