"""Turns labels as shards and tables write them, numbers or names, into classes."""

import os
import re
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from funmatch.data.dataset import UNLABELLED, ReadOptions, check_classes, read_class_file
from funmatch.data.formats.tfrecord import DamagedRecord
from funmatch.errors import InputError
from funmatch.runtime.text import decode

# `<feature>.labels.txt` as TensorFlow Datasets writes them, and names that people choose.
CLASS_FILES = ("class.labels.txt", "label.labels.txt", "labels.txt", "classes.txt", "class_names.txt")
MAX_CLASSES = 1_000_000
LONGEST = 200  # bytes of a class name: longer texts are captions, addresses or images
NAMED = 5  # classes that a note names

Label = int | str
"""Number of a class in the data, `UNLABELLED`, or its name."""


@dataclass(frozen=True)
class Classes:
    """The classes of a source.

    Attributes:
        names: class names; empty where nothing is labelled.
        file: that they are from; None without one.
        unnamed: whether they are only numbers, since the source has no names.
        positions: index by name, where labels are names; None where they are numbers.
        first: number that the file gives its first class; None where it has none.
        notes: what may surprise a user in how they were found.
    """

    names: tuple[str, ...] = ()
    file: Path | None = None
    unnamed: bool = False
    positions: dict[str, int] | None = None
    first: int | None = None
    notes: tuple[str, ...] = ()

    def indices(self, labels: Sequence[Label], first_label: int) -> np.ndarray:
        """Returns class indices, (n,) int64: `UNLABELLED` where none has a label, else out of range for unusable ones.

        Args:
            labels: of a split.
            first_label: number of the first class.
        """
        if self.positions is not None:
            outside = len(self.names)
            # By `str`: where a file names the classes, some names may be numbers.
            found = [UNLABELLED if each == UNLABELLED else self.positions.get(str(each), outside) for each in labels]
            return np.array(found, np.int64)
        # 64 bits until they are checked: in 32 a hash could wrap around to a valid label.
        numbers = np.array(labels, np.int64)
        return numbers if (numbers == UNLABELLED).all() else numbers - first_label


def parse_label(text: bytes, where: str) -> Label:
    """Parses a label that is written as text: the number or the name of a class.

    Raises:
        DamagedRecord: it is neither.
    """
    text = text.strip()
    # Programs that know only floats write whole numbers as 3.0.
    if whole := re.fullmatch(rb"([+-]?\d+)\.0*", text):
        text = whole[1]
    try:
        label = int(text)
    except ValueError:
        return _parse_name(text, where)
    # Beyond this, numbers of classes overflow the arrays that hold them.
    if abs(label) >= 1 << 62:
        raise DamagedRecord(f"{where} is {_quoted(text[:40])}, too large for the number of a class")
    return label


def _parse_name(text: bytes, where: str) -> str:
    # Bytes that no name has: an image, or a table.
    if not text or len(text) > LONGEST or re.search(rb"[\x00-\x1f\x7f]|^[+-]?\d*\.\d+$", text):
        long = f", … ({len(text):,} bytes)" if len(text) > LONGEST else ""
        raise DamagedRecord(f"{where} is {_quoted(text[:40])}{long}; expected a number, or the name of a class")
    return text.decode(errors="surrogateescape")


def _quoted(text: bytes) -> str:
    try:
        return repr(text.decode())
    except UnicodeDecodeError:
        return repr(text)


def whole_number(value: float, where: str) -> int:
    """Returns a label that is stored as a float.

    Raises:
        DamagedRecord: it is not a whole number.
    """
    if not float(value).is_integer() or abs(value) >= 1 << 62:
        raise DamagedRecord(f"{where} is {value:g}, not a whole number, so it is not the number of a class")
    return int(value)


def class_files(folders: Iterable[Path], label_features: Collection[str]) -> list[Path]:
    """Returns where class names may be, the likeliest first.

    Args:
        folders: that may hold such a file.
        label_features: features that labels are read from.
    """
    folders = list(folders)
    # First those that name the feature, wherever they are.
    own = [folder / file_of(feature) for feature in sorted(label_features) for folder in folders]
    return list(dict.fromkeys([*own, *(folder / name for folder in folders for name in CLASS_FILES)]))


def file_of(feature: str) -> str:
    """Returns the name of the file with the classes of a feature."""
    return feature.replace("/", "-") + ".labels.txt"


def find_classes(
    where: str,
    labels: Sequence[Label],
    files: Sequence[Path],
    label_features: Collection[str],
    features: Collection[str],
    options: ReadOptions,
) -> Classes:
    """Finds the classes of a source: by a file of names, by labels that are names, or by numbers.

    Args:
        where: names the source in messages.
        labels: of all images.
        files: that may hold names, the likeliest first; they may be missing.
        label_features: features that labels are read from.
        features: all that the records have.
        options: for reading.

    Raises:
        InputError: labels cannot be classes.
    """
    if all(label == UNLABELLED for label in labels):
        return Classes()
    file, notes = options.class_file and options.class_file.expanduser(), []
    if not file:
        file, notes = _choose_file(where, files, label_features, features)
    names = sorted({label for label in labels if isinstance(label, str)})
    if not file and names:
        return _by_name(where, names, labels, label_features, notes)
    classes = read_class_file(file) if file else _numbered(labels, options)
    plain, first = _split_numbers(classes)
    if names:
        return Classes(plain, file, positions={name: i for i, name in enumerate(plain)}, notes=tuple(notes))
    if first is None:
        lowest = min(label for label in labels if isinstance(label, int) and label != UNLABELLED)
        notes += notes_about_first(where if file else f"WARNING: {where}", lowest, classes, options.first_label)
    elif first != options.first_label:
        raise InputError(f"{file} numbers its classes from {first}; pass --first-label {first}")
    # With their numbers, as runs have recorded such names.
    return Classes(classes, file, unnamed=not file, first=first, notes=tuple(notes))


