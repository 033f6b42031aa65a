"""Reads files of options: TOML, YAML, and the `config.json` of a run. All problems of a file are reported at once."""

import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from funmatch.config.options import Options, listed
from funmatch.config.values import converted, kind_of, normalised, type_problem
from funmatch.errors import InputError, first_line, unknown
from funmatch.runtime.disk.json_files import RUN_FORMAT, RUN_RECORD, RUN_SHAPE, Damaged, parse_json, read_record

NOT_OF_A_RUN = ("out", "as_json")
"""What the record of a run does not pass on: the same run again needs a folder of its own."""


@dataclass(frozen=True)
class Content:
    """What a file holds, before it is known whether it can be used.

    Attributes:
        values: by the names that stand in the file.
        line_of: finds the line of a name.
        of_run: whether it is the record of a run.
    """

    values: Mapping[str, Any]
    line_of: Callable[[str], int | None]
    of_run: bool = False


def read_options(path: Path, table: type[Options], verb: str) -> dict[str, Any]:
    """The options that a file sets, by their fields, of the types that Python gives them.

    Args:
        table: the options of the command.
        verb: the command; the record of a run is for its own command only.

    Raises:
        InputError: the file is missing or cannot be read, or holds what is not an option or not of its type.
    """
    content = _content(path.expanduser(), verb)
    found: dict[str, Any] = {}
    problems = []
    for word, value in content.values.items():
        name = table.field_of(word)
        if content.of_run and (name is None or name in NOT_OF_A_RUN):
            continue  # an option that only an earlier version had
        line = content.line_of(word)
        where = f"line {line}: " if line else ""
        if problem := _problem(table, word, name, value):
            problems.append(where + problem)
        # By the field's name: `batch` and `batch_size` are one option.
        elif name in found:
            problems.append(f"{where}{name} is set twice, here as {word}; set it once")
        elif name is not None:
            # Converted here: the command line gets these values as defaults, and tyro warns of one of another type.
            found[name] = converted(table.model_fields[name], _value(table, name, value))
    if problems:
        raise InputError(f"{path}: {listed(problems)}")
    return found


def _problem(table: type[Options], word: str, name: str | None, value: Any) -> str | None:
    """What is wrong with one entry of a file."""
    if name is None:
        # In TOML a line [optimizer] makes a section of all that follows; "unknown option" would not explain that.
        if isinstance(value, dict):
            return f"{word} is a section; options stand at the top level of the file"
        return str(unknown("option", word, table.words()))
    # Refused: only the file that the command line names is read, so this one would be ignored in silence.
    if name == "config":
        return "config: a file of options cannot name another one"
    field = table.model_fields[name]
    if isinstance(value, dict) and not kind_of(field).pairs:
        return f"{word} is a section; {name} is one value: {word} = …"
    value = _value(table, name, value)
    if problem := type_problem(field, value):
        return f"{name}: {problem}"
    # Bounds are checked here too, so that a problem has its line.
    single = normalised(field, value)
    return table.opt(name).problem(name, tuple(single) if isinstance(single, list) else single)


def _value(table: type[Options], name: str, value: Any) -> Any:
    """A value of a file, with None where it says "none" for an option that may have no value."""
    kind = kind_of(table.model_fields[name])
    # Not where any text is a value: --label-feature none means that there are no labels.
    if isinstance(value, str) and value.lower() == "none" and kind.optional and not kind.accepts("any text"):
        return None
    return value


def _content(path: Path, verb: str) -> Content:
    if path.is_dir():
        # Other commands take the run folder itself, so this is an easy mistake.
        hint = f"; did you mean {path / RUN_RECORD}?" if (path / RUN_RECORD).is_file() else ""
        raise InputError(f"--config {path} is a folder{hint}")
    read = READERS.get(path.suffix.lower())
    if read is None:
        raise InputError(f"--config {path} is not a .toml, .yaml, .yml or .json file")
    try:
        return read(path, verb)
    except FileNotFoundError:
        raise InputError(f"no file {path}; --config names a file of options, `funmatch config` writes one") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not text in UTF-8") from None
    except RecursionError:
        raise InputError(f"{path} is nested too deep to be a file of options") from None


def _toml(path: Path, _verb: str) -> Content:
    text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark
    try:
        values = tomllib.loads(text)
    except ValueError as error:  # also of a number with more digits than Python reads
        raise InputError(f"{path} is not valid TOML: {first_line(error)}") from None
    # The pattern also finds [name] and name.key, since sections are among the mistakes.
    return Content(values, lambda word: _line(text, rf"^\s*\[*\s*[\"']?{re.escape(word)}[\"']?\s*[=.\]]"))


def _yaml(path: Path, _verb: str) -> Content:
    text = path.read_text(encoding="utf-8-sig")
    try:
        # Imported here, since a TOML file must not need PyYAML.
        from funmatch.config.sources import yaml_text
    except ModuleNotFoundError as error:
        # Another missing module would be a fault of ours, and this message would hide it.
        if error.name != "yaml":
            raise
        raise InputError(f"{path} needs PyYAML (pip install pyyaml); a .toml file needs nothing") from None
    try:
        values, lines = yaml_text.load(text)
    except ValueError as error:
        raise InputError(f"{path} is not valid YAML: {error}") from None
    return Content(values, lines.get)


def _json(path: Path, verb: str) -> Content:
    """The record of a run, or an object of options."""
    text = path.read_text(encoding="utf-8-sig")
    try:
        values = parse_json(text)
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {first_line(error)}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} does not hold options by their names")
    # Without this key it is a file that a user wrote, with options at its top level.
    if "knobs" not in values:
        return Content(values, lambda word: _line(text, rf'^[\s{{]*"{re.escape(word)}"\s*:'))
    try:
        record = read_record(path, RUN_SHAPE, RUN_FORMAT, "pass another --config")
    except Damaged as error:
        raise InputError(f"{error}: it is not the configuration of a run") from None
    no_lines: dict[str, int] = {}  # nobody has written this file by hand
    # The options of another command would mostly fit, and give another experiment.
    if record["verb"] != verb:
        other = record["verb"]
        raise InputError(
            f"{path} is the configuration of a run of {other}; use it by: funmatch {other} --config {path}"
        )
    return Content(record["knobs"], no_lines.get, of_run=True)


READERS: dict[str, Callable[[Path, str], Content]] = {".toml": _toml, ".yaml": _yaml, ".yml": _yaml, ".json": _json}


def _line(text: str, pattern: str) -> int | None:
    """The line on which a name stands, as well as it can be told without parsing again."""
    # tomllib keeps no lines; a wrong guess, inside a string of several lines, costs only a wrong number.
    found = re.search(pattern, text, re.M)
    # From the end of the match: `\s*` may begin it some blank lines above.
    return text.count("\n", 0, found.end() - 1) + 1 if found else None
