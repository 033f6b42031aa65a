"""Runs the commands from Python: functions that take plain arguments and return finished runs."""

# Annotations stay text, so that they may name torch's classes, which are not imported.
from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, Union

from funmatch.commands.verbs import TABLES, run_students, run_verb
from funmatch.config import SEARCHED, TAUGHT, Distill, Finetune, Options, Train, recipes
from funmatch.config.help import essential_lines
from funmatch.config.sources.layers import PYTHON, layers_below
from funmatch.errors import InputError, unknown
from funmatch.reports.result import Outcome, Result, Tuned

if TYPE_CHECKING:  # torch takes seconds to import, and most words on a command line need none
    from collections.abc import Generator

    from torch import nn

    from funmatch.models.classifier import Classifier


Images: TypeAlias = str | Path | Sequence[str | Path]
"""One or several data sets, named as on the command line."""


# `Union`, since `|` does not take a class by its name.
Model: TypeAlias = Union[str, Path, "nn.Module"]
"""A model named as on the command line, or a module: a `Classifier`, a timm model, or any module that maps images
(n, 3, side, side) in [0, 1] to logits (n, classes)."""


Function = TypeVar("Function", bound=Callable[..., Any])


def _with_options(table: type[Options], verb: str) -> Callable[[Function], Function]:
    """Appends the options that matter most with their descriptions to a function's docstring."""

    def add(function: Function) -> Function:
        # Without the function's own arguments, which its docstring explains.
        listed = "\n".join(f"        {line}" for line in essential_lines(table, function.__annotations__))
        more = f"all: `funmatch {verb} --help-all`, `funmatch.config.{table.__name__}`"
        function.__doc__ = f"{(function.__doc__ or '').rstrip()}\n\n    Options that matter most ({more}):\n{listed}\n"
        return function

    return add


@_with_options(Distill, "distill")
def distill(
    data: Images | None = None,
    teacher: Model | Sequence[Model] | None = None,
    student: Model | None = None,
    out: str | Path | None = None,
    **options: Any,
) -> Outcome:
    """Trains a student to match the outputs of a teacher, or of several, in a run folder.

    Args:
        data: a folder of images, a name of the catalog, or a source with its prefix, e.g. `tfrecord:…`, `hf:…`; several
            are joined.
        teacher: a run folder, a timm name (with `teacher_weights`), a BiT `.npz`, a module, …, or several of these. A
            module is copied and stays as it is.
        student: any timm name, or a module, of which a copy is trained.
        out: the run folder; the same call resumes the run.
        **options: any other option of the command, e.g. `steps=3000, student_kwargs={"channels": [16, 32]}`;
            `config="run.toml"` reads a file, which may also hold the arguments above.

    Raises:
        funmatch.InputError: an argument or an input is invalid; the message names it and what to do.
    """
    named = {"data": data, "teacher": teacher, "student": student, "out": out}
    return _train("distill", Distill, _given(named) | options)


def distill_several(
    data: Images, teacher: str | Sequence[str], students: Sequence[str], out: str | Path, **options: Any
) -> list[Outcome]:
    """Distils several students of the same teacher side by side: views and teacher outputs are computed once.

    Args:
        students: timm names; each run folder is named after its student, inside `out`.
        **options: options of all students, as for `distill`.

    Raises:
        funmatch.InputError: as for `distill`; or a student failed, while the others finished.
    """
    # The first student stands for all while the options are checked.
    named = {"data": data, "teacher": teacher, "student": students[0], "out": out}
    with _python_words(Distill):
        call = _read("distill", Distill, named | options)
        assert isinstance(call.options, Distill)
        found = run_students(call.options, students, call.sources)
    return [Outcome(each.folder, each.metrics, each.page) for each in found]


@_with_options(Train, "train")
def train(
    data: Images | None = None, student: Model | None = None, out: str | Path | None = None, **options: Any
) -> Outcome:
    """Trains a network on labels alone, with the views and the loop of `distill`; takes its options."""
    return _train("train", Train, _given({"data": data, "student": student, "out": out}) | options)


@_with_options(Finetune, "finetune")
def finetune(
    data: Images | None = None, model: Model | None = None, out: str | Path | None = None, **options: Any
) -> Outcome:
    """Trains a network with pretrained weights on labels by BiT-HyperRule; takes the options of `train`."""
    return _train("finetune", Finetune, _given({"data": data, "model": model, "out": out}) | options)


def recipe(name: str, **options: Any) -> Outcome:
    """Runs a published recipe, such as `pet37-fast`; options override those of the recipe."""
    verb = recipes.find(name).verb
    return _train(verb, TAUGHT[verb], options | {"recipe": name})


@_with_options(TABLES["prepare"], "prepare")
def prepare(data: Images | None = None, **options: Any) -> dict[str, Any]:
    """Downloads, checks and decodes images, or writes them as shards.

    Returns:
        `splits`, `classes`, `kinds`, `leaks`, `unreadable`, …, and for shards `shards`, their paths.
    """
    return _run("prepare", TABLES["prepare"], _given({"data": data}) | options).to_json()


