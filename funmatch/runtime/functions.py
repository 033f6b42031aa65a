"""Names functions of the user as `package.module:function`, and finds them by these names.

A record of a run holds the name. A function that was given from Python is found in the process that was given it, even
if it cannot be imported, as those of notebooks; elsewhere it is imported.

A module is imported only for a name that a person gave: on the command line, from Python, or in an environment
variable. A file never decides which code runs, whoever wrote it: `subprocess:getoutput` is a function's name, too.
"""

import functools
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stdout
from functools import reduce
from typing import Any

from funmatch.errors import InputError, first_line
from funmatch.runtime import addresses

_FOUND: dict[str, Callable[..., Any]] = {}
"""Functions by name: those given from Python, and those imported."""


ALLOWED = "FUNMATCH_ALLOW_FUNCTIONS"
"""Environment variable with names of functions that may be called, separated by commas; child processes inherit it."""
ONLY_ALLOWED = "FUNMATCH_ONLY_ALLOWED_FUNCTIONS"
"""Environment variable that, if it is set, lets the words of the command line allow nothing: a file wrote them."""
OWN = (
    "funmatch.models.bit:network",
    "funmatch.models.clip.network:network",
    "funmatch.models.heads.headed:network",
)
"""Functions of ours that build networks: saved models name them as their architecture, and no code of others runs."""
NAME = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*:[^\W\d]\w*(?:\.[^\W\d]\w*)*")


def allow(given: object) -> None:
    """Allows what a person named: functions and addresses in a word, or in the items of a list or dictionary."""
    if isinstance(given, str):
        # Within a word, too: `--teacher=package.module:function`, `--space distance=kl,package.module:function`. Not
        # in an address, where they are a user and a password.
        names = {*_allowed(), *NAME.findall(addresses.allow(given))}
        os.environ[ALLOWED] = ",".join(sorted(names))
    elif isinstance(given, Mapping):
        allow([*given.values()])
    elif isinstance(given, Iterable) and not isinstance(given, bytes):
        for each in given:
            if isinstance(each, str | Mapping | list | tuple):
                allow(each)


def allow_words(words: Iterable[str]) -> None:
    """Allows functions and addresses that the command line names, unless another process wrote it from a file."""
    if not os.environ.get(ONLY_ALLOWED):
        allow([*words])


def environment_for_words_of_a_file() -> dict[str, str]:
    """Returns the environment for a process whose command line comes from a file: its words allow nothing."""
    return {**os.environ, ONLY_ALLOWED: "1"}


def check_allowed(name: str, purpose: str) -> None:
    """Raises `InputError` unless a person gave the name of a function, as opposed to a file.

    Args:
        purpose: the option that names it, for messages.
    """
    if name not in OWN and name not in _FOUND and name not in _allowed():
        raise InputError(
            f"{purpose} {name} is a function that a file names, and a file must not decide which code runs; if you "
            f"trust it, name it yourself: {ALLOWED}={name}"
        )


def _allowed() -> list[str]:
    return [name for name in os.environ.get(ALLOWED, "").split(",") if name]


def is_function_name(name: str) -> bool:
    """Returns whether a name is that of a function, importable or not, rather than one of our own names."""
    return ":" in name


def register(function: Callable[..., Any]) -> str:
    """Makes a function known to this process; returns its name."""
    name = name_of(function)
    # The newest counts: a cell of a notebook that is run again defines the function anew.
    _FOUND[name] = function
    return name


def name_of(function: Callable[..., Any]) -> str:
    """Returns `module:qualname`; with brackets, and so not importable, for what holds values besides its code."""
    if isinstance(function, functools.partial):
        return f"functools:partial({name_of(function.func)})"
    named = function if hasattr(function, "__qualname__") else type(function)
    bound = inspect.ismethod(function) and not inspect.isclass(function.__self__)
    return f"{named.__module__}:{named.__qualname__}{'()' if bound or named is not function else ''}"


def find_function(name: str, purpose: str) -> Callable[..., Any]:
    """Finds a function by its name.

    Args:
        purpose: the option that names it, for messages.

    Raises:
        InputError: it was not given to this process, and cannot be imported.
    """
    if name not in _FOUND:
        module, _, function = name.partition(":")
        if module == "__main__" or not all(part.isidentifier() for part in function.split(".")):
            raise InputError(
                f"{purpose} {name} is a function of the Python program that began the run, and cannot be imported; "
                f"pass the function itself from there: {purpose}=…"
            )
        _FOUND[name] = import_function(name, purpose)
    return _FOUND[name]


def import_function(name: str, purpose: str) -> Callable[..., Any]:
    """Imports a function; modules in the current folder are found too.

    Raises:
        InputError: a file names it, there is no such function, or its module fails.
    """
    check_allowed(name, purpose)
    module, _, function = name.partition(":")
    # The installed command has its own folder in front, not the current one, as `python script.py` would.
    sys.path.insert(0, "")
    try:
        # Standard output is for results, which scripts parse.
        with redirect_stdout(sys.stderr):
            found: Any = importlib.import_module(module)
            return reduce(getattr, function.split("."), found)
    except ImportError as error:
        raise InputError(f"cannot import {module} for the {purpose} {name}: {first_line(error)}") from error
    except AttributeError as error:
        raise InputError(f"module {module} has no {function}; expected package.module:function") from error
    except Exception as error:  # the user's code can raise anything
        raise InputError(f"{module} fails when it is imported: {first_line(error)}") from error
    finally:
        sys.path.remove("")
