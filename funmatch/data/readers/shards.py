"""Lists shards of any kind in parallel, and reads images in place: what TFRecords and WebDataset share."""

import gzip
import os
import re
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryFile, gettempdir
from threading import Lock

import numpy as np

from funmatch.data.dataset import (
    NAMED_AT_MOST,
    UNLABELLED,
    Dataset,
    ReadOptions,
    SplitListing,
    Track,
    read_class_file,
    sort_splits,
)
from funmatch.data.formats.tfrecord import DamagedRecord, is_gzip
from funmatch.data.readers.shard_paths import splits_of, watched_folders
from funmatch.data.readers.split_names import find_split
from funmatch.errors import InputError
from funmatch.runtime.disk.files import disk_errors

CLASS_FILES = ("class.labels.txt", "label.labels.txt", "labels.txt", "classes.txt", "class_names.txt")
MAX_UNPACKED = 64  # GZIP shards that are unpacked at a time; each takes a file handle
MAX_CLASSES = 1_000_000


@dataclass(frozen=True, slots=True)
class Record:
    """Position and label of one image in a shard.

    Attributes:
        start, length: position of its bytes in the (decompressed) shard.
        label: number of its class in the shard, or `UNLABELLED`.
        number: of the record, or name of the tar's member, for messages.
    """

    start: int
    length: int
    label: int
    number: int | str


def parse_label(text: bytes, where: str) -> int:
    """Parses a label that is written as text."""
    try:
        label = int(text)
    except ValueError:
        raise DamagedRecord(f"{where} is {text[:40]!r}; expected a number") from None
    # Beyond this, numbers of classes overflow the arrays that hold them.
    if abs(label) >= 1 << 62:
        raise DamagedRecord(f"{where} is {text[:40]!r}, too large for the number of a class")
    return label


@dataclass
class Oddities:
    """What listing shards found that is no damage by itself; filled by several threads.

    Attributes:
        unlabelled: by shard, why its first record without a label has none, as an error would say it.
        without_image: names of samples that have no image.
    """

    unlabelled: dict[Path, str] = field(default_factory=dict)
    without_image: list[str] = field(default_factory=list)

    def notes(self, pattern: str) -> list[str]:
        """Returns a note about samples without image."""
        if not self.without_image:
            return []
        # The first by name: threads finish in any order.
        return [
            f"{pattern}: skipped {len(self.without_image):,} samples without an image, e.g. {min(self.without_image)}"
        ]


def open_shards(
    pattern: str,
    paths: list[Path],
    list_shard: Callable[[Path, Oddities], list[Record]],
    options: ReadOptions,
    track: Track,
) -> Dataset:
    """Lists shards in parallel, and reports the problems of all of them at once.

    Args:
        pattern: as given, for messages.
        paths: of the shards.
        list_shard: lists one shard, and raises `DamagedRecord` or `OSError` where it cannot.
        options: for labels and class names.
        track: shows progress.
    """
    oddities = Oddities()
    of_paths, read_as = splits_of(paths)
    shards = _list_shards(paths, of_paths, list_shard, oddities, track)
    for split, images in shards.items():
        if not images:
            raise InputError(f"{pattern}: the shards of {split} have no images; add some, or remove this split")
    notes = [f"{pattern}: {each}" for each in read_as]
    notes += [*_check_unlabelled(pattern, shards, oddities, options), *oddities.notes(pattern)]
    classes, class_file = _classes(paths, shards, options)
    splits = {split: _split(images, classes, options) for split, images in shards.items()}
    # With --unlabelled, labels may have been too odd to use.
    classes = classes if any(split.labelled for split in splits.values()) else ()
    shard_reader = _shard_reader()

    def read(split: str, index: int) -> bytes:
        path, record = shards[split][index]
        return shard_reader(path)(record.start, record.length)

    # Class files that do not exist yet are watched too: adding one changes the class names.
    around = {folder / name for path in paths for folder in (path.parent, path.parent.parent) for name in CLASS_FILES}
    watched = sorted({*map(str, paths), *map(str, around), *map(str, watched_folders(pattern, paths))} | class_file)
    unnamed = bool(classes) and not class_file
    return Dataset(
        _name(paths, pattern), classes, sort_splits(splits), read, watched,
        unnamed=unnamed, notes=tuple(notes), location=pattern,
    )  # fmt: skip


def _list_shards(
    paths: list[Path],
    splits: list[str],
    list_shard: Callable[[Path, Oddities], list[Record]],
    oddities: Oddities,
    track: Track,
) -> dict[str, list[tuple[Path, Record]]]:
    """Returns the records of all shards by split, with the shard of each."""

    def attempt(path: Path) -> list[Record] | str:
        try:
            return list_shard(path, oddities)
        except (DamagedRecord, OSError) as error:
            # Returned, not raised: one damaged shard must not hide the others.
            return f"{path}: {error}"

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        listed = list(track(pool.map(attempt, paths), len(paths), "listing shards"))
    _raise_problems([found for found in listed if isinstance(found, str)], len(paths))
    shards: dict[str, list[tuple[Path, Record]]] = {}
    for path, split, found in zip(paths, splits, listed, strict=True):
        shards.setdefault(split, []).extend((path, record) for record in found if not isinstance(record, str))
    return shards


def _raise_problems(problems: list[str], shards: int) -> None:
    if not problems:
        return
    more = [f"… and {len(problems) - NAMED_AT_MOST} more"] if len(problems) > NAMED_AT_MOST else []
    lines = "\n  ".join(problems[:NAMED_AT_MOST] + more)
    raise InputError(f"{len(problems)} of {shards} shards are unusable:\n  {lines}")


