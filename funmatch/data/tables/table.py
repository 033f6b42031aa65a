"""Reads tables of texts: CSV as spreadsheets and programs write it, and parquet."""

import csv
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from funmatch.data.dataset import NAMED_AT_MOST, read_file
from funmatch.errors import InputError, first_line
from funmatch.runtime.text import counted, decode

TEXTS = (".csv", ".tsv")
ENDINGS = (*TEXTS, ".parquet")
DELIMITERS = (",", ";", "\t", "|")
NAMED = 20  # lines or columns that a message names

Cell = str | tuple[str, ...]
"""A text, empty where there is nothing; several where a column of parquet holds lists."""


@dataclass(frozen=True)
class Table:
    """A table whose columns are read when they are asked for.

    Attributes:
        shown: its path, for messages.
        names: of the columns, in their order.
        lines: number of each row's line in the file, or of the row where the file has no lines, from 1.
        unit: what `lines` count: line or row.
        read: index of a column to its cells.
    """

    shown: str
    names: tuple[str, ...]
    lines: Sequence[int]
    unit: str
    read: Callable[[int], list[Cell]]

    def column(self, name: str) -> list[Cell]:
        """Returns the cells of a column, without blanks around them."""
        return self.read(self.names.index(name))

    def place(self, row: int) -> str:
        """Returns a row's place in the file, for messages."""
        return f"{self.unit} {self.lines[row]}"


def list_below(title: str, lines: Sequence[str]) -> str:
    """Lists lines below a title, for messages: the first of them, and how many more there are."""
    more = [f"… and {len(lines) - NAMED_AT_MOST:,} more"] if len(lines) > NAMED_AT_MOST else []
    return "\n  ".join([f"{title}:", *lines[:NAMED_AT_MOST], *more])


def read_table(path: Path, shown: str) -> Table:
    """Reads a table.

    CSV may be separated by commas, semicolons, tabs or bars, end its lines in any way, and be of UTF-8 or, with its
    mark, of UTF-16. Its first line names the columns.

    Args:
        path: of the file.
        shown: the path as messages call it.

    Raises:
        InputError: it cannot be read, is empty, or has rows of other lengths than the first line.
    """
    if path.suffix.lower() not in ENDINGS:
        raise InputError(f"{shown}: expected a table that ends in {', '.join(ENDINGS)}")
    try:
        return _read_text(path, shown) if path.suffix.lower() in TEXTS else _read_parquet(path, shown)
    except FileNotFoundError:
        raise InputError(f"there is no file {shown}") from None
    except OSError as error:
        raise InputError(f"{shown} cannot be read: {error.strerror or error}") from None


def _read_text(path: Path, shown: str) -> Table:
    try:
        text = _decode(read_file(path), shown)
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        # A folder, or a device.
        raise InputError(f"{shown} is {'a folder' if path.is_dir() else 'not a file'}; expected a table") from None
    # Spreadsheets write the separator into a line of its own.
    own = re.match(r"sep=(.)(\r\n|\r|\n)", text)
    start = own.end() if own else 0
    delimiter = own[1] if own else _find_delimiter(text)
    reader = csv.reader(
        io.StringIO(text[start:], newline=""), delimiter=delimiter, skipinitialspace=delimiter != "\t", strict=True
    )
    rows: list[list[str]] = []
    lines: list[int] = []
    last = first = 1 if own else 0
    try:
        for row in reader:
            # Of a row of several lines, which a quoted cell may have, the first one. Blank lines and the empty rows
            # that spreadsheets leave at the end are none.
            if any(row):
                rows.append(row)
                lines.append(last + 1)
            last = first + reader.line_num
    except csv.Error as error:
        raise InputError(
            f"{shown}, line {last + 1}: {error}; a quote that belongs to a cell is doubled, and the cell is quoted"
        ) from None
    if not rows:
        raise InputError(f"{shown} is empty; expected a line of columns, e.g. path,label, and a line for each image")
    _check_lengths(rows, lines, shown, delimiter)
    names = tuple(name.strip() for name in rows[0])

    def read(index: int) -> list[Cell]:
        return [_without_mark(row[index].strip()) for row in rows[1:]]

    return Table(shown, names, lines[1:], "line", read)


