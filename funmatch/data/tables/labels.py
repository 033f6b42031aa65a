"""Reads the labels of a table's rows: a class in a cell, several in a cell, or a column of 0 and 1 for each class."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from itertools import chain

import numpy as np

from funmatch.data.dataset import UNLABELLED, ReadOptions, check_classes, read_class_file
from funmatch.data.formats.tfrecord import DamagedRecord
from funmatch.data.labels import Classes, Label, find_classes, parse_label
from funmatch.data.tables.columns import Columns
from funmatch.data.tables.table import Cell, Table, list_below
from funmatch.errors import InputError
from funmatch.runtime.text import counted

TRUTHS = {"": False, "0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}
"""How columns of a class say whether an image shows it."""


@dataclass(frozen=True)
class RowLabels:
    """The labels of a table's rows.

    Attributes:
        classes: their names; empty where no row has a label.
        sets: indices of each row's classes, ascending and each once; empty for a row without any.
        unnamed: whether the names are only numbers.
        notes: what may surprise a user in how they were found.
        lacking: why no row has a label although each should have one; else empty.
    """

    classes: tuple[str, ...]
    sets: Sequence[tuple[int, ...]]
    unnamed: bool = False
    notes: tuple[str, ...] = ()
    lacking: str = ""

    @cached_property
    def firsts(self) -> np.ndarray:
        """The first class of each row, (rows,) int32; `UNLABELLED` for a row without any."""
        return np.array([each[0] if each else UNLABELLED for each in self.sets], np.int32)


def read_labels(table: Table, columns: Columns, options: ReadOptions) -> RowLabels:
    """Reads the labels of all rows, several of a row where `options.task` is multilabel.

    Raises:
        InputError: lists the rows whose labels cannot be used.
    """
    of_classes = class_columns(table, columns, options)
    none = [()] * len(table.lines)
    if not of_classes and columns.label is None:
        return RowLabels((), none, notes=_note_of_none(table, columns, options), lacking=columns.lacking)
    if of_classes:
        found: list[tuple[Label, ...]] = _read_truths(table, of_classes)
        classes = _of_columns(of_classes, table, options)
        where = f"the columns {', '.join(of_classes[:3])}{', …' if len(of_classes) > 3 else ''}"
    else:
        column = str(columns.label)
        found = _read_cells(table, column, options.label_separator)
        flat = list(chain.from_iterable(found))
        classes = find_classes(table.shown, flat, [], {column}, table.names, options) if flat else Classes()
        where = f"the column {column!r}"
    if not any(found):
        empty = f"{table.shown}: no row has a label in {where}; pass another --label-column, or --unlabelled"
        return RowLabels((), none, lacking=empty)
    if options.task != "multilabel":
        _check_single(table, found, where, options)
    sets = _indices(table, found, classes, options)
    return RowLabels(classes.names, sets, classes.unnamed, classes.notes)


def class_columns(table: Table, columns: Columns, options: ReadOptions) -> list[str]:
    """Returns the columns that stand for a class each: those named, else, with several labels, all of 0 and 1."""
    given = [name.strip() for name in (options.label_feature or "").split(";")]
    if len(given) > 1 and set(given) <= set(table.names):
        return given
    if options.task != "multilabel" or columns.label is not None or options.unlabelled or options.label_feature:
        return []
    others = [name for name in table.names if name and name not in (columns.path, columns.split)]
    return [name for name in others if _is_truth(table.column(name))]


def _is_truth(cells: Sequence[Cell]) -> bool:
    kinds = {cell.lower() if isinstance(cell, str) else "several" for cell in cells}
    return kinds <= TRUTHS.keys() and kinds != {""}


def _note_of_none(table: Table, columns: Columns, options: ReadOptions) -> tuple[str, ...]:
    others = [name for name in table.names if name and name not in (columns.path, columns.split)]
    if not others or options.unlabelled or options.label_feature:
        return ()
    return (
        f"{table.shown} has no column of labels, but: {', '.join(others[:10])}{', …' if len(others) > 10 else ''}; its "
        "images are unlabelled unless --label-column names one",
    )


def _read_truths(table: Table, names: Sequence[str]) -> list[tuple[Label, ...]]:
    found: list[list[Label]] = [[] for _ in table.lines]
    for name in names:
        cells = table.column(name)
        truth = {cell: TRUTHS.get(cell.lower()) if isinstance(cell, str) else None for cell in dict.fromkeys(cells)}
        if odd := [cell for cell, value in truth.items() if value is None]:
            raise InputError(
                f"{table.shown}, {table.place(cells.index(odd[0]))}: the column {name!r} of a class has {odd[0]!r}; "
                "expected 0 or 1"
            )
        for labels, cell in zip(found, cells, strict=True):
            if truth[cell]:
                labels.append(name)
    return [tuple(labels) for labels in found]


def _of_columns(names: Sequence[str], table: Table, options: ReadOptions) -> Classes:
    """Returns the classes that have a column each, in the order of a class file, else of the alphabet."""
    file = options.class_file and options.class_file.expanduser()
    # By code points, as folders, and not in the order of the columns: the same classes in folders are in this order.
    ordered = read_class_file(file) if file else check_classes(sorted(names), table.shown)
    return Classes(ordered, file, positions={name: i for i, name in enumerate(ordered)})


def _read_cells(table: Table, column: str, separator: str) -> list[tuple[Label, ...]]:
    cells = table.column(column)
    parsed: dict[Cell, tuple[Label, ...] | str] = {}
    for cell in dict.fromkeys(cells):
        parts = cell if isinstance(cell, tuple) else cell.split(separator) if separator else [cell]
        try:
            # Each once, and in their order: "cat;cat" says no more than "cat".
            labels = dict.fromkeys(_parse(part, column) for part in parts if part.strip())
            parsed[cell] = tuple(label for label in labels if label != UNLABELLED)
        except DamagedRecord as error:
            parsed[cell] = str(error)
    bad = [f"{table.place(row)}: {parsed[cell]}" for row, cell in enumerate(cells) if isinstance(parsed[cell], str)]
    if bad:
        raise InputError(list_below(f"{counted(len(bad), 'label')} of {table.shown} cannot be used", bad))
    return [labels for cell in cells if not isinstance(labels := parsed[cell], str)]


def _parse(text: str, column: str) -> Label:
    if "\udc80" <= max(text, default="") <= "\udcff":
        raise DamagedRecord(f"the column {column!r} has {text!r}, which is not UTF-8; save the table in UTF-8")
    return parse_label(text.encode(), f"the column {column!r}")


def _check_single(table: Table, found: Sequence[tuple[Label, ...]], where: str, options: ReadOptions) -> None:
    """Raises `InputError` for rows of several labels."""
    several = [row for row, labels in enumerate(found) if len(labels) > 1]
    if not several:
        return
    first = found[several[0]]
    raise InputError(
        f"{table.shown}, {table.place(several[0])}: {where} has {len(first)} labels, {', '.join(map(str, first[:5]))} "
        f"({counted(len(several), 'such row')}); for several labels an image pass --task multilabel, for names that "
        f"hold {options.label_separator!r} another --label-separator"
    )


def _indices(
    table: Table, found: Sequence[tuple[Label, ...]], classes: Classes, options: ReadOptions
) -> list[tuple[int, ...]]:
    """Returns the indices of the classes of each row.

    Raises:
        InputError: lists the labels outside the classes.
    """
    known = list(dict.fromkeys(chain.from_iterable(found)))
    numbers = classes.indices(known, options.first_label)
    index = dict(zip(known, np.asarray(numbers).tolist(), strict=True))
    outside = {label for label, number in index.items() if not 0 <= number < len(classes.names)}
    if outside:
        rows = [(row, label) for row, labels in enumerate(found) for label in labels if label in outside]
        firsts = {label: row for row, label in reversed(rows)}
        near = _near(classes)
        ordered = sorted(firsts.items(), key=lambda each: each[1])
        bad = [f"{table.place(row)}: {label!r}{near(label)}" for label, row in ordered]
        source = f"the {len(classes.names):,} " + (f"names in {classes.file}" if classes.file else "classes")
        # Labels that end at the number of classes are most likely counted from 1.
        hint = "; if the first class has number 1, pass --first-label 1" if outside == {len(classes.names)} else ""
        raise InputError(list_below(f"{counted(len(rows), 'label')} of {table.shown} outside {source}{hint}", bad))
    sets = {labels: tuple(sorted(index[label] for label in labels)) for labels in dict.fromkeys(found)}
    return [sets[labels] for labels in found]


def _near(classes: Classes) -> Callable[[Label], str]:
    def near(label: Label) -> str:
        close = get_close_matches(label, classes.names, n=1) if isinstance(label, str) else []
        return f" (did you mean {close[0]!r}?)" if close else ""

    return near