def _check_unlabelled(
    pattern: str, shards: dict[str, list[tuple[Path, Record]]], oddities: Oddities, options: ReadOptions
) -> list[str]:
    """Returns notes about splits in which no record has a label though those of others have one.

    Test splits of competitions are published so. Where no split has a label, the feature's name is likely a mistake.

    Raises:
        InputError: labels are missing inside a split, or everywhere.
    """
    labelled = {split for split, images in shards.items() if any(record.label != UNLABELLED for _, record in images)}
    problems, notes = [], []
    for split, images in shards.items():
        lacking = {path: oddities.unlabelled[path] for path, _ in images if path in oddities.unlabelled}
        if not lacking or options.unlabelled:
            continue
        if labelled and split not in labelled:
            notes.append(f"{pattern}: no label in the shards of {split}, which is taken as unlabelled")
        else:
            problems += [f"{path}: {reason}" for path, reason in lacking.items()]
    _raise_problems(problems, len({path for images in shards.values() for path, _ in images}))
    return notes


def _shard_reader() -> Callable[[Path], Callable[[int, int], bytes]]:
    """Returns a function from a shard's path to a reader of (start, length) in its decompressed content."""
    lock = Lock()
    gzipped = lru_cache(maxsize=None)(is_gzip)
    unpacked = lru_cache(maxsize=MAX_UNPACKED)(UnpackedShard)

    def reader(path: Path) -> Callable[[int, int], bytes]:
        # lru_cache alone would let two threads unpack the same shard at once.
        with lock:
            plain = unpacked(path) if gzipped(path) else None

        def read(start: int, length: int) -> bytes:
            if plain:
                # The closure holds `plain`, so its file stays open even if the cache drops it meanwhile.
                return os.pread(plain.file, length, start)
            # Opened for each image: data sets have more shards than a process may have open files.
            with open(path, "rb") as file:
                return os.pread(file.fileno(), length, start)

        return read

    return reader


class UnpackedShard:
    """Decompressed content of a GZIP shard in an unnamed temporary file, which vanishes with this object.

    Attributes:
        file: handle of the file.
    """

    def __init__(self, path: Path) -> None:
        folder = Path(gettempdir())
        with disk_errors(folder), TemporaryFile(dir=folder) as plain, gzip.open(path) as gzipped:
            shutil.copyfileobj(gzipped, plain)
            plain.flush()
            # A second handle keeps the content when `with` closes the first; an unnamed file ends with its handles.
            self.file = os.dup(plain.fileno())

    def __del__(self) -> None:
        # `__init__` may have failed at a full disk.
        if hasattr(self, "file"):
            os.close(self.file)


def _classes(
    paths: Sequence[Path], shards: dict[str, list[tuple[Path, Record]]], options: ReadOptions
) -> tuple[tuple[str, ...], set[str]]:
    """Returns the class names and the file that they are from; without a file, classes are named by their numbers."""
    labels = [record.label for images in shards.values() for _, record in images]
    if max(labels) == UNLABELLED:
        return (), set()
    folders = list(dict.fromkeys(folder for path in paths for folder in (path.parent, path.parent.parent)))
    candidates = (folder / name for folder in folders for name in CLASS_FILES)
    file = options.class_file or next((path for path in candidates if path.is_file()), None)
    if file:
        return read_class_file(file.expanduser()), {str(file)}
    count = max(labels) - options.first_label + 1
    # A hash or an identifier read as a label would otherwise ask for as many class names.
    if count > MAX_CLASSES and options.unlabelled:
        return (), set()
    if count > MAX_CLASSES:
        raise InputError(
            f"label {max(labels):,} is too large for the number of a class; pass --label-feature none to ignore labels"
        )
    return tuple(map(str, range(count))), set()


def _split(images: list[tuple[Path, Record]], classes: tuple[str, ...], options: ReadOptions) -> SplitListing:
    """Lists a split, and checks that its labels are within the classes."""
    names = [f"{path}, record {record.number}" for path, record in images]
    # 64 bits until they are checked: in 32 a hash could wrap around to a valid label.
    labels = np.array([record.label for _, record in images], np.int64)
    if (labels == UNLABELLED).all():
        return SplitListing(names, labels.astype(np.int32))
    labels -= options.first_label
    outside = np.flatnonzero((labels < 0) | (labels >= len(classes)))
    # With --unlabelled, labels that are missing or unusable do not matter.
    if len(outside) and options.unlabelled:
        return SplitListing(names, np.full(len(names), UNLABELLED, np.int32))
    if len(outside):
        name, first = names[outside[0]], images[outside[0]][1].label
        such = f"({len(outside)} such records)"
        if first == UNLABELLED:
            raise InputError(
                f"{name}: there is no label, though others have one {such}; pass --label-feature none to ignore labels"
            )
        # Labels that end at the number of classes are most likely counted from 1.
        hint = "; if the first class has number 1, pass --first-label 1" if first == len(classes) else ""
        raise InputError(f"{name}: label {first} is outside the {len(classes)} classes {such}{hint}")
    return SplitListing(names, labels.astype(np.int32))


def _name(paths: Sequence[Path], pattern: str) -> str:
    """Returns `pets37` for train_pets37-00-128.tfrec, else the folder's name."""
    first = re.fullmatch(r"[a-z]+_(.+)-\d+-\d+\.tfrec", paths[0].name)
    if first:
        return first[1]
    folder = paths[0].resolve().parent
    return (folder.parent if find_split([folder.name]) else folder).name or pattern
