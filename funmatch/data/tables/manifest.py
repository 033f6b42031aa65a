"""Lists the images that a table names: a row for each, with the path of its file, its labels and its split."""

import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from funmatch.data.dataset import (
    ORDER,
    UNLABELLED,
    Dataset,
    ReadOptions,
    SplitListing,
    Track,
    read_file,
    untracked,
)
from funmatch.data.decode import EXTENSIONS
from funmatch.data.label_sets import Sets, number_sets
from funmatch.data.readers.class_notes import class_notes
from funmatch.data.remote.fetch import fetch
from funmatch.data.remote.objects import Wanted
from funmatch.data.tables.columns import PATHS, Columns, find_columns, read_splits
from funmatch.data.tables.labels import RowLabels, read_labels
from funmatch.data.tables.table import ENDINGS, TEXTS, Table, holds_paths, list_below, read_table
from funmatch.errors import InputError, hide_secrets
from funmatch.runtime.addresses import is_address
from funmatch.runtime.text import counted

REMOTE = Wanted(f"({'|'.join(map(re.escape, ENDINGS))})$")
"""Which files of an address are read."""
FILES = tuple(f"*{ending}" for ending in TEXTS)
"""Patterns of the files that are always manifests; those of parquet may hold the images themselves."""


@dataclass(frozen=True)
class _Rows:
    """The rows of a table that are read.

    Attributes:
        names: paths as the table has them.
        paths: where the files are.
        kept: rows that count, in the order of their paths: of several of one image, the first.
        notes: about rows that do not count.
    """

    names: Sequence[str]
    paths: Sequence[str]
    kept: np.ndarray
    notes: tuple[str, ...] = ()


def is_manifest(spec: str) -> bool:
    """Returns whether a spec without a prefix is a file on this machine that names images by their paths."""
    return holds_paths(Path(spec).expanduser(), PATHS)


def open_manifest(location: str, options: ReadOptions, track: Track = untracked) -> Dataset:
    """Lists the images that a table names, as a folder of the same images would be listed.

    Within a split, images are in the order of their classes and paths, whatever the order of the rows, so that the same
    images in folders are the same data set. An image that has several equal rows counts once.

    Args:
        location: of a CSV or parquet file, or an address.
        options: for columns, class names, and the folder that paths are relative to; without one, the table's own.
        track: shows progress.

    Raises:
        InputError: the table cannot be read or contradicts itself, or names files that are not there.
    """
    path, shown = _locate(location, options, track)
    table = read_table(path, shown)
    columns = find_columns(table, options)
    if not len(table.lines):
        raise InputError(f"{shown} has no rows; expected a row for each image")
    splits = read_splits(table, columns.split)
    labels = read_labels(table, columns, options)
    root = str(options.image_root.expanduser()) if options.image_root else os.path.dirname(str(path))
    rows = _read_rows(table, columns, root, labels, splits)
    if is_address(location):
        _check_inside(table, rows, root)
    _check_files(table, rows, root, options, track)
    chosen, notes = _list_splits(table, rows, labels, splits, options)
    numbers, sets = _number_labels(labels, chosen, options)
    paths = {split: [rows.paths[row] for row in own] for split, own in chosen.items()}
    listings = {split: SplitListing([rows.names[row] for row in own], numbers[split]) for split, own in chosen.items()}

    def read(split: str, index: int) -> bytes:
        return read_file(paths[split][index])

    notes = [*columns.notes, *labels.notes, *rows.notes, *notes]
    # Of several classes an image, labels are the numbers of sets.
    notes += class_notes(shown, labels.classes, listings) if sets is None else []
    own = [str(path), *([str(options.class_file.expanduser())] if options.class_file else [])]
    watched = [*own, *(each for split in paths.values() for each in split)]
    return Dataset(
        path.stem, labels.classes, listings, read, watched, unnamed=bool(labels.classes) and labels.unnamed,
        notes=tuple(notes), location=shown, lacking="" if options.unlabelled else labels.lacking, root=root,
        label_sets=sets,
    )  # fmt: skip


def _locate(location: str, options: ReadOptions, track: Track) -> tuple[Path, str]:
    """Returns the path of a table, and the path or address for messages."""
    if not is_address(location):
        return Path(location).expanduser(), location
    shown = hide_secrets(location)
    if options.image_root is None:
        raise InputError(
            f"{shown}: the paths in a table on a server are relative to a folder here; pass it as --image-root"
        )
    found = fetch(location, REMOTE, track)
    if len(found.files) != 1:
        raise InputError(f"{shown} names {len(found.files)} tables; pass one")
    return found.files[0], shown


def _read_rows(table: Table, columns: Columns, root: str, labels: RowLabels, splits: Sequence[str]) -> _Rows:
    """Finds the files of the rows, and the rows that say the same of one image.

    Raises:
        InputError: a row has no path, or two rows contradict each other.
    """
    names = [_as_path(table, row, cell) for row, cell in enumerate(table.column(columns.path))]
    paths = [os.path.join(root, name) for name in names]
    # Windows's separators, where the file's name does not have them itself.
    for row in [row for row, name in enumerate(names) if "\\" in name and not os.path.exists(paths[row])]:
        names[row] = names[row].replace("\\", "/")
        paths[row] = os.path.join(root, names[row])
    plain = [os.path.normpath(path) for path in paths]
    first: dict[str, int] = {}
    repeated, contradictory = 0, []
    for row, path in enumerate(plain):
        other = first.setdefault(path, row)
        if other == row:
            continue
        repeated += 1
        if labels.sets[other] != labels.sets[row] or splits[other] != splits[row]:
            contradictory.append((other, row))
    if contradictory:
        raise InputError(_describe_contradictions(table, names, contradictory, labels, splits))
    kept = np.array([row for _, row in sorted(first.items())], np.int64)
    note = f"{table.shown}: {counted(repeated, 'row')} that repeat another count once" if repeated else ""
    return _Rows(names, paths, kept, (note,) if note else ())


