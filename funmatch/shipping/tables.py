"""Writes rows as CSV, JSON lines or parquet, to standard output or to a file that is complete or absent."""

import csv
import io
import json
import math
import os
import re
import stat
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, Protocol

from funmatch.errors import InputError
from funmatch.runtime.disk.files import disk_errors, open_atomically

ENDINGS = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
"""Format of a file by the ending of its name."""
NEEDS_PYARROW = "parquet files need pyarrow; pip install 'funmatch[ship]', or choose csv or jsonl"
FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""First characters of a cell that spreadsheets may run as a formula."""
UNSAFE_IN_JSON = re.compile("[\ud800-\udfff\x85\u2028\u2029]")
"""Lone surrogates, which UTF-8 cannot hold, and separators at which some readers of lines would cut a line."""
ROW_GROUP = 8192
"""Rows that a parquet file holds together, and that wait in memory until they are written."""

Row = Mapping[str, Any]
"""A cell for each column: text, a number, True or False, a list or array of these, or None for an empty cell."""


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        name: its name.
        kind: type of a cell; in a list, of each element.
        several: whether a cell holds a list, which CSV files cannot hold.
        size: length of the lists, where all are as long; 0 for any.
    """

    name: str
    kind: type[str] | type[float] | type[bool]
    several: bool = False
    size: int = 0


class Table(Protocol):
    """A table that is being written."""

    def write(self, rows: Sequence[Row]) -> None:
        """Appends rows, which have a key for every column."""
        ...

    def close(self) -> None:
        """Writes what is still in memory."""
        ...

    def abandon(self) -> None:
        """Ends without writing more, after an error."""
        ...


class CSVTable:
    """UTF-8 without a byte order mark, lines that end in \\n, cells quoted where they need it.

    Text that begins as a formula gets an apostrophe before it, which spreadsheets do not show. Bytes of names that are
    not UTF-8 are written as \\udcNN, so that the file can be read.
    """

    def __init__(self, file: IO[bytes], columns: Sequence[Column]) -> None:
        self.file, self.columns = file, columns
        self.write_lines([[column.name for column in columns]])

    def write(self, rows: Sequence[Row]) -> None:
        self.write_lines([[_csv_text(row[column.name]) for column in self.columns] for row in rows])

    def write_lines(self, lines: Sequence[Sequence[str]]) -> None:
        text = io.StringIO()
        plain = csv.writer(text, lineterminator="\n")
        # Before Python 3.13 a carriage return alone is not quoted, and readers would end the line at it.
        quoted = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
        for line in lines:
            (quoted if any("\r" in cell for cell in line) else plain).writerow(line)
        self.file.write(text.getvalue().encode(errors="backslashreplace"))
        # At once: who reads a pipe shall see the first rows while the others are computed.
        self.file.flush()

    def close(self) -> None:
        pass

    def abandon(self) -> None:
        pass


class JSONTable:
    """One JSON object a line, exact: names whose bytes are not UTF-8 are read back as Python holds them."""

    def __init__(self, file: IO[bytes], columns: Sequence[Column]) -> None:
        self.file, self.columns = file, columns

    def write(self, rows: Sequence[Row]) -> None:
        lines = []
        for row in rows:
            cells = {column.name: _json_cell(row[column.name]) for column in self.columns}
            line = json.dumps(cells, ensure_ascii=False)
            lines.append(json.dumps(cells) if UNSAFE_IN_JSON.search(line) else line)
        self.file.write("".join(line + "\n" for line in lines).encode())
        self.file.flush()

    def close(self) -> None:
        pass

    def abandon(self) -> None:
        pass


