"""Lists the images in TFRecord shards by their position, and reads them in place.

`open_shards` does the same for any kind of shard; `webdataset` uses it for tars.
"""

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
    untracked,
)
from funmatch.data.formats.tfrecord import DamagedRecord, Features, is_gzip, parse_example, records
from funmatch.data.readers.shard_paths import is_noted_unlabelled, shard_paths, watched_folders
from funmatch.data.readers.split_names import find_split
from funmatch.errors import InputError
from funmatch.runtime.files import disk_errors

# Feature names of an image and its class, tried in this order: of the earlier project, of TensorFlow Datasets, of
# TensorFlow's ImageNet scripts, and WebDataset's endings.
FEATURES = (("image", "class"), ("image", "label"), ("image/encoded", "image/class/label"), ("jpg", "cls"))
CLASS_FILES = ("class.labels.txt", "label.labels.txt", "labels.txt", "classes.txt", "class_names.txt")
COUNTED = re.compile(r"-(\d+)-(\d+)\.tfrec$")  # <split>_<name>-<shard>-<count>.tfrec
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


def open_tfrecords(pattern: str, options: ReadOptions, track: Track = untracked) -> Dataset:
    """Lists TFRecord shards of `tf.train.Example`s; every checksum is verified.

    Splits come from the folder's or the file's name (`train/…`, `train_…`, `…-validation.tfrecord-00000-of-00004`).
    The number of records is compared with the count in names like `train_pets37-00-128.tfrec`.

    Raises:
        InputError: lists every damaged shard with the record.
    """
    paths = shard_paths(pattern, r"\.tfrec(ord)?s?([-.]|$)|-\d{5}-of-\d{5}$")
    # Our own unlabelled shards have no feature `class`, which elsewhere would be an error.
    if is_noted_unlabelled(paths):
        options = replace(options, unlabelled=True)

    def list_shard(path: Path) -> list[Record]:
        shard_records = []
        for number, (start, payload) in enumerate(records(path)):
            try:
                (a, b), label = _image_and_label(parse_example(payload), payload, options)
            except DamagedRecord as error:
                raise DamagedRecord(f"record {number}: {error}") from None
            shard_records.append(Record(start + a, b - a, label, number))
        if (counted := COUNTED.search(path.name)) and int(counted[2]) != len(shard_records):
            raise DamagedRecord(f"has {len(shard_records)} records, but its name says {int(counted[2])}")
        return shard_records

    return open_shards(pattern, paths, list_shard, options, track)


def _image_and_label(features: Features, payload: bytes, options: ReadOptions) -> tuple[tuple[int, int], int]:
    """Returns the bounds of the image in the payload, and its label."""
    # As pairs: `image` alone does not say whether its label is `class` or `label`.
    pairs = [(options.image_feature or image, options.label_feature or label) for image, label in FEATURES]
    image, label = next(
        (pair for pair in pairs if pair[0] in features and (pair[1] in features or pair[1] == "none")), pairs[0]
    )
    if label not in features and options.unlabelled:
        label = "none"
    for name, option in ((image, "--image-feature"), (label, "--label-feature")):
        if name not in features and name != "none":
            present = ", ".join(sorted(features))
            none = " or --unlabelled" if option == "--label-feature" else ""
            raise DamagedRecord(f"has no feature {name!r}, but: {present}; pass {option}{none}")
    spans, numbers = features[image], features.get(label)
    if not spans or not isinstance(spans[0], tuple):
        raise DamagedRecord(f"feature {image!r} has no image; expected encoded bytes")
    if label == "none":
        return spans[0], UNLABELLED
    if not numbers or len(numbers) > 1:
        raise DamagedRecord(f"feature {label!r} has {len(numbers or [])} values; expected one label")
    value = numbers[0]
    return spans[0], value if isinstance(value, int) else parse_label(payload[slice(*value)], f"feature {label!r}")


def parse_label(text: bytes, where: str) -> int:
    """Parses a label that is written as text."""
    try:
        return int(text)
    except ValueError:
        raise DamagedRecord(f"{where} is {text[:40]!r}; expected a number") from None


def open_shards(
    pattern: str, paths: list[Path], list_shard: Callable[[Path], list[Record]], options: ReadOptions, track: Track
) -> Dataset:
    """Lists shards in parallel, and reports the problems of all of them at once.

    Args:
        pattern: as given, for messages.
        paths: of the shards.
        list_shard: lists one shard, and raises `DamagedRecord` or `OSError` where it cannot.
        options: for labels and class names.
        track: shows progress.
    """

    def attempt(path: Path) -> list[Record] | str:
        try:
            return list_shard(path)
        except (DamagedRecord, OSError) as error:
            # Returned, not raised: one damaged shard must not hide the others.
            return f"{path}: {error}"

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        listed = list(track(pool.map(attempt, paths), len(paths), "listing shards"))
    if problems := [found for found in listed if isinstance(found, str)]:
        more = [f"… and {len(problems) - NAMED_AT_MOST} more"] if len(problems) > NAMED_AT_MOST else []
        lines = "\n  ".join(problems[:NAMED_AT_MOST] + more)
        raise InputError(f"{len(problems)} of {len(paths)} shards are unusable:\n  {lines}")
    shards: dict[str, list[tuple[Path, Record]]] = {}
    for path, found in zip(paths, listed, strict=True):
        # The file's name before its folder's: a folder "dev" may hold shards of train and val.
        split = find_split(re.split(r"[-_.]", path.name)) or find_split([path.parent.name]) or "train"
        shards.setdefault(split, []).extend((path, record) for record in found if not isinstance(record, str))
    for split, images in shards.items():
        if not images:
            raise InputError(f"{pattern}: the shards of {split} have no images; add some, or remove this split")
    classes, class_file = _classes(paths, shards, options)
    splits = {split: _split(images, classes, options) for split, images in shards.items()}
    shard_reader = _shard_reader()

    def read(split: str, index: int) -> bytes:
        path, record = shards[split][index]
        return shard_reader(path)(record.start, record.length)

    # Class files that do not exist yet are watched too: adding one changes the class names.
    around = {folder / name for path in paths for folder in (path.parent, path.parent.parent) for name in CLASS_FILES}
    watched = sorted({*map(str, paths), *map(str, around), *map(str, watched_folders(pattern, paths))} | class_file)
    unnamed = bool(classes) and not class_file
    name = _name(paths, pattern)
    return Dataset(name, classes, sort_splits(splits), read, watched, unnamed=unnamed, location=pattern)


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
