"""Finds study files by name or path, and applies the options of the command line to them."""

import ast
import re
import tomllib
from pathlib import Path
from typing import Any

from funmatch.commands.study.spec import StudySpec, parse
from funmatch.config import Study
from funmatch.errors import InputError, unknown

BUILT_IN = Path(__file__).parent / "builtin"
ENDING = ".toml"
PAIRS = r",(?=[A-Za-z_]\w*=)"
"""Separates arguments of a network or an optimizer, whose values may hold commas: channels=16,32,stem_width=8."""


def built_in() -> dict[str, str]:
    """Lists the built-in studies with their titles."""
    files = sorted(BUILT_IN.glob(f"*{ENDING}"))
    return {file.stem: tomllib.loads(file.read_text())["title"] for file in files}


def load_spec(config: Study) -> StudySpec:
    """Loads the study that the options name.

    Raises:
        InputError: all problems of the file, one per line.
    """
    return parse(*_source(config.name), config.seeds, config.only, _overrides(config.set))


def _source(name: str) -> tuple[str, str]:
    """Reads a study file; returns its text, and its name in messages."""
    path = Path(name).expanduser()
    # Built-in names first: a folder of results with the same name must not replace the study.
    if name in built_in():
        path = BUILT_IN / f"{name}{ENDING}"
    elif path.is_dir() and (path / f"study{ENDING}").is_file():
        path = path / f"study{ENDING}"
    elif not path.is_file():
        raise unknown("study", name, built_in(), hint=f"or give a file, my-study{ENDING}")
    try:
        return path.read_text(), name
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text; a study is a TOML file") from None


def _overrides(words: tuple[str, ...]) -> dict[str, Any]:
    """Parses `lr=0.01 data=a,b pretrained.data=c`; the name of a run before a dot limits an option to this run."""
    overrides = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise InputError(f"--set takes option=value, e.g. --set epochs=10, got {word!r}")
        run, dot, option = name.rpartition(".")  # names of runs may hold dots, options do not
        option = option.replace("-", "_")
        overrides[run + dot + option] = _value(value, PAIRS if option.endswith("_kwargs") else ",")
    return overrides


def _value(text: str, separator: str) -> Any:
    """Parses a value in Python's notation, or as plain text, which becomes a list if it holds separators."""
    try:
        value = ast.literal_eval(text)
        return list(value) if isinstance(value, tuple) else value
    except (ValueError, SyntaxError):
        words = re.split(separator, text)
    if len(words) > 1:
        return [_value(word, "(?!)") for word in words]  # a pattern that never matches: parts are not split again
    return {"true": True, "false": False}.get(text, text)
