"""Reads the arguments of a Python call: options with the source of each, and the objects given among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from funmatch.commands.common.neighbours import option_hint
from funmatch.commands.python.messages import python_name, python_words
from funmatch.commands.verbs import run_verb
from funmatch.config.metadata import Refers
from funmatch.config.options import Options, listed
from funmatch.config.sources.layers import PYTHON, layers_below
from funmatch.config.values import native
from funmatch.errors import InputError
from funmatch.reports.result import Result
from funmatch.runtime.functions import allow, register
from funmatch.runtime.time_limit import counted_from_here


@dataclass(frozen=True)
class Call:
    """A call as the commands take it.

    Attributes:
        options: the table of its options.
        sources: where the value of each option comes from.
        objects: what was given as an object, such as a network, by the name that stands for it in `options`.
    """

    options: Options
    sources: Mapping[str, str]
    objects: dict[str, Any] = field(default_factory=dict)


def run_call(
    verb: str,
    table: type[Options],
    arguments: Mapping[str, Any],
    *,
    subject: str | None = None,
    objects: Mapping[str, Any] | None = None,
) -> Result:
    """Runs a command with the arguments of a call.

    Args:
        verb: the command.
        table: of its options.
        subject: the command whose runs a search makes, and whose files and recipes it takes.
        objects: more objects for the command, by the names that it looks for.
    """
    with python_words(table), counted_from_here():
        call = read_call(subject or verb, table, arguments)
        return run_verb(verb, call.options, {**call.objects, **(objects or {})}, call.sources)


def read_call(verb: str, table: type[Options], arguments: Mapping[str, Any]) -> Call:
    """Builds the options of a call: the given ones override those of a file, which override those of a recipe.

    Raises:
        InputError: every problem of the arguments.
    """
    allow(dict(arguments))
    objects: dict[str, Any] = {}
    values = {
        # A function is recorded by its name, under which this process then knows it.
        word: register(value) if _is_function(table, word, value) else _named(value, objects)
        for word, value in arguments.items()
    }
    # Before the table's own check, whose message would show the value in full, such as a state dict.
    for word, value in values.items():
        _check_model(table, word, value)
    hints = {word: option_hint(word, table) for word in values if table.field_of(word) is None}
    if found := [f"unknown option {word!r}; {hint}" for word, hint in hints.items() if hint]:
        raise InputError(listed(found))
    # Other unknown words stay, for `checked` to report them with all other problems.
    names = {table.field_of(word) or word for word in values}
    config, recipe = values.get("config"), values.get("recipe")
    # Of another type they are wrong, which `checked` says.
    config = Path(config) if isinstance(config, str | Path) else None
    layers = layers_below(table, verb, names, config, recipe if isinstance(recipe, str) else None)
    sources = {name: layers.source_of(name, names, PYTHON) for name in table.model_fields}
    return Call(table.checked(**{**layers.values, **values}), sources, objects)


def given(named: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments that are given; a file may hold the others."""
    return {name: value for name, value in named.items() if value is not None}


def space_words(space: Mapping[str, Any] | Sequence[str]) -> tuple[str, ...] | None:
    """Returns the space of a search as the command line writes it; None for an empty one.

    Raises:
        InputError: it is neither a dictionary nor a list of `option=values`.
    """
    if isinstance(space, Mapping):
        space = [f"{name}={_joined(values)}" for name, values in space.items()]
    if not isinstance(space, list | tuple) or not all(isinstance(each, str) for each in space):
        raise InputError(f'space: wanted a dictionary such as {{"lr": "log:1e-5..3e-3"}}, got {space!r}')
    # None, not (): an empty space leaves that of a recipe or a file in place.
    return tuple(space) or None


def model_name(model: Any) -> Any:
    """Returns a model as `funmatch.models.load` takes it: a name, or a module as it is.

    Raises:
        InputError: it is neither.
    """
    found = _named(model, {}) if isinstance(model, Result) else model
    if isinstance(found, str | Path):
        return str(found)
    if isinstance(found, type) or not callable(getattr(found, "state_dict", None)):
        raise InputError(f"a model is a name or a torch.nn.Module, got {type(found).__name__}")
    return found


def pairs(options: Mapping[str, Any] | Sequence[str]) -> tuple[str, ...]:
    """Returns arguments of a constructor as the command line writes them, `key=value` each."""
    if isinstance(options, Mapping):
        return tuple(f"{key}={native(value)!r}" for key, value in options.items())
    if not isinstance(options, list | tuple) or not all(isinstance(each, str) for each in options):
        raise InputError(f'options: wanted a dictionary such as {{"drop_rate": 0.1}}, got {options!r}')
    return (*options,)


def _joined(values: Any) -> str:
    """Formats the values of an option as on the command line."""
    return ",".join(map(str, values)) if isinstance(values, list | tuple) else str(values)


def _named(value: Any, objects: dict[str, Any]) -> Any:
    """Replaces networks in a value by generated names, and adds them to `objects` by these names."""
    if isinstance(value, list | tuple):
        return [_named(each, objects) for each in value]
    # A finished run stands for its folder.
    if isinstance(value, Result) and value.folder is not None:
        return value.folder
    # Not isinstance(value, nn.Module): that would import torch, which most calls do not need yet.
    # A class has a `state_dict`, too, but is not a network.
    if isinstance(value, type) or not callable(getattr(value, "state_dict", None)):
        return value
    name = f"python:{type(value).__name__}"
    if name in objects and objects[name] is not value:
        # Two networks of one class, as in an ensemble.
        name += f"-{len(objects)}"
    objects[name] = value
    return name


def _is_function(table: type[Options], word: str, value: Any) -> bool:
    """Returns whether an option that takes functions is given one."""
    name = table.field_of(word)
    return name is not None and table.opt(name).function and callable(value)


def _check_model(table: type[Options], word: str, value: Any) -> None:
    """Raises `InputError` if the value of a model option is neither a name nor a module."""
    name = table.field_of(word)
    if name and table.opt(name).refers is Refers.MODEL:
        for each in value if isinstance(value, list) else [value]:
            if not isinstance(each, str | Path):
                said = python_name(table, name) if word == name else word
                raise InputError(f"{said}: a model is a name or a torch.nn.Module, got {type(each).__name__}")
