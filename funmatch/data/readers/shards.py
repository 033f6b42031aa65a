"""Lists shards of any kind in parallel, and reads images in place: what TFRecords and WebDataset share."""

import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryFile, gettempdir
from threading import Lock

from funmatch.data.dataset import (
    NAMED_AT_MOST,
    Dataset,
    ReadOptions,
    SplitListing,
    Track,
    sort_splits,
)
from funmatch.data.formats.compressed import compression_of, open_shard
from funmatch.data.formats.tfrecord import DamagedRecord
from funmatch.data.labels import Classes, class_files, find_classes, folders_of
from funmatch.data.readers.class_notes import class_notes
from funmatch.data.readers.shard_paths import listed_beside, splits_of, watched_folders
from funmatch.data.readers.split_names import find_split
from funmatch.data.shard_labels import NO_LABEL, Labels, labels_of, number_labels
from funmatch.errors import InputError
from funmatch.runtime.disk.files import close_with, disk_errors

MAX_UNPACKED = 64  # compressed shards that are unpacked at a time; each takes a file handle


@dataclass(frozen=True, slots=True)
class Record:
    """Position and label of one image in a shard.

    Attributes:
        start, length: position of its bytes in the (decompressed) shard.
        label: number or name of its class in the shard, or `UNLABELLED`; with several labels an image, all of them.
        number: of the record, or name of the tar's member, for messages.
        header: bytes to put before these, which make an image file of pixels that are not encoded.
    """

    start: int
    length: int
    label: Labels
    number: int | str
    header: bytes = b""


@dataclass
class Oddities:
    """What listing shards found beside images and labels; filled by several threads.

    Attributes:
        unlabelled: by shard, why its first record without a label has none, as an error would say it.
        empty: the same of records that may have several labels, which have none only where all of a split are so.
        without_image: names of samples that have no image.
        features: names of all features in the records.
        taken: features that were read, as `image` and as `label`.
        passed_over: features that could have been read instead.
    """

    unlabelled: dict[Path, str] = field(default_factory=dict)
    empty: dict[Path, str] = field(default_factory=dict)
    without_image: list[str] = field(default_factory=list)
    features: set[str] = field(default_factory=set)
    taken: dict[str, set[str]] = field(default_factory=lambda: {"image": set(), "label": set()})
    passed_over: dict[str, set[str]] = field(default_factory=lambda: {"image": set(), "label": set()})

    def take(self, kind: str, name: str, others: Iterable[str]) -> None:
        """Notes which feature of a record was read as `image` or `label`, and the others that could have been."""
        self.taken[kind].add(name)
        self.passed_over[kind].update(others)

    def notes(self, pattern: str) -> list[str]:
        """Returns notes about features that were chosen among several, and about samples without an image."""
        notes = []
        for kind, names in self.taken.items():
            read = " or ".join(sorted(names))
            if others := ", ".join(sorted(self.passed_over[kind] - names)):
                notes.append(f"{pattern}: the {kind} is read from {read}, not {others}; choose with --{kind}-feature")
            elif len(names) > 1:
                notes.append(f"{pattern}: records have the {kind} in {read}; choose one with --{kind}-feature")
        if self.without_image:
            count = f"{len(self.without_image):,} samples without an image"
            # The first by name: threads finish in any order.
            notes.append(f"{pattern}: skipped {count}, e.g. {min(self.without_image)}")
        return notes


def open_shards(
    pattern: str,
    paths: list[Path],
    endings: str,
    list_shard: Callable[[Path, Oddities], list[Record]],
    options: ReadOptions,
    track: Track,
) -> Dataset:
    """Lists shards in parallel, and reports the problems of all of them at once.

    Args:
        pattern: as given, for messages.
        paths: of the shards.
        endings: regular expression for the names of shards in a folder.
        list_shard: lists one shard, and raises `DamagedRecord` or `OSError` where it cannot.
        options: for labels and class names.
        track: shows progress.
    """
    oddities = Oddities()
    of_paths, read_as = splits_of(paths)
    shards = _list_shards(pattern, paths, of_paths, list_shard, oddities, track)
    unlabelled, lacking = _check_unlabelled(pattern, shards, oddities, options)
    around = listed_beside(pattern, endings, class_files(folders_of(paths), oddities.taken["label"]))
    classes = _find_classes(pattern, around, shards, oddities, options)
    image_names = {
        split: [f"{path}, record {record.number}" for path, record in images] for split, images in shards.items()
    }
    labels = {split: [record.label for _, record in images] for split, images in shards.items()}
    numbers, sets = number_labels(image_names, labels, classes, options)
    splits = {split: SplitListing(image_names[split], numbers[split]) for split in shards}
    # With --unlabelled, labels may have been too odd to use.
    names = classes.names if any(split.labelled for split in splits.values()) else ()
    notes = [*(f"{pattern}: {each}" for each in read_as), *unlabelled, *oddities.notes(pattern)]
    if not options.unlabelled:
        notes += [*classes.notes, *(_class_notes(pattern, names, splits) if sets is None else [])]
    shard_reader = _shard_reader()

    def read(split: str, index: int) -> bytes:
        path, record = shards[split][index]
        return record.header + shard_reader(path)(record.start, record.length)

    # Class files that do not exist yet are watched too: adding one changes the class names.
    named = [classes.file] if classes.file else []
    watched = {*map(str, (*paths, *around, *named, *watched_folders(pattern, paths)))}
    return Dataset(
        _name(paths, pattern), names, sort_splits(splits), read, sorted(watched), location=pattern, lacking=lacking,
        unnamed=bool(names) and classes.unnamed, notes=tuple(notes), label_sets=sets if names else None,
    )  # fmt: skip


