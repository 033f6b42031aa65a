"""What a person types, made ready for the parser: options that are said twice, and the names of recipes."""

from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from funmatch.config import SEARCHED, TAUGHT, Distill, recipes
from funmatch.config.help import asks_for_help
from funmatch.config.options import Options, like
from funmatch.errors import InputError, unknown

if TYPE_CHECKING:  # the parser takes a tenth of a second to import, which help and versions need not wait for
    from tyro.constructors import StructConstructorSpec, StructTypeInfo


class DistillMany(Distill):
    """A distillation of several students in one process."""

    students: Annotated[tuple[str, ...], like(Distill, "student")]


AnyOptions = TypeVar("AnyOptions", bound=Options)


def parse_options(words: list[str], table: type[AnyOptions], prog: str, default: Any, *, show: bool) -> AnyOptions:
    """The table that some words describe; whatever is wrong with them ends the program.

    Args:
        prog: the command as its usage shows it.
        default: a table whose values are used for options that are not among the words, or None.
        show: whether this process prints what is wrong.
    """
    import tyro
    from tyro.constructors import ConstructorRegistry

    registry = ConstructorRegistry()
    registry.struct_rule(_spec_of)
    with registry:
        return tyro.cli(table, prog=prog, args=words, default=default, console_outputs=show)


def _spec_of(info: "StructTypeInfo") -> "StructConstructorSpec | None":
    """How tyro reads a table of ours: each option tells its flag and aliases itself, so `config` needs no tyro."""
    import tyro
    from tyro.constructors import StructConstructorSpec, StructFieldSpec

    if not (isinstance(info.type, type) and issubclass(info.type, Options)):
        return None
    fields = []
    for name, field in info.type.model_fields.items():
        opt = info.type.opt(name)
        conf: list[Any] = [tyro.conf.arg(name=opt.flag, aliases=opt.aliases or None)]
        conf += [tyro.conf.Positional] if opt.positional else []
        conf += [tyro.conf.FlagCreatePairsOff] if field.default is False else []
        default = tyro.MISSING if field.is_required() else field.default
        if isinstance(info.default, Options):
            default = getattr(info.default, name, default)
        typed: Any = Annotated[(field.annotation, *conf)]  # pyrefly: ignore[not-a-type]
        fields.append(StructFieldSpec(name=name, type=typed, default=default, helptext=field.description))
    return StructConstructorSpec(instantiate=info.type, fields=tuple(fields))


def split_students(words: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """The words with the first `--student` alone, and all students that were said."""
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
    """The words of `funmatch tune WHAT …` or `funmatch plan WHAT …` for the table of a verb, and this verb.

    Raises:
        InputError: what is to be searched or planned is neither a verb nor a recipe.
    """
    what = words[0] if words and not words[0].startswith("-") else ""
    if what in SEARCHED:
        return words[1:], what
    if what in recipes.RECIPES:
        return words, recipes.RECIPES[what].verb
    if not what and not asks_for_help(words):
        raise InputError(f"say what to {verb}: {', '.join(SEARCHED)}, or the name of a recipe, e.g. pet37-fast")
    if what:
        hint = "`funmatch recipes` lists the recipes"
        raise unknown("verb or recipe", what, [*SEARCHED, *recipes.RECIPES], hint=hint)
    return words, "distill"


def apply_recipe(words: list[str], verb: str, table: type[Options]) -> tuple[list[str], Any]:
    """The words without the name of a recipe, and the table that it gives when these words are said; None without one.

    It is the first word, or the value of `--recipe`.
    """
    import tyro

    left, names = list(words), []
    if left and not left[0].startswith("-"):
        names.append(left.pop(0))
    for number, word in enumerate(left):
        if word == "--recipe" and number + 1 < len(left):
            names.append(left[number + 1])
        elif word.startswith("--recipe="):
            names.append(word.partition("=")[2])
    if not names:
        return words, None
    if len(set(names)) > 1:
        raise InputError(f"two recipes are named, {' and '.join(names)}; a run follows one")
    flags = {word.partition("=")[0] for word in left if word.startswith("--")}
    said = {name for flag in flags if (name := table.field_of(flag))}
    open_knobs = dict.fromkeys(name for name, knob in table.model_fields.items() if knob.is_required())
    closed = recipes.find(names[0], verb).over(dict.fromkeys(said))
    if table not in TAUGHT.values() and "out" in closed:
        closed["out"] = closed["out"].with_name(f"tune-{names[0]}")  # the recipe's own is a run's
    return left, table.model_construct(**dict.fromkeys(open_knobs, tyro.MISSING) | closed)


def merge_repeated(words: list[str], table: type[Options]) -> list[str]:
    """The words with `--teacher a … --teacher b` as `--teacher a b`, of which tyro would see the last alone."""
    several = {name for name, knob in table.model_fields.items() if "tuple" in str(knob.annotation)}
    parts: list[list[str]] = [[]]
    first: dict[str, list[str]] = {}  # the part of each option that takes several values
    for word in words:
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_") if flag.startswith("--") else ""
        if name not in several:
            if word.startswith("--"):
                parts.append([])
            parts[-1].append(word)
        elif name in first:
            parts.append(first[name])  # values that follow go there
            first[name] += [value] if equals else []
        else:
            first[name] = [flag, value] if equals else [flag]
            parts.append(first[name])
    each = {id(part): part for part in parts}  # a part that was met again stands where it stood first
    return [word for part in each.values() for word in part]
