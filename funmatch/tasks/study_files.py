"""Which study is asked for: a file by its name or place, and what is said instead of what it says."""

import ast
import tomllib
from pathlib import Path
from typing import Any

import funmatch
from funmatch.config import Study
from funmatch.errors import InputError, unknown
from funmatch.tasks.plans import Plan, parsed

BUILT_IN = Path(funmatch.__file__).parent / "studies"
ENDING = ".toml"


def built_in() -> dict[str, str]:
    """The studies that come with the package, and the title of each."""
    files = sorted(BUILT_IN.glob(f"*{ENDING}"))
    return {file.stem: tomllib.loads(file.read_text())["title"] for file in files}


def plan_of(config: Study) -> Plan:
    """The study that is asked for.

    Raises:
        InputError: every problem of the file, a line each.
    """
    return parsed(*_source(config.name), config.seeds, config.only, _said(config.set))


def _source(name: str) -> tuple[str, str]:
    """A study file's text, and what to call it."""
    path = Path(name).expanduser()
    if name in built_in():
        path = BUILT_IN / f"{name}{ENDING}"
    elif path.is_dir() and (path / f"study{ENDING}").is_file():
        path = path / f"study{ENDING}"
    elif not path.is_file():
        raise unknown("study", name, built_in(), hint=f"or give a file, my-study{ENDING}")
    try:
        return path.read_text(), name
    except UnicodeDecodeError:
        raise InputError(f"{path} is no text in UTF-8; a study is a TOML file") from None


def _said(words: tuple[str, ...]) -> dict[str, Any]:
    """`lr=0.01 data=a,b pretrained.data=c` as knobs; those of one run by its name before a dot."""
    said = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise InputError(f"--set takes knob=value, e.g. --set epochs=10, got {word!r}")
        values = [_value(part) for part in value.split(",")]
        run, dot, knob = name.rpartition(".")
        said[run + dot + knob.replace("-", "_")] = values if len(values) > 1 else values[0]
    return said


def _value(word: str) -> Any:
    try:
        return ast.literal_eval(word)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False}.get(word, word)
