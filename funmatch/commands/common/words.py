"""Finds values on a command line that are not of their option's kind, before the parser is imported."""

from collections.abc import Iterator, Sequence

from funmatch.config.help import metavar
from funmatch.config.options import Options
from funmatch.config.values import Kind, kind_of
from funmatch.errors import unknown


def value_problems(words: Sequence[str], table: type[Options]) -> list[str]:
    """Lists values that are not numbers, or not among the choices, where an option wants such; a sentence each.

    The parser would report only the first, in a box around the option's help.

    Args:
        words: of the command line, without the command and a recipe.
    """
    return [
        f"{flag}: {problem}"
        for flag, name, values in _options(words, table)
        if (problem := _problem(table, name, kind_of(table.model_fields[name]), values))
    ]


def number(word: str, kind: type[int] | type[float]) -> float:
    """Reads a number; a `ValueError` says what was wanted.

    Args:
        word: as it was typed.
        kind: int where only whole numbers are allowed.
    """
    try:
        return kind(word)
    except ValueError:
        hint = "; `funmatch tune … --space` tries several values" if "," in word else ""
        raise ValueError(f"wanted a {'whole ' if kind is int else ''}number, got {word!r}{hint}") from None


def count_problem(words: Sequence[str], count: int) -> str | None:
    """Returns what is wrong with words where an option takes a number of numbers; None if there are so many."""
    if len(words) == count:
        return None
    if count == 1:
        return f"takes one number, got {' '.join(words)}; run the command once for each"
    return f"wanted {count} numbers, got {len(words)}: {' '.join(words)}"


def _options(words: Sequence[str], table: type[Options]) -> Iterator[tuple[str, str, list[str]]]:
    """Yields each option as it was typed: its flag, its field, and the words after it."""
    flag, name, values = "", None, list[str]()
    for word in [*words, "--"]:
        head, equals, value = word.partition("=")
        found = table.field_of(head) if head.startswith("-") else None
        # Only known short flags end the values of the option before: -1 is a value.
        if found or head.startswith("--"):
            if name:
                yield flag, name, values
            flag, name, values = head, found, [value] if equals else []
        else:
            values.append(word)


def _problem(table: type[Options], name: str, kind: Kind, values: list[str]) -> str | None:
    """What is wrong with the words after an option; None where that is the parser's to say."""
    numbers, positional = kind.types <= {int, float}, bool(table.where(lambda opt: opt.positional))
    # A switch takes no value; names, paths and pairs take any text.
    if kind.types and not numbers:
        return None
    if not values:
        return None if kind.several and kind.count is None else f"needs a value ({metavar(table, name)})"
    if kind.optional and [each.lower() for each in values[:1]] == ["none"]:
        return None
    if kind.choices:
        return None if values[0] in kind.choices else str(unknown("value", values[0], kind.choices))
    # What follows one value may be the command's own words, as in `evaluate --side 96 runs/s`.
    values = values if kind.several or not positional else values[:1]
    count = kind.count if kind.several else 1
    if count and (problem := count_problem(values, count)):
        return problem
    try:
        for each in values:
            number(each, float if float in kind.types else int)
    except ValueError as error:
        return str(error)
    return None
