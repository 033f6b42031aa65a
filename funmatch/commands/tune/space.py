"""What a search may choose from: `lr=log:1e-5..3e-3`, `drop_rate=0..0.5`, `temperature=1,2,5,10`, read and checked."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Union, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

from funmatch.config import Train
from funmatch.config.options import alternatives
from funmatch.errors import InputError, unknown

Value = str | int | float | bool | None
"""What a knob is set to by a search."""
LARGEST, LARGEST_GRID = 10_000, 10**6
"""Choices that one knob may have, and combinations."""


@dataclass(frozen=True)
class Range:
    """The values of one knob.

    Attributes:
        choices: the values, if they are listed.
        low, high: the ends of the range, both in it, if they are not.
        log: whether the range is even in the logarithm.
        whole: whether only whole numbers of the range count.
    """

    choices: tuple[Value, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False

    def __contains__(self, value: object) -> bool:
        if self.choices:
            return value in self.choices
        return isinstance(value, int | float) and not isinstance(value, bool) and self.low <= value <= self.high

    @property
    def ends(self) -> tuple[Value, ...]:
        """All values, or the first and the last."""
        return self.choices or (self.low, self.high)


Space = Mapping[str, Range]


def read(words: Iterable[str], table: type[Train]) -> dict[str, Range]:
    """The space that words such as `lr=log:1e-5..3e-3` describe, in alphabetical order of its knobs.

    Args:
        table: of the verb whose knobs are searched.

    Raises:
        InputError: a knob that does not exist, that cannot be searched or comes twice; values that it cannot have.
    """
    found: dict[str, Range] = {}
    for word in words:
        typed, equals, values = word.partition("=")
        name = option_name(typed, table)
        if not equals or not values.strip():
            raise InputError(f"--space {word}: no values; write {name}=1,2,5, {name}=0.1..0.5 or {name}=log:1e-4..1e-2")
        if name in found:
            raise InputError(f"--space names {name} twice; list all of its values at once")
        found[name] = _span(name, values.strip(), table)
    return dict(sorted(found.items()))


def option_name(typed: str, table: type[Train]) -> str:
    """The knob that a person means: `optim.lr` and `lr`, `weight-decay` and `weight_decay`.

    Raises:
        InputError: there is none of that name, or no search may move it.
    """
    name = table.field_of(typed.strip().removeprefix("--").removeprefix("optim."))
    if name is None:
        raise unknown("option", typed, table.where(lambda opt: opt.is_searchable))
    if not table.opt(name).is_searchable:
        raise InputError(f"--space {typed}: {name} decides where or on what a run works, and cannot be searched")
    return name


def apply_choices(base: Train, chosen: Mapping[str, Value]) -> dict[str, Any]:
    """The knobs of a configuration with those that a search chose in their place."""
    knobs: dict[str, Any] = base.model_dump()
    for name, value in chosen.items():
        several = isinstance(knobs[name], tuple) or _is_tuple(type(base).model_fields[name].annotation)
        knobs[name] = (value,) if several else value
        knobs |= dict.fromkeys(alternatives(type(base), name))
    return knobs


def check(space: Space, base: Train) -> None:
    """Raises one `InputError` for all values that their knob cannot have, whatever the other knobs are."""
    found = []
    for name, span in space.items():
        for value in span.ends:
            table = type(base).model_validate(apply_choices(base, {name: value}))
            found += table.value_problems(name)
    if found:
        raise InputError("--space: " + "; ".join(dict.fromkeys(found)))


def combinations(space: Space) -> int:
    """The number of combinations of listed values: the size of a grid.

    Raises:
        InputError: a range, which a grid has no steps for, or too many combinations.
    """
    for name, span in space.items():
        if not span.choices:
            raise InputError(f"a grid needs listed values, but {name} is a range; write --space {name}=a,b,c")
    size = math.prod(len(span.choices) for span in space.values())
    if size > LARGEST_GRID:
        raise InputError(f"the grid has {size:,} combinations, more than {LARGEST_GRID:,}; say --sampler random")
    return size


def _span(name: str, values: str, table: type[Train]) -> Range:
    words = [word.strip() for word in values.split(",")]
    log = values.startswith("log:")
    ends = values.removeprefix("log:").split("..")
    kind = _element(table.model_fields[name].annotation)
    if len(ends) == 2 and len(words) == 1 and (log or _number(name, ends[0], kind) is not None):
        return _range(name, values, ends, kind, log=log)
    if log:
        raise InputError(f"--space {name}={values}: log: belongs to a range, e.g. {name}=log:1e-4..1e-2")
    choices = tuple(dict.fromkeys(_parsed(name, word, kind) for word in words))
    if len(choices) != len(words):
        raise InputError(f"--space {name}={values} names a value twice")
    if len(choices) > LARGEST:
        raise InputError(f"--space {name} lists {len(choices):,} values, more than {LARGEST:,}; give a range")
    return Range(choices)


def _range(name: str, values: str, ends: list[str], kind: Any, *, log: bool) -> Range:
    parsed = [_number(name, end, kind) for end in ends]
    if None in parsed or not {int, float} & set(_members(kind)):
        raise InputError(f"--space {name}={values}: a range is of numbers; list the values, e.g. {name}=a,b,c")
    low, high = (number for number in parsed if number is not None)
    if low >= high:
        raise InputError(f"--space {name}={values} is an empty range: it goes from {low:g} to {high:g}")
    if log and low <= 0:
        raise InputError(f"--space {name}={values}: a range in the logarithm begins above 0, got {low:g}")
    return Range((), low, high, log, whole=float not in _members(kind))


def _number(name: str, word: str, kind: Any) -> float | None:
    """The number that a word is, None if it is none; a whole one where the knob wants that."""
    try:
        number = float(word)
    except ValueError:
        return None
    if not math.isfinite(number):
        raise InputError(f"--space {name}: {word} is not finite")
    if float not in _members(kind) and number != int(number):
        raise InputError(f"--space {name}: {word} is not a whole number")
    return number if float in _members(kind) else int(number)


def _parsed(name: str, word: str, kind: Any) -> Value:
    """A listed value as the knob's type has it."""
    if word.lower() == "none" and type(None) in _members(kind):
        return None
    try:
        value = TypeAdapter(kind).validate_python(word)
    except ValidationError as error:
        raise InputError(f"--space {name}: {error.errors()[0]['msg']}, got {word!r}") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"--space {name}: {word} is not finite")
    return value if isinstance(value, bool | int | float | str) else str(value)


def _element(annotation: Any) -> Any:
    """The type of one value of a knob, which may take several."""
    return get_args(annotation)[0] if _is_tuple(annotation) else annotation


def _is_tuple(annotation: Any) -> bool:
    return get_origin(annotation) is tuple


def _members(kind: Any) -> tuple[Any, ...]:
    """The types that a union is of, or the one that is none."""
    return get_args(kind) if get_origin(kind) is Union or type(kind).__name__ == "UnionType" else (kind,)
