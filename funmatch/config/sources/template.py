"""Writes a template of a file of options: every option of a command with its sentence and its default, in TOML."""

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from funmatch.config.help import default_of, grouped, metavar
from funmatch.config.options import Options
from funmatch.config.values import kind_of

WIDTH = 100
OMITTED = ("config", "dry_run")
"""Options about the use of a file, which are therefore not in one."""
HEAD = """\
Options of `funmatch {verb}`, for: funmatch {verb} --config FILE
Remove the # before an option to set it, and delete what you do not need.
Options on the command line override this file; this file overrides a recipe; paths are relative to the folder \
in which the command is started."""


def template(verb: str, table: type[Options]) -> str:
    """The text of the file. Required options stand there with a placeholder, all others behind a #."""
    lines = [line for text in HEAD.format(verb=verb).splitlines() for line in _comment(text)]
    for heading, names in grouped(table):
        lines += ["", "", f"# ---- {heading} ----"]
        for name in names:
            if name not in OMITTED:
                lines += ["", *_entry(table, name)]
    return "\n".join(lines)


def _entry(table: type[Options], name: str) -> Iterator[str]:
    """An option: its sentence, and the line that sets it."""
    field = table.model_fields[name]
    yield from _comment(table.description(name))
    if field.is_required():
        value = metavar(table, name).removesuffix(" …")
        yield f"{name} = {_toml([value] if kind_of(field).several else value)}  # required"
    elif field.default in (None, (), ""):
        # TOML has no value for nothing, so the line cannot be one that sets the default.
        yield from _comment(f"{name} = …  ({default_of(table, name)})")
    else:
        # Without a space after the #, so that these lines can be told from the sentences and be turned on by one sign.
        yield f"#{name} = {_toml(field.default)}"


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)


def _toml(value: Any) -> str:
    """A value as TOML writes it; its strings, lists and numbers are those of JSON."""
    # Not escaped: JSON escapes rarer letters by surrogate pairs, which TOML does not allow.
    return json.dumps(value, ensure_ascii=False, default=lambda each: str(each) if isinstance(each, Path) else each)
