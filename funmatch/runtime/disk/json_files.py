"""Reads JSON files that may be damaged, nested too deep, of another shape, or of a newer format.

A file of ours that does not have its shape is `Damaged`, and its reader decides whether that is an error or whether
there is something else to use. One with a newer format number is always refused.

Records carry the checksum of their other values (`seal`), which `read_record` compares: a flipped bit leaves most JSON
valid. Records of earlier versions have none, and are read as they are.
"""

import json
import math
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from funmatch.errors import InputError, first_line

Shape = Any
"""A type, a union of types, a set of words, `list[type]`, `dict[str, type]`, `[shape]` of a list's items, a tuple of
shapes of as many items, or a dict of shapes by key: a key that ends with `?` may be missing, and EACH is all
keys that are not named."""
EACH = "*"
FORMAT = "format"
RUN_RECORD = "config.json"
"""The record of a run's folder: packages that know no runs recognise one by it."""
RUN_FORMAT = 1
RUN_SHAPE = {"verb": str, "knobs": dict[str, Any], "facts": dict[str, Any]}
CHECKSUM = "checksum"
"""The key of a record's checksum. Its meaning is that of `checksum_of` in records of every format."""
CRC = "crc32:"
"""With what the value of a checksum begins."""
DEEPEST = 64
"""Levels of lists and objects in a file of ours, at most; far below what overflows a recursive function's stack."""
LARGEST = 2**63
ESCAPED_HALF = re.compile(rb"\\u[dD][89a-fA-F]")
"""A half of a surrogate pair as JSON writes it."""


class Damaged(InputError):
    """A file of ours does not hold what it should."""


class NewerFormat(InputError):
    """A file was written by a newer version, which alone knows what it means."""


def parse_json(text: str | bytes, shape: Shape = Any) -> Any:
    """Reads JSON that may be damaged.

    Raises:
        ValueError: it is not JSON, nested too deep, or has another shape; the message says where.
    """
    try:
        # Bytes that are not UTF-8 raise UnicodeDecodeError, which is a ValueError like all other damage.
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"nested deeper than {DEEPEST} levels") from None
    # The parser gives up only at the end of its own stack; what walks the value later may need more stack a level.
    if _is_too_deep(value):
        raise ValueError(f"nested deeper than {DEEPEST} levels")
    if problem := misfit(value, shape):
        raise ValueError(problem)
    if ESCAPED_HALF.search(text if isinstance(text, bytes) else text.encode(errors="surrogatepass")):
        # Else it would fail where it is printed or written; the halves that stand for bytes of file names are fine.
        json.dumps(value, ensure_ascii=False).encode(errors="surrogateescape")
    return value


def read_json(path: Path, shape: Shape = Any) -> Any:
    """Reads a JSON file of ours.

    Raises:
        OSError: it is missing or cannot be read.
        Damaged: it is not JSON, or has another shape.
    """
    try:
        return parse_json(path.read_bytes(), shape)
    except ValueError as error:
        raise Damaged(f"{path} is damaged ({first_line(error)})") from None


def read_record(path: Path, shape: dict[str, Shape], number: int, advice: str, *, closed: bool = False) -> Any:
    """Reads a JSON file that has a format number.

    Args:
        number: of the format that this version reads and writes.
        advice: what to do about a newer one.
        closed: whether keys that the shape does not name are damage.

    Returns:
        the record, without its checksum.

    Raises:
        OSError: it is missing or cannot be read.
        NewerFormat: a newer version wrote it.
        Damaged: it is not JSON, has another shape, or does not match its checksum.
    """
    # The checksum first: a flipped bit in the format number must not pass for a newer format.
    record = unseal(read_json(path, dict[str, Any]), path)
    # Before its shape, which a newer version may have changed.
    found = record.get(FORMAT, 1)
    if isinstance(found, int) and found > number:
        raise NewerFormat(newer(path.parent, found, number, advice))
    allowed = {name.removesuffix("?") for name in shape} | {FORMAT}
    extra = sorted(record.keys() - allowed) if closed else []
    problem = f"unknown key {_name(extra[0])}" if extra else misfit(record, shape | {f"{FORMAT}?": int})
    if problem or found < 1:
        raise Damaged(f"{path} is damaged ({problem or f'format {found}'})")
    return record