class ParquetTable:
    """Parquet with a typed column each; NULL where a cell is empty."""

    def __init__(self, file: IO[bytes], columns: Sequence[Column]) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        plain = {str: pa.string(), float: pa.float32(), bool: pa.bool_()}
        kinds = {
            c.name: pa.list_(plain[c.kind], c.size or -1) if c.several else plain[c.kind]  # -1: of any length
            for c in columns
        }
        self.schema = pa.schema(list(kinds.items()))
        # Through Python's file, whose errors say that the disk is full.
        self.writer = parquet.ParquetWriter(file, self.schema)
        self.waiting: list[Row] = []

    def write(self, rows: Sequence[Row]) -> None:
        self.waiting += rows
        if len(self.waiting) >= ROW_GROUP:
            self._write_group()

    def close(self) -> None:
        if self.waiting:
            self._write_group()
        self.writer.close()

    def abandon(self) -> None:
        # Otherwise it would write its end into a closed file when it is collected.
        self.writer.is_open = False

    def _write_group(self) -> None:
        import pyarrow as pa

        arrays = [
            pa.array([_parquet_cell(row[field.name]) for row in self.waiting], type=field.type) for field in self.schema
        ]
        self.writer.write_table(pa.Table.from_arrays(arrays, schema=self.schema))
        self.waiting = []


FORMATS: dict[str, Callable[[IO[bytes], Sequence[Column]], Table]] = {
    "csv": CSVTable,
    "jsonl": JSONTable,
    "parquet": ParquetTable,
}


def pick_format(name: str | None, out: Path | None) -> str:
    """Returns the format: as named, else by the ending of the file, else CSV on standard output.

    Raises:
        InputError: the ending tells no format, parquet would go to standard output, or its library is not installed.
    """
    if name is None and out is not None:
        name = ENDINGS.get(out.suffix.lower())
        if name is None:
            raise InputError(f"--out {out} ends in none of {', '.join(ENDINGS)}; pass --format {'|'.join(FORMATS)}")
    if name == "parquet" and out is None:
        raise InputError("--format parquet needs --out FILE: a parquet file cannot be written to standard output")
    if name == "parquet" and find_spec("pyarrow") is None:
        raise InputError(NEEDS_PYARROW)
    return name or "csv"


def check_out(out: Path | None, *, overwrite: bool) -> None:
    """Raises `InputError` if a file cannot be written: it exists, or its place is not a folder."""
    if out is None:
        return
    if out.is_dir():
        raise InputError(f"--out {out} is a folder; name a file in it")
    if out.is_file() and not overwrite:
        raise InputError(f"--out {out} exists; pass --overwrite to replace it, or name another file")
    if blocking := next((parent for parent in out.parents if parent.exists() and not parent.is_dir()), None):
        raise InputError(f"cannot write --out {out}: {blocking} is a file; choose another folder")


@contextmanager
def open_table(out: Path | None, kind: str, columns: Sequence[Column]) -> Generator[Table]:
    """Yields a table to write rows to.

    Args:
        out: the file, which appears when the block succeeds; None for standard output.
        kind: a key of `FORMATS`.
        columns: the columns, in their order.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    with open_output(out) as file:
        table = FORMATS[kind](file, columns)
        try:
            yield table
            table.close()
        except BaseException:
            table.abandon()
            raise


@contextmanager
def open_output(out: Path | None) -> Generator[IO[bytes]]:
    """Yields a file to write to, under a temporary name until the block succeeds; None is standard output."""
    if out is None:
        # Bytes, since the table decides the encoding; the stream of a notebook takes text only.
        if (buffer := getattr(sys.stdout, "buffer", None)) is None:
            raise InputError("there is no standard output to write rows to here; pass --out FILE")
        yield buffer
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    # A pipe or a device has readers already, and a file that took its name would reach none of them.
    if out.exists() and not stat.S_ISREG(out.stat().st_mode):
        with disk_errors(out), open(out, "wb") as file:
            yield file
        return
    # Where a link leads to, so that the link stays one.
    with open_atomically(Path(os.path.realpath(out))) as file:
        yield file


def _csv_text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return f"'{value}" if value.startswith(FORMULA) else value
    return str(value).lower() if isinstance(value, bool) else short(value)


def short(number: float) -> str:
    """Formats a float32 by the fewest digits that give it back: 0.1, not 0.10000000149011612."""
    import numpy as np

    return str(np.float32(number))


def _json_cell(value: Any) -> Any:
    if isinstance(value, list):
        return [_json_cell(each) for each in value]
    if isinstance(value, float):
        # JSON has no NaN, which a diverged model gives.
        return float(short(value)) if math.isfinite(value) else None
    return value


def _parquet_cell(value: Any) -> Any:
    # Strings of parquet are UTF-8, which cannot hold the bytes of every file name.
    if isinstance(value, list):
        return [_parquet_cell(each) for each in value]
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value