def _without_mark(cell: str) -> str:
    """Returns a cell without the apostrophe by which tables keep spreadsheets from running a text as a formula."""
    return cell[1:] if cell[:1] == "'" and cell[1:2] in ("=", "+", "-", "@") else cell


def _decode(content: bytes, shown: str) -> str:
    try:
        text = decode(content)
    except UnicodeDecodeError as error:
        raise InputError(f"{shown} is damaged: {error.reason} at byte {error.start}") from None
    if "\0" in text:
        raise InputError(f"{shown} has zero bytes, so it is not a table of text; save it as CSV in UTF-8")
    return text


def _find_delimiter(text: str) -> str:
    """Returns the delimiter that the line of columns has most of; a comma where there is a single column."""
    first = next((line for line in re.split(r"\r\n|\r|\n", text[: 1 << 20]) if line.strip()), "")
    unquoted = re.sub(r'"[^"]*"', "", first)
    # The first of several as frequent ones.
    return max(DELIMITERS, key=unquoted.count)


def _check_lengths(rows: list[list[str]], lines: list[int], shown: str, delimiter: str) -> None:
    width = len(rows[0])
    odd = [(line, len(row)) for line, row in zip(lines, rows, strict=True) if len(row) != width]
    if odd:
        named = ", ".join(f"line {line} has {count}" for line, count in odd[:NAMED])
        more = f", and {len(odd) - NAMED:,} more" if len(odd) > NAMED else ""
        raise InputError(
            f"{shown}: {counted(len(odd), 'row')} of another length than the {width} columns of the first line: "
            f"{named}{more}; put cells that hold {delimiter!r} into quotes"
        )


def _read_parquet(path: Path, shown: str) -> Table:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"{shown} needs pyarrow; pip install 'funmatch[hf]'") from None
    try:
        file = parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise InputError(f"{shown} is not a parquet file, or damaged: {first_line(error)}") from None
    schema = file.schema_arrow

    def read(index: int) -> list[Cell]:
        name = schema.names[index]
        if _holds_images(pyarrow, schema.types[index]):
            raise InputError(f"{shown}: the column {name!r} holds images, not paths of files; pass hf:{shown}")
        try:
            values = file.read([name])[name].to_pylist()
            return [_as_text(value) for value in values]
        except (pyarrow.ArrowException, OSError, TypeError) as error:
            raise InputError(f"{shown}: the column {name!r} cannot be read: {first_line(error)}") from None

    return Table(shown, tuple(schema.names), range(1, file.metadata.num_rows + 1), "row", read)


def _holds_images(pyarrow: Any, kind: Any) -> bool:
    """Returns whether a column of this type holds the bytes of images."""
    types = pyarrow.types
    return types.is_struct(kind) or types.is_binary(kind) or types.is_large_binary(kind)


def _as_text(value: Any) -> Cell:
    if isinstance(value, list):
        return tuple(str(_as_text(each)) for each in value)
    # NaN is how tables of pandas hold nothing.
    if value is None or value != value:
        return ""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, int | float):
        return f"{value:.0f}" if float(value).is_integer() else repr(value)
    raise TypeError(f"expected texts or numbers, found {type(value).__name__}")


def holds_paths(path: Path, usual: Sequence[str]) -> bool:
    """Returns whether a file is a table of paths: CSV always, parquet if a column of texts has one of these names."""
    suffix = path.suffix.lower()
    if suffix not in ENDINGS or not path.is_file():
        return False
    if suffix in TEXTS:
        return True
    try:
        import pyarrow
        from pyarrow import parquet

        schema = parquet.read_schema(path)
    except Exception:  # it is told where the file is read
        return False
    names = {name.strip().lower() for name, kind in zip(schema.names, schema.types, strict=True)
             if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)}  # fmt: skip
    return bool(names & set(usual)) and not any(_holds_images(pyarrow, kind) for kind in schema.types)