def checksum_of(record: Mapping[str, Any]) -> str:
    """Returns the checksum of a record's values, whatever the order of its keys and the space between them."""
    text = json.dumps({key: value for key, value in record.items() if key != CHECKSUM}, sort_keys=True)
    return f"{CRC}{zlib.crc32(text.encode()):08x}"


def seal(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a record as it reads back from JSON, with its checksum."""
    # Read back first: JSON has no keys but text and no tuples, and the checksum is that of what a reader gets.
    plain = json.loads(json.dumps(record))
    return {**plain, CHECKSUM: checksum_of(plain)}


def unseal(record: dict[str, Any], path: Path) -> dict[str, Any]:
    """Returns a record without its checksum; one that has none, as those of earlier versions, as it is.

    Raises:
        Damaged: it does not match its checksum.
    """
    # By its value, too: a flipped bit in the key must not make the record one without a checksum.
    marks = [key for key, value in record.items() if key == CHECKSUM or (isinstance(value, str) and CRC in value[:8])]
    if marks and record.get(CHECKSUM) != checksum_of(record):
        raise Damaged(
            f"{path} is damaged (its values do not match its checksum; if you changed them, remove its {CHECKSUM!r})"
        )
    return {key: value for key, value in record.items() if key != CHECKSUM}


def newer(what: object, found: int, number: int, advice: str) -> str:
    """Returns the message about a format that a newer version wrote."""
    return (
        f"{what} was written by a newer funmatch (format {found}; this version reads format {number}); "
        f"upgrade funmatch or {advice}"
    )


def misfit(value: Any, shape: Shape, where: str = "it") -> str | None:
    """Describes the first part of a value that does not have its shape; returns None if all parts have."""
    if isinstance(shape, dict) or get_origin(shape) is dict:
        if not isinstance(value, dict):
            return f"{where} is not an object"
        named = shape if isinstance(shape, dict) else {EACH: get_args(shape)[1]}
        for key in named:
            if not key.endswith("?") and key not in (EACH, *value):
                return f"{key!r} is missing"
        inner = {key.removesuffix("?"): each for key, each in named.items() if key != EACH}
        rest = named.get(EACH, Any)
        found = (misfit(each, inner.get(key, rest), _name(key)) for key, each in value.items())
        return next((problem for problem in found if problem), None)
    if isinstance(shape, tuple):
        if not isinstance(value, list) or len(value) != len(shape):
            return f"{where} is not a list of {len(shape)}"
        pairs = zip(value, shape, strict=True)
        return next((problem for each, inner in pairs if (problem := misfit(each, inner, where))), None)
    if isinstance(shape, list) or get_origin(shape) is list:
        inner = shape[0] if isinstance(shape, list) else get_args(shape)[0]
        if not isinstance(value, list):
            return f"{where} is not a list"
        return next((problem for each in value if (problem := misfit(each, inner, where))), None)
    if isinstance(shape, UnionType):
        problems = [misfit(value, each, where) for each in get_args(shape)]
        return None if None in problems else problems[0]
    fits = isinstance(value, str) and value in shape if isinstance(shape, set) else _is_of(value, shape)
    return None if fits else f"{where} is {_short(value)}"


def _is_of(value: Any, kind: Any) -> bool:
    """Returns whether a JSON value is of a type; numbers are finite and fit 64 bits, and integers count as floats."""
    if kind is Any:
        return True
    if kind in (int, float):
        # Python counts True as an int; `true` in a file is not a number.
        if isinstance(value, bool) or not isinstance(value, int | kind):
            return False
        # Python reads NaN, Infinity and 1e999 as floats, though JSON has no such numbers.
        return abs(value) < LARGEST if isinstance(value, int) else math.isfinite(value)
    return value is None if kind in (None, type(None)) else isinstance(value, kind)


def _is_too_deep(value: Any) -> bool:
    # Level by level, not recursively: the value may be deeper than the stack.
    level = [value]
    for _ in range(DEEPEST):
        level = [
            each
            for one in level
            if isinstance(one, dict | list)
            for each in (one.values() if isinstance(one, dict) else one)
            if isinstance(each, dict | list)
        ]
        if not level:
            return False
    return True


def _name(key: str) -> str:
    """A key, or its beginning, for a message."""
    return repr(key if len(key) <= 40 else f"{key[:40]}…")


def _short(value: Any) -> str:
    """Returns the beginning of a value, for a message."""
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
