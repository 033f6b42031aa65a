"""Describes the options of a Python function: in its docstring, and in the signature by which notebooks complete."""

import inspect
from collections.abc import Callable
from inspect import Parameter
from typing import Any, TypeVar

from funmatch.commands.python.messages import in_python, python_name
from funmatch.config.help import essential_lines
from funmatch.config.options import Options

Function = TypeVar("Function", bound=Callable[..., Any])
WITHOUT_EFFECT = ("as_json",)
"""Options that only a command line needs."""


def with_options(table: type[Options], verb: str) -> Callable[[Function], Function]:
    """Appends the options that matter most to a function's docstring, and all options to its signature."""

    def add(function: Function) -> Function:
        signature = inspect.signature(function)
        # Without the function's own arguments, which its docstring explains.
        listed = "\n".join(f"        {in_python(line, table)}" for line in essential_lines(table, signature.parameters))
        more = f"all: `funmatch {verb} --help-all`, `funmatch.config.{table.__name__}`"
        function.__doc__ = f"{(function.__doc__ or '').rstrip()}\n\n    Options that matter most ({more}):\n{listed}\n"
        # Read by IPython and by `help`; editors and type checkers read `api.pyi`.
        vars(function)["__signature__"] = signature.replace(parameters=_parameters(signature, table))
        return function

    return add


def option_names(table: type[Options]) -> dict[str, list[str]]:
    """Returns the names under which a function takes each option, the usual one first."""
    found = {}
    for name, opt in table.opts():
        if name in WITHOUT_EFFECT:
            continue
        others = (each.lstrip("-").replace("-", "_") for each in opt.aliases)
        # Short flags are left out: a letter says nothing in a call.
        usual = python_name(table, name)
        found[name] = [usual, *dict.fromkeys(each for each in (*others, name) if len(each) > 1 and each != usual)]
    return found


def _parameters(signature: inspect.Signature, table: type[Options]) -> list[Parameter]:
    """Returns the parameters of a function, with its options in the place of `**options`, and this for other names."""
    own = {**signature.parameters}
    *_, last = own.values()
    assert last.kind is Parameter.VAR_KEYWORD
    options = [
        Parameter(word, Parameter.KEYWORD_ONLY, default=table.model_fields[name].get_default(call_default_factory=True))
        for name, (word, *_) in option_names(table).items()
        if table.field_of(word) not in {table.field_of(each) for each in own} - {None}
    ]
    return [*own.values()][:-1] + options + [last]
