"""The base of all tables of options: frozen, no unknown key, every problem reported at once."""

import ast
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from funmatch.config.metadata import Changes, Group, Inherit, OnResume, Opt
from funmatch.config.values import Precision, normalised, type_problem
from funmatch.errors import InputError, unknown


class Options(BaseModel):
    """A table of options: frozen, no unknown key, every problem reported at once."""

    # The schema of a table is built when its first row is made: a command needs one table of twenty.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=True, defer_build=True)
    verbs: ClassVar[str] = ""
    """The heading under which `funmatch --help` lists the command."""
    examples: ClassVar[tuple[str, ...]] = ()
    """Commands that `--help` shows."""
    headings: ClassVar[dict[Group, str]] = {}
    """Other headings for groups of options."""
    by_rule: ClassVar[bool] = False
    """Whether a rule (BiT-HyperRule) decides the length and the staircase where they are not set."""

    # Not named json, after its flag: pydantic's models have a method of this name.
    as_json: Annotated[bool, Opt(group=Group.OUTPUT, changes=Changes.PLACE, study=False, flag="json")] = False
    """Print the result as one JSON object on standard output, and nothing else there."""
    # Not part of a record: what a file says is recorded option by option.
    config: Annotated[
        Path | None,
        Opt(group=Group.OUTPUT, changes=Changes.PLACE, study=False, essential=True, usual="none", metavar="FILE"),
        Field(exclude=True),
    ] = None
    """File of options: .toml (`funmatch config` writes a template), .yaml, or the config.json of a run. Options on the
    command line override it; paths in it are relative to the current folder."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Fails where an option has no description, or names another that does not exist."""
        # pydantic's hook, not Python's `__init_subclass__`, in which a class has no fields yet.
        super().__pydantic_init_subclass__(**kwargs)
        for name in cls.model_fields:
            for other in cls.opt(name).replaces:
                if other not in cls.model_fields:
                    raise TypeError(f"{cls.__name__}.{name} replaces {other!r}, which is not an option")

    @classmethod
    def opt(cls, name: str) -> Opt:
        """The description of an option. A name that is not an option is an error of the program."""
        for each in cls.model_fields[name].metadata:
            if isinstance(each, Opt):
                return each
        raise TypeError(f"{cls.__name__}.{name} has no Opt(…)")

    @classmethod
    def description(cls, name: str) -> str:
        """The sentences that stand below an option in the source, on one line; empty where there are none.

        Read when they are shown: pydantic would parse all tables at each start, which takes longer than `--help`.
        """
        if text := _texts_below(cls.__module__).get(cls.__qualname__, {}).get(name):
            return text
        # Not by the order in which methods are looked up: a field comes from the first base that has it.
        bases = (each for each in cls.__bases__ if issubclass(each, Options) and name in each.model_fields)
        return next((base.description(name) for base in bases), "")

    @classmethod
    def opts(cls) -> Iterator[tuple[str, Opt]]:
        """All options and their descriptions."""
        return ((name, cls.opt(name)) for name in cls.model_fields)

    @classmethod
    def where(cls, test: Callable[[Opt], bool]) -> frozenset[str]:
        """The options that pass a test."""
        return frozenset(name for name, opt in cls.opts() if test(opt))

    @classmethod
    def field_of(cls, word: str) -> str | None:
        """The option that the user means by a name, a flag or an alias; None where there is none."""
        # Two dashes first: of --lr one would be left.
        wanted = word.removeprefix("--").removeprefix("-").replace("-", "_")
        # Names before aliases: an alias of one option could be the name of another.
        if wanted in cls.model_fields:
            return wanted
        for name, opt in cls.opts():
            if wanted in {each.lstrip("-").replace("-", "_") for each in (opt.flag or name, *opt.aliases)}:
                return name
        return None

    @classmethod
    def words(cls) -> list[str]:
        """The names, flags and aliases of all options, as Python and files write them."""
        others = (each for name, opt in cls.opts() for each in (opt.flag or name, *opt.aliases))
        # Short flags are left out: a single letter is near to no misspelt name.
        return [*cls.model_fields, *(word for each in others if len(word := each.lstrip("-").replace("-", "_")) > 1)]

    @classmethod
    def checked(cls, **options: Any) -> Self:
        """The table with these options, or an `InputError` that holds every problem."""
        values: dict[str, Any] = {}
        problems: list[str] = []
        for word, value in options.items():
            name = cls.field_of(word)
            if name is None:
                problems.append(str(unknown("option", word, cls.words())))
            # By the field's name: batch and batch_size are one option.
            elif name in values:
                problems.append(f"{name} is set twice, once as {word}; set it once")
            # Before pydantic, which would turn "4" into 4 and True into 1.0.
            elif problem := type_problem(cls.model_fields[name], value):
                wanted = problem.replace("a string", "a string or a function", 1) if cls.opt(name).function else problem
                problems.append(f"{name}: {wanted}")
            else:
                values[name] = normalised(cls.model_fields[name], value)
        # From the words, not from `values`: an option whose value is wrong is not missing as well.
        found = {cls.field_of(word) for word in options}
        problems += [
            f"{name} is missing"
            for name, field in cls.model_fields.items()
            if field.is_required() and name not in found
        ]
        if problems:
            raise InputError(listed(problems))
        try:
            table = cls(**values)
        except ValidationError as error:
            # What remains to pydantic, such as choices, gets one line a problem, without its links and error types.
            found = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}, got {e['input']!r}" for e in error.errors()]
            raise InputError(listed(found)) from None
        # Here too, so that a table from `checked` is valid wherever it is used.
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
        # An option whose default is empty, such as the pattern of a list, may be given so.
        if "" in _each(value) and default != "":
            return [f"{name} is empty"]
        opt = type(self).opt(name)
        problem = opt.problem(opt.flag or name, value)
        return [problem] if problem else []

    def problems(self) -> list[str]:
        """What is wrong with options together, a sentence each."""
        # The last in the chain of `super()`: every table adds its own and calls the next.
        return []

    def moved(self, name: str) -> bool:
        """Whether an option is not at its default."""
        # By value, not by `model_fields_set`: a file or a script may spell a default out.
        return getattr(self, name) != type(self).model_fields[name].default