def tune(
    what: str, out: str | Path | None = None, *, space: Mapping[str, Any] | Sequence[str] = (), **options: Any
) -> Tuned:
    """Searches options of a command (train, finetune, distill) or of a recipe; selects by validation only.

    Args:
        what: the command, or the name of a recipe.
        out: the folder of the search; the same call resumes it, or shares the work from another process.
        space: values of each option, as on the command line: `{"lr": "log:1e-5..3e-3", "temperature": [1, 2, 5]}`.
        **options: of the search (`trials=20, executions=2, sampler="tpe", …`) and of the runs (`data`, `teacher`, …).

    Raises:
        funmatch.InputError: an argument or an input is invalid; the message names it and what to do.
        funmatch.errors.WorkFailed: all trials failed.
    """
    if what not in SEARCHED and what not in recipes.RECIPES:
        raise unknown("command or recipe", what, [*SEARCHED, *recipes.RECIPES])
    if isinstance(space, Mapping):
        space = [f"{name}={_joined(values)}" for name, values in space.items()]
    # None, not (): an empty space leaves that of a recipe or a file in place.
    named = {"out": out, "space": tuple(space) or None, "recipe": None if what in SEARCHED else what}
    verb = what if what in SEARCHED else recipes.RECIPES[what].verb
    found = _run("tune", SEARCHED[verb], options | _given(named), verb)
    return Tuned(found.folder, found.metrics, found.page)


@_with_options(TABLES["study"], "study")
def study(name: str | Path | None = None, out: str | Path | None = None, **options: Any) -> dict[str, Any]:
    """Runs a table of runs with several seeds, and plots their results.

    Args:
        name: a built-in study (consistency, patience, …), or a study file (.toml).
        out: its folder; the same call resumes it and skips finished runs.

    Returns:
        `study`, `runs`, `finished`, `failed`, `seconds`, `report`, `table`.

    Raises:
        funmatch.InputError: all problems of the file.
        funmatch.errors.WorkFailed: runs failed.
    """
    return _run("study", TABLES["study"], _given({"name": name, "out": out}) | options).to_json()


@_with_options(TABLES["evaluate"], "evaluate")
def evaluate(model: Model | None = None, **options: Any) -> dict[str, Any]:
    """Evaluates a run or a model on a split.

    Returns:
        `top1`, `top5`, `agreement`, `kl`, `ece`, `split`, `pictures`, `parameters`, `step`, `run`, …
    """
    return _run("evaluate", TABLES["evaluate"], _given({"model": model}) | options).to_json()


def load(model: Model, **options: Any) -> Classifier:
    """Loads a classifier by any model name; takes the arguments of `funmatch.models.load.load`."""
    from funmatch.models.load import load as loaded

    # As on the command line, a name with a tag means its published weights.
    options.setdefault("pretrained", True)
    return loaded(str(model) if isinstance(model, str | Path) else model, **options)


@dataclass(frozen=True)
class _Call:
    """A call as the commands take it: its options, the source of each, and the modules by name."""

    options: Options
    sources: Mapping[str, str]
    modules: dict[str, nn.Module] = field(default_factory=dict)


def _train(verb: str, table: type[Train], arguments: dict[str, Any]) -> Outcome:
    found = _run(verb, table, arguments)
    return Outcome(found.folder, found.metrics, found.page)


def _run(verb: str, table: type[Options], arguments: dict[str, Any], subject: str | None = None) -> Result:
    with _python_words(table):
        # A search takes files and recipes of the command whose runs it makes.
        call = _read(subject or verb, table, arguments)
        return run_verb(verb, call.options, call.modules, call.sources)


def _read(verb: str, table: type[Options], arguments: Mapping[str, Any]) -> _Call:
    """Builds the options of a call: the given ones override those of a file, which override those of a recipe."""
    modules: dict[str, nn.Module] = {}
    values = {word: _named(value, modules) for word, value in arguments.items()}
    # Before the table's own check, whose message would show the value in full, such as a state dict.
    for word, value in values.items():
        _check_model(table, word, value)
    # Unknown words stay, for `checked` to report them with all other problems.
    names = {table.field_of(word) or word for word in values}
    config = Path(values["config"]) if values.get("config") is not None else None
    layers = layers_below(table, verb, names, config, values.get("recipe"))
    sources = {name: layers.source_of(name, names, PYTHON) for name in table.model_fields}
    return _Call(table.checked(**{**layers.values, **values}), sources, modules)


def _given(named: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments that are given; a file may hold the others."""
    return {name: value for name, value in named.items() if value is not None}


def _joined(values: Any) -> str:
    """Formats the values of an option as on the command line."""
    return ",".join(map(str, values)) if isinstance(values, list | tuple) else str(values)


def _named(value: Any, modules: dict[str, nn.Module]) -> Any:
    """Replaces modules in a value by generated names, and adds them to `modules` by these names."""
    if isinstance(value, list | tuple):
        return [_named(each, modules) for each in value]
    # Not isinstance(value, nn.Module): that would import torch, which most calls do not need yet.
    # A class has a `state_dict`, too, but is not a network.
    if isinstance(value, type) or not callable(getattr(value, "state_dict", None)):
        return value
    name = f"python:{type(value).__name__}"
    if name in modules and modules[name] is not value:
        # Two networks of one class, as in an ensemble.
        name += f"-{len(modules)}"
    modules[name] = value
    return name


def _check_model(table: type[Options], word: str, value: Any) -> None:
    """Raises `InputError` if the value of a model option is neither a name nor a module."""
    name = table.field_of(word)
    # By what stands for its value in `--help`: options that name models have MODEL there.
    if name and (table.opt(name).metavar or "").startswith("MODEL"):
        for each in value if isinstance(value, list) else [value]:
            if not isinstance(each, str | Path):
                raise InputError(f"{word}: a model is a name or a torch.nn.Module, got {type(each).__name__}")


@contextmanager
def _python_words(table: type[Options]) -> Generator[None]:
    """Replaces flags in messages by argument names: steps, not --steps."""

    def renamed(flag: re.Match[str]) -> str:
        # Flags of other commands stay as they are.
        return table.field_of(flag[0]) or flag[0]

    try:
        yield
    except InputError as error:
        # Changed in place, so that class and traceback stay.
        error.args = (re.sub(r"--[a-z][a-z0-9-]*", renamed, str(error)),)
        raise
