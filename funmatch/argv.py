"""Parses the arguments of a command line into a table of options, with repeated options and recipes."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args, get_origin

from funmatch.commands.common.neighbours import option_hint
from funmatch.commands.common.words import count_problem, number, value_problems
from funmatch.config import SEARCHED, Distill, recipes
from funmatch.config.help import asks_for_help, default_of, flags_of, metavar
from funmatch.config.options import Options
from funmatch.config.sources.continued import names_run
from funmatch.errors import InputError, unknown

if TYPE_CHECKING:  # the parser takes a tenth of a second to import, which help and versions need not wait for
    from tyro.constructors import PrimitiveConstructorSpec, StructConstructorSpec, StructTypeInfo


@dataclass(frozen=True)
class Command:
    """A parsed command line.

    Attributes:
        verb: the command.
        options: its options.
        students: the students of a distillation with several; empty otherwise.
        sources: source of each option's value: the command line, a file, a recipe, or the default.
    """

    verb: str
    options: Options
    students: tuple[str, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)


AnyOptions = TypeVar("AnyOptions", bound=Options)


def parse_options(words: list[str], table: type[AnyOptions], prog: str, default: Any, *, show: bool) -> AnyOptions:
    """Parses arguments into a table; an unknown or malformed option prints a message and ends the program.

    Args:
        prog: name of the command in messages.
        default: table with the values of options that are not given, or None.
        show: whether this process prints messages.
    """
    import tyro
    from tyro.constructors import ConstructorRegistry

    # Registered inside the block only: other uses of tyro in this process must not get our rule.
    registry = ConstructorRegistry()
    registry.struct_rule(_spec_of)
    with registry:
        return tyro.cli(table, prog=prog, args=words, default=default, console_outputs=show)


def _spec_of(info: "StructTypeInfo") -> "StructConstructorSpec | None":
    """Describes our tables to tyro by each option's own metadata, so that `config` does not depend on tyro."""
    import tyro
    from tyro.constructors import StructConstructorSpec, StructFieldSpec

    # Rules see every type in a table; None leaves it to tyro.
    if not (isinstance(info.type, type) and issubclass(info.type, Options)):
        return None
    fields = []
    for name, known in info.type.model_fields.items():
        opt = info.type.opt(name)
        hint = f"({default_of(info.type, name) or 'default: off'})"
        # tyro shows an option's help in its messages about it.
        shown = {"metavar": metavar(info.type, name), "help_behavior_hint": hint}
        conf: list[Any] = [tyro.conf.arg(name=opt.flag, aliases=opt.aliases or None, **shown)]
        conf += [tyro.conf.Positional] if opt.positional else []
        default = tyro.MISSING if known.is_required() else known.default
        # The table below holds MISSING for what the words must give, and only what a file or a recipe sets itself.
        if below := isinstance(info.default, Options):
            default = getattr(info.default, name, default)
        # A file may have turned a switch on; --no-NAME turns it off again.
        conf += [tyro.conf.FlagCreatePairsOff] if known.default is False and not below else []
        conf += [spec] if (spec := _spec_of_numbers(known.annotation) or _spec_of_choices(known.annotation)) else []
        typed: Any = Annotated[(known.annotation, *conf)]  # pyrefly: ignore[not-a-type]
        fields.append(
            StructFieldSpec(name=name, type=typed, default=default, helptext=partial(info.type.description, name))
        )
    return StructConstructorSpec(instantiate=info.type, fields=tuple(fields))