class Machine(Options):
    """Options for where and how to compute."""

    device: Annotated[
        str,
        Opt(
            group=Group.MACHINE,
            changes=Changes.STUDENT | Changes.VIEWS | Changes.TEACHER | Changes.ARITHMETIC,
            # Its index is recorded where a single process trains, and so differs with their number.
            resume=OnResume.DEVICE,
            metavar="DEVICE",
        ),
    ] = "auto"
    """Device to compute on: auto, cpu, or an accelerator by PyTorch's name (cuda, cuda:1, mps, xpu)."""
    precision: Annotated[
        Precision, Opt(group=Group.MACHINE, changes=Changes.STUDENT | Changes.ARITHMETIC, inherit=Inherit.NEVER)
    ] = "auto"
    """Floating-point format of the networks. auto is bf16 on accelerators that support it, fp16 with loss scaling on
    others; on a CPU fp32, or bf16 where the student trains clearly faster in it."""

    def problems(self) -> list[str]:
        kind, _, index = self.device.lower().partition(":")
        # Other tools' names. What the machine has is known with torch only, seconds later.
        if kind in ("gpu", "nvidia", "rocm", "hip") or kind.isdecimal():
            number = kind if kind.isdecimal() else index
            device = f"--device cuda{f':{number}' if number else ''}"
            return [f"unknown device {self.device!r}; for a GPU of NVIDIA or AMD pass {device}"]
        return super().problems()


@cache
def _texts_below(module: str) -> dict[str, dict[str, str]]:
    """The strings below the fields of a module's classes, each on one line, by class and field."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError):  # modules of C, and those whose source was not installed
        return {}
    found: dict[str, dict[str, str]] = {}
    for table in (each for each in tree.body if isinstance(each, ast.ClassDef)):
        found[table.name] = {
            field.target.id: " ".join(text.value.value.split())
            for field, text in pairwise(table.body)
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
            if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
        }
    return found


def like(table: type[Options], name: str, **others: Any) -> Opt:
    """The description of an option of another table, with some of it changed."""
    # A copy with changes, so that bounds and what it changes stay the other table's.
    return replace(table.opt(name), **others)


def listed(problems: list[str]) -> str:
    """Problems as one message, a line each where there are several."""
    return problems[0] if len(problems) == 1 else "\n  ".join([f"{len(problems)} problems:", *problems])


def options_changing(table: type[Options], changes: Changes) -> frozenset[str]:
    """The options of a table that can change any of these."""
    return table.where(lambda opt: bool(opt.changes & changes))


def replaced_by(table: type[Options], names: Iterable[str]) -> frozenset[str]:
    """The options of a recipe that are dropped when the user sets some others."""
    return frozenset(other for name in names if name in table.model_fields for other in table.opt(name).replaces)


def alternatives(table: type[Options], name: str) -> frozenset[str]:
    """The options of which at most one is set, beside one of them: steps for epochs, epochs for steps."""
    # Both ways: crop replaces resize, but a resize does not exclude a crop.
    return frozenset(other for other in table.opt(name).replaces if name in table.opt(other).replaces)


def _each(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
