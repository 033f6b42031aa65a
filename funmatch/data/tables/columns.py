"""Finds the columns of a table that hold the paths of images, their labels and their splits."""

from collections.abc import Sequence
from dataclasses import dataclass

from funmatch.data.dataset import ReadOptions
from funmatch.data.decode import EXTENSIONS
from funmatch.data.readers.folder_listing import ending
from funmatch.data.readers.split_names import SPLIT_NAMES, says_split
from funmatch.data.tables.table import Cell, Table
from funmatch.errors import InputError, unknown

NONE = "none"
"""Value of an option for a column that says not to read one."""
PATHS = (
    "path", "file", "filename", "image", "file_name", "filepath", "file_path", "image_path", "img_path", "image_file",
    "image_name", "img", "img_name", "picture", "photo", "paths", "files", "filenames", "images",
)  # fmt: skip
LABELS = (
    "label", "class", "target", "species", "labels", "class_name", "classname", "category", "cls", "fine_label",
    "label_name", "class_id", "targets", "classes", "breed",
)  # fmt: skip
SPLITS = ("split", "set", "subset", "data_set", "dataset_split", "partition")


@dataclass(frozen=True)
class Columns:
    """The columns of a table that are read.

    Attributes:
        path: of the images.
        label: None without one.
        split: None without one.
        notes: about columns that were chosen among several.
        lacking: why there is no column of labels though one was named; else empty.
    """

    path: str
    label: str | None
    split: str | None
    notes: tuple[str, ...] = ()
    lacking: str = ""


def find_columns(table: Table, options: ReadOptions) -> Columns:
    """Finds the columns of a table: by the options, else by their usual names.

    Raises:
        InputError: there is no column of paths, or none of a name that was given.
    """
    notes: list[str] = []
    path = _find(table, options.image_feature, PATHS, "path", notes)
    if path is None:
        raise InputError(_no_paths(table))
    lacking, label = "", None
    try:
        label = None if options.unlabelled else _find(table, options.label_feature, LABELS, "label", notes)
    except InputError as error:
        # No error yet: another source of the same command may have the labels.
        lacking = str(error)
    split = _find(table, options.split_column, SPLITS, "split", notes)
    for name in {path, label, split} - {None}:
        if table.names.count(name or "") > 1:
            raise InputError(f"{table.shown} has two columns {name!r}; rename one")
    return Columns(path, label, split, tuple(notes), lacking)


def _find(table: Table, given: str | None, usual: Sequence[str], kind: str, notes: list[str]) -> str | None:
    """Returns the name of a column, None without one."""
    if given == NONE and NONE not in table.names and kind != "path":
        return None
    if given:
        if given in table.names:
            return given
        raise unknown(
            f"column of {table.shown}", given, table.names,
            hint=f"--{kind}-column names the column of {kind}s",
        )  # fmt: skip
    plain = {name.lower().replace(" ", "_").replace("-", "_"): name for name in reversed(table.names)}
    first, *others = [plain[name] for name in usual if name in plain] or [None]
    if others:
        more = ", ".join(str(name) for name in others)
        notes.append(f"{table.shown}: the {kind} is read from {first}, not {more}; choose with --{kind}-column")
    return first


def _no_paths(table: Table) -> str:
    if any(ending(name) in EXTENSIONS for name in table.names):
        return (
            f"{table.shown}: the first line ({', '.join(table.names[:3])}) is of an image; put a line with the names "
            "of the columns before it, e.g. path,label"
        )
    return (
        f"{table.shown} has no column of paths, but: {', '.join(map(repr, table.names))}; name it by --path-column, or "
        "path"
    )


def read_splits(table: Table, column: str | None) -> list[str]:
    """Returns the split of each row, train without a column.

    Raises:
        InputError: a cell names no split.
    """
    if column is None:
        return ["train"] * len(table.lines)
    cells = table.column(column)
    found = {cell: _split_of(cell) for cell in dict.fromkeys(cells)}
    if odd := [cell for cell, split in found.items() if split is None]:
        first = cells.index(odd[0])
        raise InputError(
            f"{table.shown}, {table.place(first)}: the column {column!r} has {', '.join(map(repr, odd[:5]))}"
            f"{', …' if len(odd) > 5 else ''}; expected train, val or test, or --split-column none"
        )
    # As for folders: beside a validation split, "evaluation" is the final one; alone, it is what is evaluated on.
    taken = set(found.values())
    if "eval" in taken and {"val", "test"} <= taken:
        raise InputError(f"{table.shown}: the column {column!r} has val, test and evaluation; rename one of them")
    of_eval = "test" if "val" in taken else "val"
    return [of_eval if found[cell] == "eval" else str(found[cell]) for cell in cells]


def _split_of(cell: Cell) -> str | None:
    if not isinstance(cell, str):
        return None
    return SPLIT_NAMES.get(cell.lower()) or says_split(cell)