def _as_path(table: Table, row: int, cell: object) -> str:
    # Nearly every cell of a million: without a colon it is no address.
    if isinstance(cell, str) and cell and cell[0] != "~" and ":" not in cell and "\0" not in cell:
        return cell
    problem = ""
    if not isinstance(cell, str):
        problem = "the path is a list"
    elif not cell:
        problem = "the path is empty"
    elif "\0" in cell:
        problem = "the path has a zero byte"
    elif is_address(cell) or cell.lower().startswith(("file://", "data:")):
        problem = f"{hide_secrets(cell)[:80]!r} is an address; download the images, and write the paths of the copies"
    if problem:
        raise InputError(f"{table.shown}, {table.place(row)}: {problem}")
    return os.path.expanduser(str(cell))


def _describe_contradictions(
    table: Table,
    names: Sequence[str],
    pairs: Sequence[tuple[int, int]],
    labels: RowLabels,
    splits: Sequence[str],
) -> str:
    def about(row: int) -> str:
        own = ", ".join(labels.classes[i] for i in labels.sets[row]) or "no label"
        return f"{own} in {splits[row]} ({table.place(row)})"

    title = f"{table.shown}: {counted(len(pairs), 'row')} that contradict another row of the same image; keep one"
    return list_below(title, [f"{names[row]}: {about(other)}, {about(row)}" for other, row in pairs])


def _check_inside(table: Table, rows: _Rows, root: str) -> None:
    """Raises `InputError` for a table from a server with a path that leads out of the folder of images."""
    inside = os.path.normpath(root) + os.sep
    for row in rows.kept:
        if not os.path.normpath(rows.paths[row]).startswith(inside):
            raise InputError(
                f"{table.shown}, {table.place(row)}: {rows.names[row]!r} leads out of --image-root {root}; a table "
                "from a server names files in there alone"
            )


def _check_files(table: Table, rows: _Rows, root: str, options: ReadOptions, track: Track) -> None:
    """Raises `InputError` that lists the files which are not there, unless these are to be skipped."""
    bad: list[tuple[int, str]] = []
    for row in track(rows.kept.tolist(), len(rows.kept), "looking for images"):
        try:
            mode = os.stat(rows.paths[row]).st_mode
        except OSError as error:
            bad.append((row, "is missing" if isinstance(error, FileNotFoundError) else str(error.strerror)))
            continue
        if not stat.S_ISREG(mode):
            bad.append((row, "is a folder" if stat.S_ISDIR(mode) else "is not a regular file"))
    # With --on-bad skip, the rest is read, and those that are not there are reported with what cannot be decoded.
    if not bad or (options.on_bad == "skip" and len(bad) < len(rows.kept)):
        return
    bad.sort()
    first = rows.paths[bad[0][0]]
    endings = [ending for ending in sorted(EXTENSIONS) if os.path.isfile(first + ending)]
    advice = f"there is {first}{endings[0]}, so add the endings to the paths" if endings else "fix or remove these rows"
    skip = ", or pass --on-bad skip" if len(bad) < len(rows.kept) else ""
    title = (
        f"{table.shown}: {len(bad):,} of {counted(len(rows.kept), 'image')} cannot be read; paths are relative to "
        f"{root or 'this folder'} (--image-root sets another); {advice}{skip}"
    )
    raise InputError(list_below(title, [f"{table.place(row)}: {rows.paths[row]} {reason}" for row, reason in bad]))


def _list_splits(
    table: Table, rows: _Rows, labels: RowLabels, splits: Sequence[str], options: ReadOptions
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns the rows of each split in the order of its images, and notes."""
    firsts = labels.firsts[rows.kept]
    places = np.array([ORDER.index(split) for split in splits], np.uint8)[rows.kept]
    chosen, notes = {}, []
    for place in np.unique(places):
        name, own, numbers = ORDER[place], rows.kept[places == place], firsts[places == place]
        if labels.classes and (numbers == UNLABELLED).all():
            notes.append(f"{table.shown}: no label in the rows of {name}, which is taken as unlabelled")
        if options.task != "multilabel":
            _check_whole(table, own, numbers, name)
            # Stable: within a class, images stay in the order of their paths.
            own = own[np.argsort(numbers, kind="stable")]
        chosen[name] = own
    return chosen, notes


def _number_labels(
    labels: RowLabels, chosen: dict[str, np.ndarray], options: ReadOptions
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """Returns the labels of each split, and the sets of classes that they number, of several classes an image."""
    if options.task != "multilabel" or not labels.classes:
        return {split: labels.firsts[rows] for split, rows in chosen.items()}, None
    sets = {split: [labels.sets[row] for row in rows] for split, rows in chosen.items()}
    # A row without classes shows none of them, but where no row of the split has any.
    known: dict[str, Sets] = {split: own if any(own) else [None] * len(own) for split, own in sets.items()}
    return number_sets(known, len(labels.classes))


def _check_whole(table: Table, chosen: np.ndarray, labels: np.ndarray, split: str) -> None:
    """Raises `InputError` where some rows of a split have a label and others none."""
    without = chosen[labels == UNLABELLED]
    if 0 < len(without) < len(chosen):
        raise InputError(
            f"{table.shown}, {table.place(int(without.min()))}: there is no label, though other rows of {split} have "
            f"one ({counted(len(without), 'such row')}); pass --unlabelled to ignore labels, or keep the rows without "
            "one in a table of their own"
        )
