"""Which study is asked for: a file by its name or place, and what is said instead of what it says."""

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
"""Between two options of a network or an optimizer, whose values may hold commas: channels=16,32,stem_width=8."""


def built_in() -> dict[str, str]:
    """The studies that come with the package, and the title of each."""
    files = sorted(BUILT_IN.glob(f"*{ENDING}"))
    return {file.stem: tomllib.loads(file.read_text())["title"] for file in files}


def load_spec(config: Study) -> StudySpec:
    """The study that is asked for.

    Raises:
        InputError: every problem of the file, a line each.
    """
    return parse(*_source(config.name), config.seeds, config.only, _said(config.set))


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
        run, dot, knob = name.rpartition(".")
        knob = knob.replace("-", "_")
        said[run + dot + knob] = _value(value, PAIRS if knob.endswith("_kwargs") else ",")
    return said


def _value(text: str, between: str) -> Any:
    """What a person typed: a value as Python writes it, or words, of which several become a list."""
    try:
        value = ast.literal_eval(text)
        return list(value) if isinstance(value, tuple) else value
    except (ValueError, SyntaxError):
        words = re.split(between, text)
    if len(words) > 1:
        return [_value(word, "(?!)") for word in words]
    return {"true": True, "false": False}.get(text, text)