def _spec_of_numbers(kind: Any) -> "PrimitiveConstructorSpec[Any] | None":
    """Describes numbers to tyro, so that messages do not show Python types; returns None for other types."""
    from tyro.constructors import PrimitiveConstructorSpec

    members = [each for each in (get_args(kind) or (kind,)) if each is not type(None)]
    several = get_origin(kind) is tuple or get_origin(members[0]) is tuple
    elements = [each for each in (get_args(members[0]) or members) if each is not ...]
    if not {*elements} <= {int, float}:
        return None
    fixed, optional = len(elements), type(None) in get_args(kind)
    # A pair that is optional also takes the one word `none`.
    every = "*" if get_origin(kind) is tuple and ... in get_args(kind) else (1, fixed) if optional else fixed

    def read(words: list[str]) -> Any:
        if optional and [word.lower() for word in words] == ["none"]:
            return None
        if every != "*" and (problem := count_problem(words, fixed)):
            raise ValueError(problem)
        values = tuple(number(word, elements[0]) for word in words)
        return values if several else values[0]

    return PrimitiveConstructorSpec(
        nargs=every,
        metavar="N",
        instance_from_str=read,
        is_instance=lambda value: value is None or isinstance(value, int | float | tuple),
        str_from_instance=lambda value: [str(each) for each in (value if isinstance(value, tuple) else (value,))],
    )


def _spec_of_choices(kind: Any) -> "PrimitiveConstructorSpec[Any] | None":
    """Describes choices to tyro, so that messages list them in order; returns None for other types."""
    from tyro.constructors import PrimitiveConstructorSpec

    # A union of choices and None is a set to tyro, so their order would change from run to run.
    choices = [choice for each in get_args(kind) if get_origin(each) is Literal for choice in get_args(each)]
    if not choices:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="|".join(choices),
        instance_from_str=lambda words: None if words == ["None"] else words[0],
        is_instance=lambda value: value is None or value in choices,
        str_from_instance=lambda value: [str(value)],
        choices=(*choices, "None"),
    )


