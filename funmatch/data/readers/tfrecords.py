"""Images in shards, listed by position and read in place; TFRecord shards here, tars in `tars`."""

import gzip
import os
import re
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryFile, gettempdir
from threading import Lock

import numpy as np

from funmatch.data.dataset import (  # fmt: skip
    NAMED_AT_MOST,
    UNLABELLED,
    Dataset,
    ReadOptions,
    SplitListing,
    Track,
    read_class_file,
    sort_splits,
    split_of,
    untracked,
)
from funmatch.data.formats.tfrecord import DamagedRecord, Features, is_gzip, parse_example, records
from funmatch.data.readers.shard_paths import is_noted_unlabelled, search_folder, shard_paths
from funmatch.errors import InputError
from funmatch.runtime.files import disk_errors

# The names under which shards keep an image and its class, tried in this order.
FEATURES = (("image", "class"), ("image", "label"), ("image/encoded", "image/class/label"), ("jpg", "cls"))
CLASS_FILES = ("class.labels.txt", "label.labels.txt", "labels.txt", "classes.txt", "class_names.txt")
COUNTED = re.compile(r"-(\d+)-(\d+)\.tfrec$")  # <split>_<name>-<shard>-<count>.tfrec
UNPACKED_AT_MOST = 64
MOST_CLASSES = 1_000_000


@dataclass(frozen=True, slots=True)
class Record:
    """Where one image lies.

    Attributes:
        start, length: its bytes, in the shard (unpacked, if it is GZIP).
        label: as the shard numbers it, or `UNLABELLED`; a text where the shard names its class.
        number: of the record, for messages.
    """

    start: int
    length: int
    label: int
    number: int | str


def open_tfrecords(pattern: str, reading: ReadOptions, track: Track = untracked) -> Dataset:
    """TFRecord shards of `tf.train.Example`s, with every checksum verified.

    Splits come from the folder or the file's name (`train/…`, `train_…`, `…-validation.tfrecord-00000-of-00004`); the
    number of records is held against the count in names like `train_pets37-00-128.tfrec`.

    Raises:
        InputError: naming every damaged shard and the record.
    """
    paths = shard_paths(pattern, r"\.tfrec(ord)?s?([-.]|$)|-\d{5}-of-\d{5}$")

    if is_noted_unlabelled(paths):
        reading = replace(reading, unlabelled=True)

    def list_shard(path: Path) -> list[Record]:
        found = []
        for number, (start, payload) in enumerate(records(path)):
            try:
                (a, b), label = _image_and_label(parse_example(payload), payload, reading)
            except DamagedRecord as error:
                raise DamagedRecord(f"record {number}: {error}") from None
            found.append(Record(start + a, b - a, label, number))
        if (counted := COUNTED.search(path.name)) and int(counted[2]) != len(found):
            raise DamagedRecord(f"holds {len(found)} records, its name says {int(counted[2])}")
        return found

    return open_shards(pattern, paths, list_shard, reading, track)


def _image_and_label(features: Features, payload: bytes, reading: ReadOptions) -> tuple[tuple[int, int], int]:
    pairs = [(reading.image_feature or image, reading.label_feature or label) for image, label in FEATURES]
    image, label = next(
        (pair for pair in pairs if pair[0] in features and (pair[1] in features or pair[1] == "none")), pairs[0]
    )
    if label not in features and reading.unlabelled:
        label = "none"
    for wanted, option in ((image, "--image-feature"), (label, "--label-feature")):
        if wanted not in features and wanted != "none":
            here = ", ".join(sorted(features))
            none = " or --unlabelled" if option == "--label-feature" else ""
            raise DamagedRecord(f"has no feature {wanted!r}, but: {here}; choose by {option}{none}")
    spans, numbers = features[image], features.get(label)
    if not spans or not isinstance(spans[0], tuple):
        raise DamagedRecord(f"feature {image!r} holds no image; wanted its encoded bytes")
    if label == "none":
        return spans[0], UNLABELLED
    if not numbers or len(numbers) > 1:
        raise DamagedRecord(f"feature {label!r} holds {len(numbers or [])} values; wanted one label")
    value = numbers[0]
    return spans[0], value if isinstance(value, int) else number(payload[slice(*value)], f"feature {label!r}")


