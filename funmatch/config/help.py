"""Writes `--help` from the options' own descriptions, as plain text."""

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from funmatch.config.metadata import Group, Opt
from funmatch.config.options import Options

FLAGS = ("-h", "--help", "--help-all")
NARROW, WIDE = 60, 120
"""The least and the most columns that text is wrapped to."""
FEW = 14
"""As many options are listed at once."""
COLUMN = 28
"""Where sentences begin."""
METAVARS = {bool: "", int: "N", float: "X", Path: "PATH", str: "TEXT"}
BOLD, PLAIN = "\x1b[1m", "\x1b[0m"


def overview(tables: Mapping[str, type[Options]]) -> str:
    """All commands under their headings, a sentence each.

    Args:
        tables: command to its table; headings stand in the order in which they first come.
    """
    lines = ["Usage: funmatch COMMAND [OPTIONS]", "", "Knowledge distillation by function matching."]
    # A dictionary, not a set: the headings keep their order.
    for heading in dict.fromkeys(table.verbs for table in tables.values()):
        lines += ["", _bold(f"{heading}:")]
        for name, table in tables.items():
            if table.verbs == heading:
                lines += _row(f"  {name}", _summary(table), column=13)
    last = "`funmatch COMMAND --help` (or `funmatch help COMMAND`) explains a command and its options."
    return "\n".join([*lines, "", *_wrapped(last)])


def help_of(verb: str, table: type[Options], *, everything: bool = False, usage: str = "") -> str:
    """The help of one command: its usage, examples, and the options that matter most, or all of them.

    Args:
        verb: the words that begin the command, "distill" or "tune distill".
        everything: whether all options are listed, by group.
        usage: what the usage shows in the place of `verb`, "distill [RECIPE]".
    """
    shown = _sorted(table)
    # A second page would hide too few options to be worth another command.
    everything = everything or len(shown) <= FEW
    lines = [*_usage(usage or verb, table), "", *_wrapped(_summary(table))]
    if table.examples:
        lines += ["", _bold("Examples:" if len(table.examples) > 1 else "Example:")]
        lines += [line for example in table.examples for line in _command(example, "  ")]
    if everything:
        for heading, names in grouped(table):
            lines += ["", _bold(f"{heading}:")]
            lines += [line for name in names for line in _option(table, name, table.opt(name))]
        return "\n".join(lines)
    lines += ["", _bold("Options that matter most:")]
    essential = [(name, opt) for name, opt in shown if opt.essential or table.model_fields[name].is_required()]
    # The sort is stable: within required and other options the groups' order stays.
    essential.sort(key=lambda item: (_place(table, item[0]), not table.model_fields[item[0]].is_required()))
    lines += [line for name, opt in essential for line in _option(table, name, opt)]
    groups = ", ".join(heading for heading, _ in grouped(table))
    rest = f"`funmatch {verb} --help-all` shows all {len(shown)} options, by group: {groups}."
    return "\n".join([*lines, "", *_wrapped(rest)])


def grouped(table: type[Options]) -> list[tuple[str, list[str]]]:
    """The headings of a table, and the options under each, required ones first."""
    shown = _sorted(table)
    groups = dict.fromkeys(opt.group for _, opt in shown)
    return [
        (table.headings.get(group, group.value), [name for name, opt in shown if opt.group is group])
        for group in groups
    ]


def essential_lines(table: type[Options], without: Iterable[str] = ()) -> list[str]:
    """The options that matter most as Python names them, a line or more each: name, sentence, default."""
    shown = [(name, opt) for name, opt in _sorted(table) if opt.essential and name not in {*without}]
    lines = []
    for name, _ in shown:
        text = table.description(name)
        note = default_of(table, name)
        lines += textwrap.wrap(f"{name}: {text}{f' ({note})' if note else ''}", 100, subsequent_indent="    ")
    return lines


def asks_for_help(words: Iterable[str]) -> bool:
    """Whether help is wanted instead of the command."""
    # Anywhere among the words, so that --help can be appended to a command that does not work.
    return bool({*words} & {*FLAGS})


def label(table: type[Options], name: str) -> str:
    """How an option is typed: its flags, and what stands for its value."""
    if table.opt(name).positional:
        return metavar(table, name)
    return f"{', '.join(flags_of(table, name))} {metavar(table, name)}".strip()


def flags_of(table: type[Options], name: str) -> list[str]:
    """The flags of an option, short ones first; none where its value stands without one."""
    opt = table.opt(name)
    if opt.positional:
        return []
    flag = _flag(name, opt)
    # Only for switches that are on: one that is off needs no flag to turn it off.
    off = [flag.replace("--", "--no-", 1)] if table.model_fields[name].default is True else []
    # Stable, and False sorts before True: short flags first, each kind in its order.
    return sorted([flag, *off, *opt.aliases], key=lambda each: each.startswith("--"))


def _flag(name: str, opt: Opt) -> str:
    return f"--{(opt.flag or name).replace('_', '-')}"


