"""The base of all tables of options: frozen, no unknown key, every problem reported at once."""

import ast
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from funmatch.config.metadata import Changes, Group, Opt
from funmatch.errors import InputError, unknown


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) else value


def _as_names(value: Any) -> Any:
    if value is None or isinstance(value, str | Path):
        value = () if value is None else (value,)
    return tuple(map(str, value)) if isinstance(value, list | tuple) else value


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, int | float) else value


def _as_pairs(value: Any) -> Any:
    if isinstance(value, dict):
        value = [f"{key}={option!r}" for key, option in value.items()]
    value = [value] if isinstance(value, str) else value
    return tuple(map(_canonical, value)) if isinstance(value, list | tuple) else value


def _canonical(option: Any) -> Any:
    """`channels=16,32` as `channels=(16, 32)`: one spelling for each value, so that equal options compare equal."""
    key, equals, value = str(option).partition("=")
    try:
        parsed = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return option
    return f"{key}{equals}{parsed if isinstance(parsed, str) else repr(parsed)}"


Share = Annotated[str | None, BeforeValidator(_as_text)]
"""`10%`, `0.1` or a number of images."""
Names = Annotated[tuple[str, ...], BeforeValidator(_as_names)]
"""One name or path, or several."""
Pairs = Annotated[tuple[str, ...], BeforeValidator(_as_pairs)]
"""`key=value` each, or a dictionary."""
Integers = Annotated[tuple[int, ...], BeforeValidator(_as_tuple)]
Numbers = Annotated[tuple[float, ...], BeforeValidator(_as_tuple)]
Precision = Literal["auto", "fp32", "bf16", "fp16"]


class Options(BaseModel):
    """A table of options: frozen, no unknown key, every problem reported at once."""

    # The schema of a table is built when its first row is made: a command needs one table of twenty.
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=True, defer_build=True
    )
    verbs: ClassVar[str] = ""
    """The heading under which `funmatch --help` lists the command."""
    examples: ClassVar[tuple[str, ...]] = ()
    """Commands that `--help` shows."""
    headings: ClassVar[dict[Group, str]] = {}
    """Other headings for groups of options."""
    by_rule: ClassVar[bool] = False
    """Whether a rule (BiT-HyperRule) decides the length and the staircase where nobody sets them."""

    as_json: Annotated[bool, Opt(group=Group.OUTPUT, changes=Changes.PLACE, study=False, flag="json")] = False
    """Print the result as one JSON object on standard output, and nothing else there."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Fails where an option says nothing about itself, or names another that does not exist."""
        super().__pydantic_init_subclass__(**kwargs)
        for name in cls.model_fields:
            for other in cls.opt(name).replaces:
                if other not in cls.model_fields:
                    raise TypeError(f"{cls.__name__}.{name} replaces {other!r}, which is not an option")

    @classmethod
    def opt(cls, name: str) -> Opt:
        """What an option says about itself. A name that is not an option is an error of the program."""
        for each in cls.model_fields[name].metadata:
            if isinstance(each, Opt):
                return each
        raise TypeError(f"{cls.__name__}.{name} has no Opt(…)")

    @classmethod
    def opts(cls) -> Iterator[tuple[str, Opt]]:
        """All options and what they say about themselves."""
        return ((name, cls.opt(name)) for name in cls.model_fields)

    @classmethod
    def where(cls, test: Callable[[Opt], bool]) -> frozenset[str]:
        """The options that pass a test."""
        return frozenset(name for name, opt in cls.opts() if test(opt))

    @classmethod
    def field_of(cls, word: str) -> str | None:
        """The option that a person means by a name, a flag or an alias; None where there is none."""
        wanted = word.removeprefix("--").removeprefix("-").replace("-", "_")
        if wanted in cls.model_fields:
            return wanted
        for name, opt in cls.opts():
            if wanted in {each.lstrip("-").replace("-", "_") for each in (opt.flag or name, *opt.aliases)}:
                return name
        return None

    @classmethod
    def checked(cls, **options: Any) -> Self:
        """The table with these options, or an `InputError` that holds every problem."""
        values: dict[str, Any] = {}
        for word, value in options.items():
            name = cls.field_of(word)
            if name is None:
                raise unknown("option", word, cls.model_fields)
            if name in values:
                raise InputError(f"{name} is set twice, once as {word}; set it once")
            # pydantic takes no Path for a name of a model or of images, which may be a path.
            values[name] = str(value) if isinstance(value, Path) else value
        try:
            table = cls(**values)
        except ValidationError as error:
            found = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}, got {e['input']!r}" for e in error.errors()]
            raise InputError(listed(found)) from None
        table.check()
        return table

    def check(self) -> None:
        """Raises one `InputError` that holds all problems."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        odd = [name for name, value in values.items() if not all(map(_finite, _each(value)))]
        found = [f"{name} must be a finite number, got {values[name]}" for name in odd]
        # Bounds stand before problems of several options: those may well follow from them.
        # Checks of several options at once must not see a NaN, which compares false to everything.
        usual = {name: type(self).model_fields[name].get_default(call_default_factory=True) for name in odd}
        finite = self.model_copy(update=usual)
        found += [problem for name in values for problem in finite.value_problems(name)]
        if found := found + finite.problems():
            raise InputError(listed(found))

    def value_problems(self, name: str) -> list[str]:
        """What is wrong with the value of one option, whatever the others are."""
        value, default = getattr(self, name), type(self).model_fields[name].default
        if "" in _each(value) and default != "":
            return [f"{name} is empty"]
        problem = type(self).opt(name).problem(name, value)
        return [problem] if problem else []

    def problems(self) -> list[str]:
        """What is wrong with options together, a sentence each."""
        return []

    def moved(self, name: str) -> bool:
        """Whether an option is not at its default."""
        return getattr(self, name) != type(self).model_fields[name].default


class Machine(Options):
    """Options for where and how to compute."""

    device: Annotated[
        str,
        Opt(
            group=Group.MACHINE,
            changes=Changes.STUDENT | Changes.VIEWS | Changes.TEACHER | Changes.ARITHMETIC,
            metavar="DEVICE",
        ),
    ] = "auto"
    """Device to compute on: auto, cpu, or an accelerator by PyTorch's name (cuda, cuda:1, mps, xpu)."""
    precision: Annotated[Precision, Opt(group=Group.MACHINE, changes=Changes.STUDENT | Changes.ARITHMETIC)] = "auto"
    """Floating-point format of the networks. auto is bf16 on accelerators that support it, fp16 with loss scaling on
    others; on a CPU fp32, or bf16 where the student trains clearly faster in it."""


def like(table: type[Options], name: str, **others: Any) -> Opt:
    """What an option of another table says about itself, with some of it changed."""
    return replace(table.opt(name), **others)


def listed(problems: list[str]) -> str:
    """Problems as one message, a line each where there are several."""
    return problems[0] if len(problems) == 1 else "\n  ".join([f"{len(problems)} problems:", *problems])


def options_changing(table: type[Options], changes: Changes) -> frozenset[str]:
    """The options of a table that can change any of these."""
    return table.where(lambda opt: bool(opt.changes & changes))


def replaced_by(table: type[Options], names: Iterable[str]) -> frozenset[str]:
    """The options of a recipe that are dropped when a person sets some others."""
    return frozenset(other for name in names if name in table.model_fields for other in table.opt(name).replaces)


def alternatives(table: type[Options], name: str) -> frozenset[str]:
    """The options of which at most one is set, beside one of them: steps for epochs, epochs for steps."""
    return frozenset(other for other in table.opt(name).replaces if name in table.opt(other).replaces)


def _each(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
