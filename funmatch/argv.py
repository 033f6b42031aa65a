"""What a person types, made ready for the parser: options that are said twice, and the names of recipes."""

from typing import Any

import tyro

from funmatch.config import SEARCHED, TAUGHT, Distill, recipes
from funmatch.config.options import Options
from funmatch.errors import InputError, unknown


class DistillMany(Distill):
    """A distillation of several students in one process."""

    students: tuple[str, ...]


def split_students(words: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """The words with the first `--student` alone, and all students that were said."""
    left, students = [], []
    following = iter(words)
    for word in following:
        flag, equals, value = word.partition("=")
        if flag != "--student":
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
    if not what and not {"-h", "--help"} & {*words}:
        raise InputError(f"say what to {verb}: {', '.join(SEARCHED)}, or the name of a recipe, e.g. pet37-fast")
    if what:
        hint = "`funmatch recipes` lists the recipes"
        raise unknown("verb or recipe", what, [*SEARCHED, *recipes.RECIPES], hint=hint)
    return words, "distill"


def apply_recipe(words: list[str], verb: str, table: type[Options]) -> tuple[list[str], Any]:
    """The words without the name of a recipe, and the table that it gives when these words are said; None without one.

    It is the first word, or the value of `--recipe`.
    """
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
    said = {flag.removeprefix("--").replace("-", "_") for flag in flags}
    said |= {"student"} if said & {"model"} else set()
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