def metavar(table: type[Options], name: str) -> str:
    """What stands for the value of an option: N, PATH, the choices."""
    opt = table.opt(name)
    kind: Any = table.model_fields[name].annotation
    if opt.metavar is not None:
        return opt.metavar
    # Arguments only of a union with None: those of a tuple or of choices are not alternatives.
    members = [each for each in (get_args(kind) if _is_union(kind) else (kind,)) if each is not type(None)]
    several = get_origin(members[0]) is tuple
    kinds = [get_args(each)[0] if several else each for each in members]
    found = ["|".join(map(str, get_args(each))) if get_origin(each) is Literal else METAVARS[each] for each in kinds]
    return " ".join(["|".join(found), *(["…"] if several else [])])


def default_of(table: type[Options], name: str) -> str | None:
    """The value of an option that is not set, or its rule in words; None for a switch."""
    field, opt = table.model_fields[name], table.opt(name)
    if field.is_required():
        return "required"
    # Compared by value: 0 and False are neither None nor empty, and are shown as they are.
    value = opt.usual if field.default in (None, (), "") else field.default
    # A switch that is off is not worth a note, but one that is on would otherwise surprise.
    if isinstance(value, bool):
        return "default: on" if value else None
    return f"default: {_shown(value)}"


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_shown, value))
    # As people write numbers: 32, not 32.0.
    return f"{value:g}" if isinstance(value, float) else str(value)


def _sorted(table: type[Options]) -> list[tuple[str, Opt]]:
    """Options by group, in each the required ones first."""
    # In the order of the enumeration: that of the fields is the order of the bases, and says nothing to users.
    groups = list(Group)

    def rank(item: tuple[str, Opt]) -> tuple[Any, ...]:
        name, opt = item
        return (
            groups.index(opt.group),
            not opt.positional,
            not table.model_fields[name].is_required(),
            not opt.essential,
        )

    return sorted(table.opts(), key=rank)


def _place(table: type[Options], name: str) -> int:
    """Returns which word of the command an option is, if its value stands without a flag; others come after these."""
    names = [each for each, opt in table.opts() if opt.positional]
    return names.index(name) if name in names else len(names)


def _usage(verb: str, table: type[Options]) -> list[str]:
    needed = [(name, opt) for name, opt in _sorted(table) if table.model_fields[name].is_required() or opt.positional]
    # Values without a flag first, as they are typed.
    needed.sort(key=lambda item: _place(table, item[0]))
    words = []
    for name, opt in needed:
        word = metavar(table, name) if opt.positional else f"{_flag(name, opt)} {metavar(table, name)}"
        words.append(word if table.model_fields[name].is_required() else f"[{word}]")
    return _wrapped(" ".join(["Usage: funmatch", verb, *words, "[OPTIONS]"]), "       ")


def _option(table: type[Options], name: str, opt: Opt) -> Iterator[str]:
    field = table.model_fields[name]
    # A list may be given in one go or flag by flag (`merge_repeated`); without a flag there is only one go.
    repeated = get_origin(field.annotation) is tuple and not opt.positional
    notes = [note for note in (default_of(table, name), "may be repeated" if repeated else None) if note]
    text = table.description(name)
    return _row(f"  {label(table, name)}", f"{text} ({'; '.join(notes)})" if notes else text, COLUMN)


def _row(left: str, text: str, column: int) -> Iterator[str]:
    """A name, and its sentence beside it, or below where the name is long."""
    # Not at hyphens: a flag that is cut, as in --teacher- batch, cannot be copied or searched.
    lines = textwrap.wrap(text, _width() - column, break_on_hyphens=False) or [""]
    # Beside a long name the sentence would have no column left.
    if len(left) + 2 > column:
        yield _bold(left)
    else:
        yield _bold(left) + " " * (column - len(left)) + lines.pop(0)
    yield from (" " * column + line for line in lines)


def _command(example: str, indent: str) -> Iterator[str]:
    """A command, over several lines as a shell reads it where it is long."""
    line = indent
    # Only before a flag, so that a flag stays with its values.
    for part in re.split(r" (?=--)", example):
        # 3 for the space before the part, and the space and backslash after it.
        if len(line) + len(part) + 3 > _width() and line.strip():
            yield f"{line} \\"
            line = f"{indent}    {part}"
        else:
            line += part if line == indent else f" {part}"
    yield line


def _summary(table: type[Options]) -> str:
    return " ".join((table.__doc__ or "").split())


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, _width(), subsequent_indent=indent, break_on_hyphens=False)


def _is_union(kind: Any) -> bool:
    return type(None) in get_args(kind)


def _width() -> int:
    # Piped text has no width, and is read on screens and in mails.
    return max(NARROW, min(WIDE, shutil.get_terminal_size((100, 24)).columns))


def _bold(text: str) -> str:
    """The text in bold on a terminal, unless NO_COLOR is set."""
    # As no-color.org has it: NO_COLOR counts if it is set and not empty.
    return f"{BOLD}{text}{PLAIN}" if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else text
