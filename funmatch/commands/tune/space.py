"""Parses and checks search spaces: `lr=log:1e-5..3e-3`, `drop_rate=0..0.5`, `temperature=1,2,5,10`."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Union, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

from funmatch.config import Train
from funmatch.config.options import alternatives
from funmatch.errors import InputError, unknown

Value = str | int | float | bool | None
"""A value that a search gives an option."""
LARGEST, LARGEST_GRID = 10_000, 10**6
"""Maximum number of listed values of one option, and of combinations in a grid."""


@dataclass(frozen=True)
class Range:
    """The values of one option that a search tries.

    Attributes:
        choices: the listed values; empty for a range.
        low, high: bounds of the range, both included.
        log: whether to sample uniformly in the logarithm.
        whole: whether to sample integers only.
    """

    choices: tuple[Value, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False

    def __contains__(self, value: object) -> bool:
        if self.choices:
            return value in self.choices
        # True is an integer to Python.
        return isinstance(value, int | float) and not isinstance(value, bool) and self.low <= value <= self.high

    @property
    def ends(self) -> tuple[Value, ...]:
        """All listed values, or both bounds of the range."""
        return self.choices or (self.low, self.high)


Space = Mapping[str, Range]


def read(words: Iterable[str], table: type[Train]) -> dict[str, Range]:
    """Parses words such as `lr=log:1e-5..3e-3` into a space, in alphabetical order of options.

    Args:
        table: the options of the command whose runs are searched.

    Raises:
        InputError: an option is unknown, not searchable or given twice, or its values are invalid.
    """
    found: dict[str, Range] = {}
    for word in words:
        # The first sign only: values such as channels=16,32 hold another.
        typed, equals, values = word.partition("=")
        name = option_name(typed, table)
        if not equals or not values.strip():
            raise InputError(f"--space {word}: no values; write {name}=1,2,5, {name}=0.1..0.5 or {name}=log:1e-4..1e-2")
        if name in found:
            raise InputError(f"--space names {name} twice; list all of its values at once")
        found[name] = _span(name, values.strip(), table)
    # Sorted, since the order of the options on the command line must not change the values of a trial.
    return dict(sorted(found.items()))


def option_name(typed: str, table: type[Train]) -> str:
    """Finds an option by any of its spellings: `optim.lr` or `lr`, `weight-decay` or `weight_decay`.

    Raises:
        InputError: the option is unknown, or not searchable.
    """
    name = table.field_of(typed.strip().removeprefix("--").removeprefix("optim."))
    if name is None:
        raise unknown("option", typed, table.where(lambda opt: opt.is_searchable))
    if not table.opt(name).is_searchable:
        raise InputError(
            f"--space {typed}: {name} sets the data, the place or the machine of a run and cannot be searched"
        )
    return name


def apply_choices(base: Train, chosen: Mapping[str, Value]) -> dict[str, Any]:
    """Replaces options of a configuration by the values of a trial."""
    options: dict[str, Any] = base.model_dump()
    for name, value in chosen.items():
        # A trial tries one value; an option of several gets it as a list of one.
        several = isinstance(options[name], tuple) or _is_tuple(type(base).model_fields[name].annotation)
        options[name] = (value,) if several else value
        # `epochs` of the base would conflict with `steps` of the trial.
        options |= dict.fromkeys(alternatives(type(base), name))
    return options


def check(space: Space, base: Train) -> None:
    """Raises one `InputError` for all values that are invalid for their option, whatever the others are."""
    found = []
    for name, span in space.items():
        for value in span.ends:
            # Each value alone: whether two of them contradict each other depends on the trial.
            table = type(base).model_validate(apply_choices(base, {name: value}))
            found += table.value_problems(name)
    if found:
        # Without repetitions: both ends of a range may have the same problem.
        raise InputError("--space: " + "; ".join(dict.fromkeys(found)))


def combinations(space: Space) -> int:
    """Counts the combinations of listed values: the size of a grid.

    Raises:
        InputError: an option has a range instead of listed values, or there are too many combinations.
    """
    for name, span in space.items():
        if not span.choices:
            raise InputError(f"a grid needs listed values, but {name} is a range; write --space {name}=a,b,c")
    # Before the combinations are listed: the sampler shuffles as many numbers.
    size = math.prod(len(span.choices) for span in space.values())
    if size > LARGEST_GRID:
        raise InputError(f"the grid has {size:,} combinations, more than {LARGEST_GRID:,}; pass --sampler random")
    return size


def _span(name: str, values: str, table: type[Train]) -> Range:
    words = [word.strip() for word in values.split(",")]
    log = values.startswith("log:")
    # Two dots, since one is part of numbers.
    ends = values.removeprefix("log:").split("..")
    kind = _element(table.model_fields[name].annotation)
    # Text may hold two dots, as paths do (../teacher): only numbers make a range.
    if len(ends) == 2 and len(words) == 1 and (log or _number(name, ends[0], kind) is not None):
        return _range(name, values, ends, kind, log=log)
    if log:
        raise InputError(f"--space {name}={values}: log: requires a range, e.g. {name}=log:1e-4..1e-2")
    # By value, so that 1e-3 and 0.001 are found to be the same.
    choices = tuple(dict.fromkeys(_parsed(name, word, kind) for word in words))
    if len(choices) != len(words):
        raise InputError(f"--space {name}={values} names a value twice")
    if len(choices) > LARGEST:
        raise InputError(f"--space {name} lists {len(choices):,} values, more than {LARGEST:,}; give a range")
    return Range(choices)


def _range(name: str, values: str, ends: list[str], kind: Any, *, log: bool) -> Range:
    parsed = [_number(name, end, kind) for end in ends]
    if None in parsed or not {int, float} & set(_members(kind)):
        raise InputError(f"--space {name}={values}: ranges are for numbers only; list the values, e.g. {name}=a,b,c")
    low, high = (number for number in parsed if number is not None)
    if low >= high:
        raise InputError(f"--space {name}={values} is an empty range: its bounds are {low:g} and {high:g}")
    if log and low <= 0:
        raise InputError(f"--space {name}={values}: a logarithmic range starts above 0, got {low:g}")
    return Range((), low, high, log, whole=float not in _members(kind))


def _number(name: str, word: str, kind: Any) -> float | None:
    """Parses a number, as an integer if the option takes integers; returns None if the word is not a number."""
    try:
        number = float(word)
    except ValueError:
        return None
    # Python reads inf and nan as numbers.
    if not math.isfinite(number):
        raise InputError(f"--space {name}: {word} is not finite")
    if float not in _members(kind) and number != int(number):
        raise InputError(f"--space {name}: {word} is not a whole number")
    return number if float in _members(kind) else int(number)


def _parsed(name: str, word: str, kind: Any) -> Value:
    """Parses a listed value by the type of its option."""
    if word.lower() == "none" and type(None) in _members(kind):
        return None
    try:
        # As text, by pydantic: these are words of a command line, also in Python, where `tune` joins them.
        value = TypeAdapter(kind).validate_python(word)
    except ValidationError as error:
        raise InputError(f"--space {name}: {error.errors()[0]['msg']}, got {word!r}") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"--space {name}: {word} is not finite")
    # Storages of Optuna hold plain values only, no paths.
    return value if isinstance(value, bool | int | float | str) else str(value)


def _element(annotation: Any) -> Any:
    """Returns the type of a single value of an option that may take several."""
    return get_args(annotation)[0] if _is_tuple(annotation) else annotation


def _is_tuple(annotation: Any) -> bool:
    return get_origin(annotation) is tuple


def _members(kind: Any) -> tuple[Any, ...]:
    """Returns the members of a union, or the type itself if it is not a union."""
    # Before Python 3.14 `int | None` and `Optional[int]` are of different types.
    return get_args(kind) if get_origin(kind) is Union or type(kind).__name__ == "UnionType" else (kind,)
