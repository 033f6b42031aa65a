"""Writes messages that name flags of the command line in Python's words: `steps=…`, not `--steps`."""

import re
from collections.abc import Generator
from contextlib import contextmanager

from funmatch.config.options import Options
from funmatch.config.values import kind_of
from funmatch.errors import InputError

FLAG = re.compile(
    r"(?P<lead>\b(?:by|by either|[Pp]ass|[Gg]ive|use|or) )?--(?P<flag>[a-z][a-z0-9-]*)(?P<value>(?: [^\s;)`]+)*)"
)
COMMAND = re.compile(r"(`[^`\n]*`|funmatch [a-z]+ [^\n`]*)")
NUMBERS = re.compile(r"(?: -?\d[\d.]*(?:e-?\d+)?(?![\d%.…]*\w))+")
SHARE = re.compile(r" \d+%")
WORD = re.compile(r" [A-Za-z0-9_]+(?:[-./:][A-Za-z0-9_]+)*")
ASKING = ("by ", "by either ", "pass ", "Pass ", "give ", "Give ", "use ")
"""Words before a flag that say: write it into the call."""


@contextmanager
def python_words(table: type[Options]) -> Generator[None]:
    """Replaces the flags in the message of an `InputError` by the arguments of a call."""
    try:
        yield
    except InputError as error:
        # Changed in place, so that class and traceback stay.
        error.args = (in_python(str(error), table),)
        raise


def in_python(message: str, table: type[Options]) -> str:
    """Returns a message with the flags of a table written as arguments: `pass epochs=1000`, `by steps=…`.

    Flags of other commands stay as they are.
    """
    asked = False

    def rewrite(found: re.Match[str]) -> str:
        nonlocal asked
        lead, flag, rest = found["lead"] or "", found["flag"], found["value"] or ""
        # What follows the flag may hold more flags: only its first words belong to this one.
        rest, more = _until_flag(rest)
        # "give --steps or --epochs": the second is asked for as the first is.
        asked = lead in ASKING or (lead == "or " and asked)
        words = _argument(table, flag, rest, asked=asked)
        tail = FLAG.sub(rewrite, more) if more else ""
        return f"{lead}--{flag}{rest}{tail}" if words is None else f"{lead}{words}{tail}"

    parts = COMMAND.split(message)
    # Every second part is a command of the command line, which needs its flags.
    parts[::2] = [FLAG.sub(rewrite, part) for part in parts[::2]]
    message = "".join(parts)
    # `model is missing`, not the field's name, where the function has an argument of that name.
    return re.sub(r"^( *)(\w+) is missing$", lambda found: _missing(table, *found.groups()), message, flags=re.M)


def python_name(table: type[Options], name: str) -> str:
    """Returns the argument for an option: the name of its flag, which for `finetune` is model, not student."""
    return (table.opt(name).flag or name).replace("-", "_")


def _missing(table: type[Options], indent: str, name: str) -> str:
    known = python_name(table, name) if name in table.model_fields else name
    return f"{indent}{known} is missing; pass {known}=…"


def _until_flag(rest: str) -> tuple[str, str]:
    """Cuts the words after a flag before the word that leads to the next one."""
    at = rest.find("--")
    if at < 0:
        return rest, ""
    found = re.search(r"(?: (?:by|either|pass|Pass|give|Give|use|or))* $", rest[:at])
    cut = found.start() if found else at
    return rest[:cut], rest[cut:]


def _argument(table: type[Options], flag: str, rest: str, *, asked: bool) -> str | None:
    """Writes a flag and the words after it as an argument; None for a flag that the table does not have."""
    name, word = table.field_of(f"--{flag}"), flag.replace("-", "_")
    if name is None:
        # `--no-mixup-max` turns a switch off.
        name, word = table.field_of(flag.removeprefix("no-")), word.removeprefix("no_")
        return f"{word}=False{rest}" if flag.startswith("no-") and name else None
    kind = kind_of(table.model_fields[name])
    if kind.types == {bool}:
        return f"{word}=True{rest}" if asked else f"{word}{rest}"
    value, length = _value(rest, {*kind.choices, *_listed(table, name)})
    if value is not None:
        value = f"[{value}]" if ", " in value and kind.several else value
        return f"{word}={value}{rest[length:]}"
    return f"{word}=…{rest}" if asked else f"{word}{rest}"


def _value(rest: str, choices: set[str]) -> tuple[str | None, int]:
    """Finds the value of a flag at the beginning of the words after it; returns it as Python writes it, and its length.

    Returns None where those words are just the sentence going on.
    """
    if found := SHARE.match(rest):
        return f'"{found[0].strip()}"', found.end()
    if found := NUMBERS.match(rest):
        return ", ".join(found[0].rstrip(".").split()), len(found[0].rstrip("."))
    found = WORD.match(rest)
    # A word of the sentence has no dot or slash inside, and is not one of the option's own values.
    if found and (found[0].strip() in choices or re.search(r"\w[-./:]\w", found[0])):
        return f'"{found[0].strip()}"', found.end()
    return None, 0


def _listed(table: type[Options], name: str) -> set[str]:
    """The values that an option of any text is known to take."""
    special = {"device": ["cpu"], "label_feature": ["none"]}.get(name, [])
    return {*special, *(table.opt(name).metavar or "").split("|")} - {""}
