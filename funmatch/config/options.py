"""What all tables of knobs share: frozen, no unknown key, every problem told at once."""

import ast
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

import tyro
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from funmatch.errors import InputError, unknown


class Options(BaseModel):
    """What all tables share: no unknown key, no change after the making."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=True)

    as_json: Annotated[bool, tyro.conf.arg(name="json"), tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object on standard output, and nothing else there."""

    @field_validator(
        "student_kwargs", "teacher_kwargs", "model_kwargs", "optimizer_kwargs", mode="before", check_fields=False
    )
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        if isinstance(value, dict):
            value = [f"{key}={option!r}" for key, option in value.items()]
        value = [value] if isinstance(value, str) else value
        return tuple(map(_canonical, value)) if isinstance(value, list | tuple) else value

    def problems(self) -> list[str]:
        """Everything that is wrong with the values, each in a sentence."""
        return []

    @field_validator("val", mode="before", check_fields=False)
    @classmethod
    def _share(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int | float) else value

    @field_validator("data", "eval_data", "teacher", "teacher_weights", mode="before", check_fields=False)
    @classmethod
    def _several(cls, value: Any) -> Any:
        if value is None or isinstance(value, str | Path):
            value = () if value is None else (value,)
        return tuple(map(str, value)) if isinstance(value, list | tuple) else value

    @field_validator("teacher_side", "teacher_share", mode="before", check_fields=False)
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return (value,) if isinstance(value, int | float) else value

    @classmethod
    def checked(cls, **knobs: Any) -> Self:
        """The table with these knobs, or an `InputError` that holds every problem."""
        for name in knobs:
            if name not in cls.model_fields:
                raise unknown("knob", name, cls.model_fields)
        try:
            table = cls(**{name: str(knob) if isinstance(knob, Path) else knob for name, knob in knobs.items()})
        except ValidationError as error:
            found = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}, got {e['input']!r}" for e in error.errors()]
            raise InputError("; ".join(found)) from None
        table.check()
        return table

    def check(self) -> None:
        """Raises one `InputError` that holds all problems."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        odd = [name for name, value in values.items() if not all(map(_finite, value if _many(value) else (value,)))]
        found = [f"{name} must be a finite number, got {values[name]}" for name in odd]
        usual = {name: type(self).model_fields[name].get_default(call_default_factory=True) for name in odd}
        if found := found + self.model_copy(update=usual).problems():
            raise InputError("; ".join(found))


def _many(value: Any) -> bool:
    return isinstance(value, tuple)


def _finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _canonical(option: Any) -> Any:
    """`channels=16,32` as `channels=(16, 32)`: one spelling for each value, so that the same is told to be the same."""
    key, equals, value = str(option).partition("=")
    try:
        parsed = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return option
    return f"{key}{equals}{parsed if isinstance(parsed, str) else repr(parsed)}"


def outside(table: Options, least: Mapping[str, float], most: Mapping[str, float] | None = None) -> list[str]:
    """A sentence for each knob that is below its least or above its highest value; None is neither."""
    given = {name: getattr(table, name) for name in {**least, **(most or {})}}
    low = [
        f"{name} must be at least {bound}, got {given[name]}"
        for name, bound in least.items()
        if given[name] is not None and given[name] < bound
    ]
    return low + [
        f"{name} must be at most {bound:,}, got {given[name]}"
        for name, bound in (most or {}).items()
        if given[name] is not None and given[name] > bound
    ]