def number(text: bytes, where: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise DamagedRecord(f"{where} is {text[:40]!r}; wanted a number") from None


def open_shards(
    pattern: str, paths: list[Path], list_shard: Callable[[Path], list[Record]], reading: ReadOptions, track: Track
) -> Dataset:
    """Lists shards, all problems told at once, and gives their images as a source."""

    def attempt(path: Path) -> list[Record] | str:
        try:
            return list_shard(path)
        except (DamagedRecord, OSError) as error:
            return f"{path}: {error}"

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        listed = list(track(pool.map(attempt, paths), len(paths), "listing shards"))
    if problems := [found for found in listed if isinstance(found, str)]:
        more = [f"… and {len(problems) - NAMED_AT_MOST} more"] if len(problems) > NAMED_AT_MOST else []
        lines = "\n  ".join(problems[:NAMED_AT_MOST] + more)
        raise InputError(f"{len(problems)} of {len(paths)} shards cannot be used:\n  {lines}")
    shards: dict[str, list[tuple[Path, Record]]] = {}
    for path, found in zip(paths, listed, strict=True):
        split = split_of(re.split(r"[-_.]", path.name)) or split_of([path.parent.name]) or "train"
        shards.setdefault(split, []).extend((path, record) for record in found if not isinstance(record, str))
    for split, images in shards.items():
        if not images:
            raise InputError(f"{pattern}: the shards of {split} hold no image; fill this split or remove it")
    classes, named = _classes(paths, shards, reading)
    splits = {split: _split(images, classes, reading) for split, images in shards.items()}
    shard_of = _opener()

    def read(split: str, index: int) -> bytes:
        path, record = shards[split][index]
        return shard_of(path)(record.start, record.length)

    around = {folder / name for path in paths for folder in (path.parent, path.parent.parent) for name in CLASS_FILES}
    watched = sorted({*map(str, paths), *map(str, around), *map(str, search_folder(pattern, paths))} | named)
    unnamed = bool(classes) and not named
    return Dataset(_name(paths, pattern), classes, sort_splits(splits), read, watched, unnamed=unnamed, place=pattern)


def _opener() -> Callable[[Path], Callable[[int, int], bytes]]:
    """A function from a shard's path to its reader. GZIP shards are unpacked into files without a name."""
    one_at_a_time = Lock()
    packed = lru_cache(maxsize=None)(is_gzip)
    unpacked = lru_cache(maxsize=UNPACKED_AT_MOST)(Unpacked)

    def reader(path: Path) -> Callable[[int, int], bytes]:
        with one_at_a_time:
            plain = unpacked(path) if packed(path) else None

        def read(start: int, length: int) -> bytes:
            if plain:
                return os.pread(plain.file, length, start)
            with open(path, "rb") as file:
                return os.pread(file.fileno(), length, start)

        return read

    return reader


class Unpacked:
    """The content of a GZIP file in a file without a name, as long as it is needed."""

    def __init__(self, path: Path) -> None:
        place = Path(gettempdir())
        with disk_errors(place), TemporaryFile(dir=place) as plain, gzip.open(path) as packed:
            shutil.copyfileobj(packed, plain)
            plain.flush()
            self.file = os.dup(plain.fileno())

    def __del__(self) -> None:
        if hasattr(self, "file"):
            os.close(self.file)


def _classes(
    paths: Sequence[Path], shards: dict[str, list[tuple[Path, Record]]], reading: ReadOptions
) -> tuple[tuple[str, ...], set[str]]:
    """The classes, and the files that name them: else they are called by their numbers."""
    labels = [record.label for images in shards.values() for _, record in images]
    if max(labels) == UNLABELLED:
        return (), set()
    folders = list(dict.fromkeys(folder for path in paths for folder in (path.parent, path.parent.parent)))
    beside = (folder / name for folder in folders for name in CLASS_FILES)
    file = reading.class_file or next((path for path in beside if path.is_file()), None)
    if file:
        return read_class_file(file.expanduser()), {str(file)}
    count = max(labels) - reading.first_label + 1
    if count > MOST_CLASSES:
        raise InputError(
            f"a label is {max(labels):,}, which cannot be the number of a class; --label-feature none does without"
        )
    return tuple(map(str, range(count))), set()


def _split(images: list[tuple[Path, Record]], classes: tuple[str, ...], reading: ReadOptions) -> SplitListing:
    names = [f"{path}, record {record.number}" for path, record in images]
    labels = np.array([record.label for _, record in images], np.int64)
    if (labels == UNLABELLED).all():
        return SplitListing(names, labels.astype(np.int32))
    labels -= reading.first_label
    outside = np.flatnonzero((labels < 0) | (labels >= len(classes)))
    if len(outside):
        first = images[outside[0]][1].label
        what = "there is no label, though others have one" if first == UNLABELLED else f"label {first} is outside"
        hint = "; if the first class is 1 there, say --first-label 1" if first == len(classes) else ""
        raise InputError(
            f"{names[outside[0]]}: {what} the {len(classes)} classes ({len(outside)} such records){hint}"
            if first != UNLABELLED
            else f"{names[outside[0]]}: {what} ({len(outside)} such records); --label-feature none does without labels"
        )
    return SplitListing(names, labels.astype(np.int32))


def _name(paths: Sequence[Path], pattern: str) -> str:
    """`pets37` for train_pets37-00-128.tfrec, else the folder's name."""
    first = re.fullmatch(r"[a-z]+_(.+)-\d+-\d+\.tfrec", paths[0].name)
    if first:
        return first[1]
    folder = paths[0].resolve().parent
    return (folder.parent if split_of([folder.name]) else folder).name or pattern
