"""Defines the types that options share, and checks values that are not typed on a command line.

Words of a command line are text, and become what an option needs. Values from Python, TOML or YAML have types of their
own, and pydantic would turn True into 1.0 and "4" into 4. Here these are mistakes.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BeforeValidator, TypeAdapter
from pydantic.fields import FieldInfo

from funmatch.errors import hide_secrets
from funmatch.runtime.text import parse_seconds


def _as_text(value: Any) -> Any:
    # Python and TOML write a share as a number, the command line as text; as text both compare equal.
    return str(value) if isinstance(value, int | float) else value


def _as_names(value: Any) -> Any:
    # A single name stands for a list of one, which pydantic alone would refuse.
    if value is None or isinstance(value, str | Path):
        value = () if value is None else (value,)
    # Of an address only what may be recorded: how it was given with a password, `runtime.addresses` knows.
    return tuple(hide_secrets(str(each)) for each in value) if isinstance(value, list | tuple) else value


def _as_place(value: Any) -> Any:
    if value == "":
        raise ValueError("an empty path names no file")  # it would be the current folder
    # Not a path object, which would take one of the two slashes of an address.
    return hide_secrets(str(value)) if isinstance(value, str | Path) else value


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, int | float) else value


def _as_pairs(value: Any) -> Any:
    if isinstance(value, dict):
        value = [f"{key}={native(option)!r}" for key, option in value.items()]
    value = [value] if isinstance(value, str) else value
    return tuple(map(_canonical, value)) if isinstance(value, list | tuple) else value


def _canonical(option: Any) -> Any:
    """`channels=16,32` as `channels=(16, 32)`: one spelling for each value, so that equal options compare equal."""
    key, equals, value = str(option).partition("=")
    try:
        parsed = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return option
    # Strings without their quotes, as the command line writes them: act=relu and act='relu' are one value.
    return f"{key}{equals}{parsed if isinstance(parsed, str) else repr(parsed)}"


Share = Annotated[str | None, BeforeValidator(_as_text)]
"""`10%`, `0.1` or a number of images."""
Timeout = Annotated[str, BeforeValidator(_as_text)]
"""A duration: `8h30m`, `12:00:00` or a number of seconds."""
Duration = Annotated[str | None, BeforeValidator(_as_text)]
"""The same, or None."""
Names = Annotated[tuple[str, ...], BeforeValidator(_as_names)]
"""One name or path, or several."""
Pairs = Annotated[tuple[str, ...], BeforeValidator(_as_pairs)]
"""`key=value` each, or a dictionary."""
Place = Annotated[str | None, BeforeValidator(_as_place)]
"""The path of a file, or its address; or None."""
Integers = Annotated[tuple[int, ...], BeforeValidator(_as_tuple)]
Numbers = Annotated[tuple[float, ...], BeforeValidator(_as_tuple)]
Precision = Literal["auto", "fp32", "bf16", "fp16"]

ONE = {bool: "true or false", int: "a whole number", float: "a number", Path: "a path", str: "a string"}
MANY = {bool: "truth values", int: "whole numbers", float: "numbers", Path: "paths", str: "strings"}


def duration_problems(name: str, value: str | None) -> list[str]:
    """What is wrong with a duration, as a list of one sentence or none."""
    try:
        if value is not None and not 0 < parse_seconds(value) < float("inf"):
            return [f"{name} must be longer than 0 seconds, got {value}"]
    except ValueError as error:
        return [f"{name}: {error}"]
    return []


@dataclass(frozen=True)
class Kind:
    """What values an option takes.

    Attributes:
        types: of a value, or of each where there may be several.
        choices: the texts that are allowed, where only some are.
        several: whether it takes a list; a single value then stands for a list of one.
        count: how many values the list has, where that is fixed.
        optional: whether it may be None.
        pairs: whether a dictionary may stand for `key=value` each.
    """

    types: frozenset[type]
    choices: tuple[str, ...]
    several: bool
    count: int | None
    optional: bool
    pairs: bool

    @property
    def description(self) -> str:
        """The kind in words."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        words = MANY if self.several else ONE
        # A whole number is a number.
        types = self.types - {int} if float in self.types else self.types
        # In the order of the table, not of the set, so that a message is the same in every process.
        named = " or ".join(words[each] for each in words if each in types)
        if not self.several:
            return named
        return f"{self.count} {named}" if self.count else f"a list of {named}"

    def accepts(self, value: Any) -> bool:
        """Whether a value is of this kind."""
        if value is None:
            # None stands for an empty list, too: it is Python's word for nothing. A pair is never empty.
            return self.optional or (self.several and not self.count)
        if isinstance(value, dict):
            return self.pairs
        if isinstance(value, list | tuple):
            fits = self.several and (self.count is None or self.count == len(value))
            return fits and all(self._is_one(each) for each in value)
        # A single value may stand for a list of one, but not for a pair.
        return self.count in (None, 1) and self._is_one(value)

    def _is_one(self, value: Any) -> bool:
        # Before numbers: True is an integer to Python.
        if is_truth(value):
            return bool in self.types
        # The abstract classes: NumPy's int64 and float32 are neither `int` nor `float`.
        if isinstance(value, Integral):
            return bool(self.types & {int, float})
        if isinstance(value, Real):
            return float in self.types
        if isinstance(value, str):
            # An empty path would be the current folder.
            is_path = self.types == {Path} and value != ""
            return value in self.choices or is_path or str in self.types
        # A name may be a path, of images or of a model.
        return isinstance(value, Path) and bool(self.types & {str, Path})