def split_students(words: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """Removes all `--student` options except the first; returns the remaining arguments, and all students."""
    left, students = [], []
    following = iter(words)
    for word in following:
        flag, equals, value = word.partition("=")
        if not flag.startswith("--") or Distill.field_of(flag) != "student":
            left.append(word)
            continue
        students.append(value if equals else next(following, ""))
        if len(students) == 1:
            left += [flag, students[0]]
    return left, tuple(students)


def split_subject(words: list[str], verb: str) -> tuple[list[str], str]:
    """Splits the arguments of `funmatch tune SUBJECT …` or `plan SUBJECT …`; returns the subject's, and its command.

    Raises:
        InputError: the subject is neither a command nor a recipe.
    """
    subject = words[0] if words and not words[0].startswith("-") else ""
    if subject in SEARCHED:
        return words[1:], subject
    if subject in recipes.RECIPES:
        # The recipe's name stays among the words: `split_recipe` takes it next.
        return words, recipes.RECIPES[subject].verb
    if not subject and not asks_for_help(words):
        raise InputError(f"give a command to {verb}: {', '.join(SEARCHED)}, or the name of a recipe, e.g. pet37-fast")
    if subject:
        hint = "`funmatch recipes` lists the recipes"
        raise unknown("command or recipe", subject, [*SEARCHED, *recipes.RECIPES], hint=hint)
    # For help alone: `funmatch tune --help` shows the command with the most options.
    return words, "distill"


def split_recipe(words: list[str]) -> tuple[list[str], str | None]:
    """Removes a leading recipe name; returns the remaining arguments, and this name or the value of `--recipe`.

    Raises:
        InputError: two different recipes are given.
    """
    left, names = list(words), []
    if left and not left[0].startswith("-"):
        names.append(left.pop(0))
    names += values_of("--recipe", left)
    if len(set(names)) > 1:
        raise InputError(f"two recipes are given, {' and '.join(names)}; give only one")
    return left, names[0] if names else None


def split_first(words: list[str], verb: str) -> tuple[list[str], str | None, Path | None]:
    """Removes the first word if it is a recipe, or for `distill` the folder of a run from which it goes on.

    Returns:
        the remaining arguments, the recipe, and the run.
    """
    if verb == "distill" and words and not words[0].startswith("-") and names_run(words[0]):
        return words[1:], None, Path(words[0])
    return *split_recipe(words), None


def values_of(flag: str, words: list[str]) -> list[str]:
    """Returns the values of a flag, given as `--flag value` or `--flag=value`."""
    joined = [word.partition("=")[2] for word in words if word.startswith(f"{flag}=")]
    # A flag without its value is left to the parser, which reports it.
    return [value for word, value in pairwise(words) if word == flag and not value.startswith("--")] + joined


def given_options(words: list[str], table: type[Options]) -> set[str]:
    """Returns the names of the options that are given, whatever their values."""
    names = {_option_of(word, table) for word in words if word.startswith("-")}
    if words and not words[0].startswith("-"):
        names |= table.where(lambda opt: opt.positional)
    return {name for name in names if name}


def _option_of(word: str, table: type[Options]) -> str | None:
    """Returns the option that a flag sets, `--flag`, `--flag=value` or `--no-flag`; None where there is none."""
    flag = word.partition("=")[0]
    return table.field_of(flag) or table.field_of(flag.replace("--no-", "--", 1))


def flag_problems(words: list[str], table: type[Options], name: str, found: Collection[str]) -> list[str]:
    """Names unknown flags, values that do not fit, and the options that must be set and are not.

    The parser would name them too, in a box around the help of each; and these mistakes need no parser, which takes
    longer to import than everything else.

    Args:
        name: of the command.
        found: the options that the words, a file or a recipe set.
    """
    # A minus before a digit begins a value, and one alone is standard input.
    signed = (word for word in words if word[:1] == "-" and word != "-" and not word[1:2].isdecimal())
    flags = dict.fromkeys(word.partition("=")[0] for word in signed)
    known = [flag for each in table.model_fields for flag in flags_of(table, each)]
    unknowns = [flag for flag in flags if not _option_of(flag, table)]
    # Where we know what is meant, names that are near in letters would mislead.
    hints = {flag: option_hint(flag, table) for flag in unknowns}
    problems = [
        f"unknown option {flag!r}; {hints[flag]}" if hints[flag] else str(unknown("option", flag, known))
        for flag in unknowns
    ]
    problems += value_problems(words, table)
    required = [each for each, field in table.model_fields.items() if field.is_required() and each not in found]
    if required:
        # Words that stand without a flag must come first: after an option they would be values of that.
        first = [each for each in required if table.opt(each).positional]
        words_of = (
            f"{' '.join(metavar(table, each) for each in first)} as its first word{'s' if len(first) > 1 else ''}"
        )
        # The long flags come last, and the aliases after the option's own.
        flags_each = [flags_of(table, each) for each in required if each not in first]
        long = [next(flag for flag in each if flag.startswith("--")) for each in flags_each]
        wanted = [*([words_of] if first else []), *long]
        problems.append(f"{name} needs {', '.join(wanted)}; see `funmatch {name} --help`")
    return problems


def default_table(table: type[Options], values: Mapping[str, Any]) -> Options:
    """Builds the parser's table of defaults: the given values, with other required options marked as missing."""
    import tyro

    required = [name for name, each in table.model_fields.items() if each.is_required()]
    # Not validated: MISSING is not a valid value, and files and recipes have been checked.
    return table.model_construct(**dict.fromkeys(required, tyro.MISSING) | dict(values))


def merge_repeated(words: list[str], table: type[Options]) -> list[str]:
    """Merges `--teacher a … --teacher b` into `--teacher a b`, since the parser would keep only the last."""
    several = table.where(lambda opt: opt.positional is False) & {
        name for name, field in table.model_fields.items() if get_origin(field.annotation) is tuple
    }
    part: list[str] = []  # an option and its values
    parts, first = [part], dict[str, list[str]]()
    for word in words:
        flag, equals, value = word.partition("=")
        name = table.field_of(flag) if flag.startswith("-") else None
        if name in several:
            if name not in first:
                first[name] = [flag]
                parts.append(first[name])
            part = first[name]
            part += [value] if equals else []
        # Only known short flags end the values of the option before: -1 is a value.
        elif name or flag.startswith("--"):
            part = [word]
            parts.append(part)
        else:
            part.append(word)
    return [word for part in parts for word in part]