def _find_classes(
    pattern: str,
    files: list[Path],
    shards: dict[str, list[tuple[Path, Record]]],
    oddities: Oddities,
    options: ReadOptions,
) -> Classes:
    labels = [label for images in shards.values() for _, record in images for label in labels_of(record.label)]
    try:
        return find_classes(pattern, labels, files, oddities.taken["label"], oddities.features, options)
    except InputError:
        # With --unlabelled, labels that cannot be classes do not matter.
        if not options.unlabelled:
            raise
        return Classes(positions={})


def _class_notes(pattern: str, names: tuple[str, ...], splits: dict[str, SplitListing]) -> list[str]:
    """Returns notes about classes without images in a split or in all of them."""
    labelled = [split.labels for split in splits.values() if split.labelled]
    # Another note says that the labels begin later.
    return class_notes(pattern, names, splits, min(int(labels.min()) for labels in labelled)) if labelled else []


def _list_shards(
    pattern: str,
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
    if problems := [found for found in listed if isinstance(found, str)]:
        raise InputError(_describe_problems(problems, len(paths)))
    shards: dict[str, list[tuple[Path, Record]]] = {}
    for path, split, found in zip(paths, splits, listed, strict=True):
        shards.setdefault(split, []).extend((path, record) for record in found if not isinstance(record, str))
    for split, images in shards.items():
        if not images:
            raise InputError(f"{pattern}: the shards of {split} have no images; add some, or remove this split")
    return shards


def _describe_problems(problems: list[str], shards: int) -> str:
    more = [f"… and {len(problems) - NAMED_AT_MOST} more"] if len(problems) > NAMED_AT_MOST else []
    lines = "\n  ".join(problems[:NAMED_AT_MOST] + more)
    return f"{len(problems)} of {shards} shards are unusable:\n  {lines}"


def _check_unlabelled(
    pattern: str, shards: dict[str, list[tuple[Path, Record]]], oddities: Oddities, options: ReadOptions
) -> tuple[list[str], str]:
    """Returns notes about splits in which no record has a label though those of others have one.

    Test splits of competitions are published so. Where no split has a label, the feature's name is likely a mistake,
    unless other sources have the labels: then why there is none is returned, too.

    Raises:
        InputError: labels are missing inside a split.
    """
    labelled = {split for split, images in shards.items() if any(each.label not in NO_LABEL for _, each in images)}
    problems, notes = [], []
    for split, images in shards.items():
        reasons = oddities.unlabelled if split in labelled else oddities.empty | oddities.unlabelled
        lacking = {path: reasons[path] for path, _ in images if path in reasons}
        if not lacking or options.unlabelled:
            continue
        if labelled and split not in labelled:
            notes.append(f"{pattern}: no label in the shards of {split}, which is taken as unlabelled")
        else:
            problems += [f"{path}: {reason}" for path, reason in lacking.items()]
    if not problems:
        return notes, ""
    problem = _describe_problems(problems, len({path for images in shards.values() for path, _ in images}))
    if labelled:
        raise InputError(problem)
    return notes, problem


def _shard_reader() -> Callable[[Path], Callable[[int, int], bytes]]:
    """Returns a function from a shard's path to a reader of (start, length) in its decompressed content."""
    lock = Lock()
    compression = lru_cache(maxsize=None)(compression_of)
    unpacked = lru_cache(maxsize=MAX_UNPACKED)(UnpackedShard)

    def reader(path: Path) -> Callable[[int, int], bytes]:
        # lru_cache alone would let two threads unpack the same shard at once.
        with lock:
            packed = compression(path)
            plain = unpacked(path, packed) if packed else None

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
    """Decompressed content of a compressed shard in an unnamed temporary file, which vanishes with this object.

    Attributes:
        file: handle of the file.
    """

    def __init__(self, path: Path, compression: str) -> None:
        folder = Path(gettempdir())
        with disk_errors(folder), TemporaryFile(dir=folder) as plain, open_shard(path, compression) as packed:
            shutil.copyfileobj(packed, plain)
            plain.flush()
            # A second handle keeps the content when `with` closes the first; an unnamed file ends with its handles.
            self.file = os.dup(plain.fileno())
            close_with(self, self.file)


def _name(paths: Sequence[Path], pattern: str) -> str:
    """Returns `pets37` for train_pets37-00-128.tfrec, else the folder's name."""
    first = re.fullmatch(r"[a-z]+_(.+)-\d+-\d+\.tfrec", paths[0].name)
    if first:
        return first[1]
    folder = paths[0].resolve().parent
    return (folder.parent if find_split([folder.name]) else folder).name or pattern