def is_truth(value: Any) -> bool:
    """Whether a value is a truth value, Python's or NumPy's."""
    # By the name of its type, which NumPy 2 has changed: this module does without NumPy.
    kind = type(value)
    return isinstance(value, bool) or (kind.__module__ == "numpy" and kind.__name__ in ("bool", "bool_"))


def native(value: Any) -> Any:
    """A value with Python's own numbers, truth values and strings in the place of NumPy's."""
    if isinstance(value, list | tuple):
        return type(value)(map(native, value)) if type(value) in (list, tuple) else value
    # Truth values first: `int` would turn them into 0 and 1.
    if is_truth(value):
        return bool(value)
    if isinstance(value, Real):
        return int(value) if isinstance(value, Integral) else float(value)
    return f"{value}" if isinstance(value, str) else value


def kind_of(field: FieldInfo) -> Kind:
    """The kind of values that a field takes."""
    kind: Any = field.annotation
    members = get_args(kind) if type(None) in get_args(kind) else (kind,)
    optional = type(None) in members
    # By the converters, since the annotation of a share is that of any text.
    converters = {each.func for each in field.metadata if isinstance(each, BeforeValidator)}
    types: set[type] = {int, float} if _as_text in converters else set()
    choices: tuple[str, ...] = ()
    several, count = False, None
    for member in members:
        if get_origin(member) is tuple:
            # All members of a tuple have one type in our tables.
            inner = get_args(member)
            several, count = True, None if inner[-1] is Ellipsis else len(inner)
            types.add(inner[0])
        elif get_origin(member) is Literal:
            choices = get_args(member)
        elif member is not type(None):
            # In Python a path object may name a file, too.
            types.add(Path if _as_place in converters else member)
    return Kind(frozenset(types), choices, several, count, optional, _as_pairs in converters)


def type_problem(field: FieldInfo, value: Any) -> str | None:
    """What was wanted and what came, where a value is of another type than an option's; None where it fits."""
    kind = kind_of(field)
    if kind.accepts(value):
        return None
    # Quotes alone are easily missed, as in "4" for 4; among choices the message is plain without it.
    text = " (a string)" if isinstance(value, str) and not kind.choices else ""
    return f"wanted {kind.description}, got {value!r}{text}"


def normalised(field: FieldInfo, value: Any) -> Any:
    """A value that fits, of Python's own types: lists for several values, no path objects, no numbers of NumPy."""
    # pydantic takes no Path for a name of a model or of images, which may be a path, and no integers of NumPy.
    kind = kind_of(field)
    if value is None:
        return None if kind.optional else []
    # A dictionary of pairs stays one: `_as_pairs` needs its keys.
    if kind.several and not isinstance(value, list | tuple | dict):
        value = [value]
    if isinstance(value, list | tuple):
        return list(_plain(value))
    # `_plain` leaves dictionaries alone.
    return next(_plain([value]))


def converted(field: FieldInfo, value: Any) -> Any:
    """A value that fits, as a table holds it: tuples for several values, path objects for paths."""
    # pydantic keeps the converters apart from the annotation; without them names and pairs would not be converted.
    kind: Any = Annotated[(field.annotation, *field.metadata)]  # pyrefly: ignore[not-a-type]
    return TypeAdapter(kind).validate_python(normalised(field, value))


def _plain(values: list[Any] | tuple[Any, ...]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, Path):
            yield str(value)
        else:
            yield native(value)