def _split_numbers(names: tuple[str, ...]) -> tuple[tuple[str, ...], int | None]:
    """Splits lines such as `0:daisy`, as TF-slim writes them, into names and the number of the first class.

    The names as they are, and None, where the lines are not numbered one by one.
    """
    parts = [re.fullmatch(r"(\d{1,7}):\s*(\S.*)", name) for name in names]
    found = [(int(part[1]), part[2]) for part in parts if part]
    if len(found) < len(names) or [number for number, _ in found] != list(range(found[0][0], found[0][0] + len(names))):
        return names, None
    return tuple(name for _, name in found), found[0][0]


def _choose_file(
    where: str, candidates: Sequence[Path], label_features: Collection[str], features: Collection[str]
) -> tuple[Path | None, list[str]]:
    """Returns the file of class names, None without one, and notes about others."""
    existing = [path for path in candidates if path.is_file()]
    # `class.labels.txt` names the classes of another feature where the records have one of that name.
    others = {file_of(name): name for name in features if name not in label_features}
    usable = [path for path in existing if path.name not in others]
    if not usable:
        read = " and ".join(sorted(label_features))
        return None, [
            f"{where}: {path} names the classes of {others[path.name]!r} and is not read, as labels are those of "
            f"{read}; pass --class-file to name its classes"
            for path in existing[:1]
        ]
    first, *rest = usable
    differing = [path for path in rest if _words(path) != _words(first)]
    return first, [
        f"WARNING: {where}: class names are read from {first}, but {path} holds others; choose one with --class-file"
        for path in differing[:1]
    ]


def _words(path: Path) -> list[str]:
    with suppress(OSError, UnicodeDecodeError):  # told where it is read as the file of class names
        return decode(path.read_bytes()).split()
    return []


def _numbered(labels: Sequence[Label], options: ReadOptions) -> tuple[str, ...]:
    """Returns names of classes that only have numbers."""
    highest = max(label for label in labels if isinstance(label, int))
    count = highest - options.first_label + 1
    # A hash or an identifier read as a label would otherwise ask for as many class names.
    if count > MAX_CLASSES:
        raise InputError(
            f"label {highest:,} is too large for the number of a class; pass --label-feature none to ignore labels"
        )
    return tuple(map(str, range(count)))


def _by_name(
    where: str, names: list[str], labels: Sequence[Label], label_features: Collection[str], notes: list[str]
) -> Classes:
    """Returns the classes where labels are names, and no file says their order."""
    numbers = [label for label in labels if isinstance(label, int) and label != UNLABELLED]
    if numbers:
        raise InputError(
            f"{where}: some labels are names, e.g. {names[0]!r}, and {len(numbers):,} are numbers, e.g. {numbers[0]}; "
            "expected a number in every record; or pass the list of all names as --class-file"
        )
    count, read = sum(label != UNLABELLED for label in labels), " and ".join(sorted(label_features))
    if len(names) > MAX_CLASSES:
        raise InputError(
            f"{where}: {read} has {len(names):,} names, too many for classes; pass another --label-feature"
        )
    # By code points, as folders: the same names in a folder give the same classes.
    check_classes(names, where)
    more = ", …" if len(names) > NAMED else ""
    note = (
        f"{where}: {read} holds names: {len(names):,} classes in alphabetical order, {', '.join(names[:NAMED])}{more}; "
        "for another order, pass --class-file"
    )
    # Names of files, captions: more than half of the images have their own.
    if count > 2 * NAMED and 2 * len(names) > count:
        note = (
            f"WARNING: {where}: {read} holds {len(names):,} names for {count:,} images, so it is hardly their class; "
            "pass another --label-feature, or none"
        )
    return Classes(tuple(names), positions={name: i for i, name in enumerate(names)}, notes=(*notes, note))


def notes_about_first(where: str, lowest: int, classes: tuple[str, ...], first_label: int) -> list[str]:
    """Returns a note where the first classes have no images, as where labels count from 1.

    Args:
        where: names the source in messages.
        lowest: number that the first class with images has.
        classes: class names.
        first_label: number of the first class.
    """
    empty = lowest - first_label
    # Labels outside the classes are an error, which says more.
    if not 0 < empty < len(classes):
        return []
    which = f"class {classes[0]!r}" if empty == 1 else f"the first {empty:,}"
    return [
        f"{where}: the smallest label is {lowest}, so {which} of {len(classes):,} classes has no images; if the first "
        f"class has number {lowest}, pass --first-label {lowest}"
    ]


def folders_of(paths: Iterable[str | os.PathLike]) -> list[Path]:
    """Returns the folders of shards and those above them, in which class names may be."""
    return list(dict.fromkeys(chain.from_iterable((Path(path).parent, Path(path).parent.parent) for path in paths)))
