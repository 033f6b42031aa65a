"""Reads the labels of tables: a column of numbers, of names, or of the library's own `ClassLabel`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from funmatch.data.dataset import UNLABELLED, ReadOptions, SplitListing, check_classes, read_class_file
from funmatch.data.labels import MAX_CLASSES, notes_about_first
from funmatch.errors import InputError

NUMBERS = {f"{kind}{bits}" for kind in ("int", "uint", "float") for bits in (8, 16, 32, 64)}
TEXTS = {"string", "large_string"}
LABELS = ("label", "labels", "class", "cls", "fine_label", "category")


@dataclass(frozen=True)
class TableLabels:
    """The labels of tables; the attributes are those of a `Dataset`."""

    classes: tuple[str, ...]
    splits: dict[str, SplitListing]
    unnamed: bool = False
    notes: tuple[str, ...] = ()
    lacking: str = ""


def read_labels(datasets: Any, where: str, tables: Mapping[str, Any], options: ReadOptions) -> TableLabels:
    """Reads the labels of all rows.

    Args:
        datasets: the library.
        where: names the source in messages.
        tables: by split.
        options: for the column and class names.

    Raises:
        InputError: there are several columns of labels, or one holds something else.
    """
    # Of all tables: test splits are often published without the column.
    columns: dict[str, Any] = {}
    for table in tables.values():
        columns |= {name: feature for name, feature in table.features.items() if name not in columns}
    label = _label_column(datasets, columns, where, options)

    def unlabelled(lacking: str = "") -> TableLabels:
        splits = {split: _split(where, split, table, None, (), 0) for split, table in tables.items()}
        return TableLabels((), splits, lacking="" if options.unlabelled else lacking)

    if label is None:
        return unlabelled()
    if label not in columns:
        # No error yet: another source may have the labels.
        return unlabelled(f"{where} has no column {label!r}, but: {', '.join(columns)}; pass another --label-feature")
    # As test splits are published.
    labelled = {split: table for split, table in tables.items() if not _is_empty(table, label)}
    if not labelled:
        return unlabelled(f"{where}: the column {label!r} is empty; pass another --label-feature, or --unlabelled")
    try:
        classes, unnamed = _classes(datasets, where, labelled, columns[label], label, options)
        # The numbers of a `ClassLabel` are those of its names.
        first = 0 if isinstance(columns[label], datasets.ClassLabel) else options.first_label
        splits = {
            split: _split(where, split, table, label if split in labelled else None, classes, first)
            for split, table in tables.items()
        }
    except InputError:
        # With --unlabelled, labels that are unusable do not matter.
        if not options.unlabelled:
            raise
        return unlabelled()
    present = [labels.min() for split in splits.values() if len(labels := split.labels[split.labels != UNLABELLED])]
    told = unnamed and present and not options.unlabelled
    notes = notes_about_first(f"WARNING: {where}", int(min(present)) + first, classes, first) if told else []
    return TableLabels(classes, splits, unnamed, tuple(notes))


def _label_column(datasets: Any, columns: Mapping[str, Any], where: str, options: ReadOptions) -> str | None:
    if options.label_feature:
        return None if options.label_feature == "none" else options.label_feature
    candidates = [name for name, feature in columns.items() if isinstance(feature, datasets.ClassLabel)]
    if len(candidates) > 1:
        raise InputError(f"{where} has several labels: {', '.join(candidates)}; choose one with --label-feature")
    return next(iter(candidates + [name for name in LABELS if name in columns]), None)


def _classes(
    datasets: Any, where: str, tables: Mapping[str, Any], feature: Any, label: str, options: ReadOptions
) -> tuple[tuple[str, ...], bool]:
    """Returns the class names, and whether they are only numbers."""
    if options.class_file:
        return read_class_file(options.class_file.expanduser()), False
    if isinstance(feature, datasets.ClassLabel):
        return check_classes(feature.names, where), False
    if getattr(feature, "dtype", "") not in NUMBERS | TEXTS:
        raise InputError(
            f"{where}: the column {label!r} has no labels but {feature}; choose another with --label-feature"
        )
    values = {value for table in tables.values() for value in table.unique(label)} - {None}
    if all(isinstance(value, str) for value in values):
        return check_classes(sorted(values), where), False
    # Others are named below, with their row.
    highest = max((number for value in values if (number := _whole(value)) is not None), default=-1)
    # A hash or an identifier read as a label would ask for as many class names.
    if highest > MAX_CLASSES:
        raise InputError(f"{where}: the column {label!r} has {highest:,}, too large for the number of a class")
    return tuple(map(str, range(highest + 1 - options.first_label))), True


def _is_empty(table: Any, label: str) -> bool:
    """Returns whether no row of a table has anything in a column, or the table has no such column."""
    # Only numbers and texts: unique values of other types are not defined.
    if label in table.features and getattr(table.features[label], "dtype", "") in NUMBERS | TEXTS:
        return set(table.unique(label)) <= {None, ""}
    return label not in table.features


def _whole(value: Any) -> int | None:
    """Returns a whole number as an integer, None for anything else. Columns with gaps hold 3.0 instead of 3."""
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    return value if isinstance(value, int) else None


def _split(
    where: str, name: str, table: Any, label: str | None, classes: tuple[str, ...], first_label: int
) -> SplitListing:
    names = [f"{where} {name}[{i}]" for i in range(len(table))]
    if label is None:
        return SplitListing(names, np.full(len(table), UNLABELLED, np.int32))
    # [:], since newer versions of the library return a column that reads lazily.
    values = table[label][:]
    positions = {name: i + first_label for i, name in enumerate(classes)}
    # A missing value is −2 before the first class, an error. -1 in every row is the Hub's way of saying that a test
    # split has no labels.
    strange = min(first_label, 0) - 2
    numbers = [positions.get(value, strange) if (n := _whole(value)) is None else n for value in values]
    labels = np.array(numbers, np.int64)
    if (labels == UNLABELLED).all():
        return SplitListing(names, labels.astype(np.int32))
    labels -= first_label
    if labels.min() < 0 or labels.max() >= len(classes):
        wrong = int(np.flatnonzero((labels < 0) | (labels >= len(classes)))[0])
        raise InputError(
            f"{names[wrong]}: label {values[wrong]!r} is outside the {len(classes)} classes; pass --unlabelled to "
            "ignore labels"
        )
    return SplitListing(names, labels.astype(np.int32))
