"""Writes `funmatch/api.pyi`, by which editors and type checkers know every option of the Python functions.

    python scripts/write_stubs.py

The options come from the tables of `funmatch.config`: names, other names, types, sentences, defaults. A test compares
the file with the tables.
"""

import inspect
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from funmatch.api import load
from funmatch.commands.python.messages import in_python
from funmatch.commands.python.signatures import option_names
from funmatch.commands.verbs import TABLES
from funmatch.config import (
    Distill,
    Finetune,
    ImageOptions,
    Images,
    Options,
    PredictionOptions,
    SearchDistill,
    Train,
)
from funmatch.config.help import default_of
from funmatch.config.metadata import Refers
from funmatch.config.values import kind_of

STUB = Path(__file__).parent.parent / "funmatch" / "api.pyi"
HEADER = '''\
"""Types of `funmatch.api`. Written by `python scripts/write_stubs.py`; change the tables of `funmatch.config`."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypedDict, Unpack, overload

import numpy as np
from PIL.Image import Image as Picture
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from funmatch.models.classifier import Classifier
from funmatch.reports.predictions import Prediction, Predictions
from funmatch.reports.result import Outcome as Outcome
from funmatch.reports.result import Result as Result
from funmatch.reports.result import Tuned as Tuned

Images: TypeAlias = str | Path | Sequence[str | Path]
Model: TypeAlias = str | Path | nn.Module | Result
AnyImage: TypeAlias = str | Path | Picture | np.ndarray | Tensor
Models: TypeAlias = Model | Sequence[Model]
Names: TypeAlias = str | Path | Sequence[str | Path]
KeyValues: TypeAlias = Mapping[str, Any] | str | Sequence[str]
OnEvent: TypeAlias = Callable[[str, int, dict[str, Any]], object]
Distance: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Augment: TypeAlias = Callable[[Tensor, Generator], Tensor]
CreateOptimizer: TypeAlias = Callable[[list[nn.Parameter]], Optimizer]
'''
ONE = {bool: "bool", int: "int", float: "float", Path: "str | Path", str: "str"}
"""Types of single values; a whole number may stand for any number, as type checkers know."""
FUNCTION_TYPES = {"distance": "Distance", "augment": "Augment", "optimizer": "CreateOptimizer"}
"""Types of the functions that options take in the place of a name."""
WIDTH = 120
APART = ("config", "recipe")
"""Options that stand for others: where one is given, required arguments may be missing."""
ON_EVENT = {"on_event": "OnEvent | None"}


@dataclass(frozen=True)
class Function:
    """A function of the stub.

    Attributes:
        name, returns: its name and the type of its result.
        required: positional arguments that must be given, unless a file or a recipe gives them.
        options: the name of the class of its options.
        optional: positional arguments that need not be given.
        keyword: arguments that are given by name, all optional.
        apart: which of `APART` it takes.
    """

    name: str
    returns: str
    required: Mapping[str, str]
    options: str
    optional: Mapping[str, str] = field(default_factory=dict)
    keyword: Mapping[str, str] = field(default_factory=dict)
    apart: tuple[str, ...] = APART


PATH = "str | Path"
FUNCTIONS = [
    Function(
        "distill", "Outcome", {"data": "Images", "teacher": "Models", "student": "Model", "out": PATH},
        "DistillOptions", keyword=ON_EVENT,
    ),
    Function(
        "distill_several", "list[Outcome]",
        {"data": "Images", "teacher": "Names", "students": "Sequence[str]", "out": PATH}, "DistillOptions", apart=(),
    ),
    Function(
        "train", "Outcome", {"data": "Images", "student": "Model", "out": PATH}, "TrainOptions", keyword=ON_EVENT
    ),
    Function(
        "finetune", "Outcome", {"data": "Images", "model": "Model", "out": PATH}, "FinetuneOptions", keyword=ON_EVENT
    ),
    Function("head", "Result", {"data": "Images", "model": "Model", "out": PATH}, "HeadOptions", apart=("config",)),
    Function("recipe", "Outcome", {"name": "str"}, "RecipeOptions", keyword=ON_EVENT, apart=()),
    Function("prepare", "dict[str, Any]", {"data": "Images"}, "PrepareOptions", apart=("config",)),
    Function(
        "tune", "Tuned", {"what": "str"}, "TuneOptions", {"out": PATH},
        {"space": "Mapping[str, Any] | Sequence[str]"}, apart=(),
    ),
    Function("study", "dict[str, Any]", {}, "StudyOptions", {"name": PATH, "out": PATH}, apart=()),
    Function("evaluate", "dict[str, Any]", {"model": "Model"}, "EvaluateOptions", apart=("config",)),
    Function(
        "export", "dict[str, Any]", {"model": "Model"}, "ExportOptions", {"out": PATH}, apart=("config",)
    ),
    Function(
        "benchmark", "dict[str, Any]", {"models": "Model | Sequence[Model]"}, "BenchmarkOptions", apart=("config",)
    ),
    # One image or several: of a path, an array or a tensor, only its content tells.
    *(
        Function("predict", returns, {"model": "Model", "images": images}, "PredictOptions", apart=())
        for images, returns in (
            ("Picture", "Prediction"), ("str | Path | np.ndarray | Tensor", "Any"),
            ("Iterable[AnyImage]", "Predictions"),
        )
    ),
    Function(
        "embed", "np.ndarray", {"model": "Model", "images": "AnyImage | Iterable[AnyImage]"}, "EmbedOptions", apart=()
    ),
    Function(
        "select", "dict[str, Any]", {"pool": "Images", "teacher": "Model"}, "SelectOptions", {"out": PATH},
        apart=("config",),
    ),
]  # fmt: skip


def stub() -> str:
    """Returns the text of the stub."""
    return "\n".join([HEADER, *classes(), *(line for each in FUNCTIONS for line in signatures(each)), load_signature()])


def load_signature() -> str:
    """Returns the signature of `funmatch.load`, which takes no options of a table: as it is written there."""
    parameters = list(inspect.signature(load).parameters.values())
    lines = [f"{each.name}: {each.annotation}" for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
    lines += ["*", *(f"{p.name}: {p.annotation} = {p.default!r}" for p in parameters if p.kind is p.KEYWORD_ONLY)]
    one_each = "".join(f"    {line},\n" for line in lines)
    return f"def load(\n{one_each}) -> Classifier: ...\n"


def classes() -> Iterator[str]:
    """Yields a class of options for each function, without the arguments that the function names itself."""
    images = keys(Images, {*APART})
    yield from options_class("ImagesOptions", "TypedDict, total=False", "Options for how images are read.", images)
    shared = keys(Train, {"data", "student", "out", *APART})
    yield from options_class("TrainOptions", "ImagesOptions, total=False", of("train"), changed(shared, images))
    finetune, distill = (keys(table, {"data", "student", "out", "teacher", *APART}) for table in (Finetune, Distill))
    yield from options_class("FinetuneOptions", "TrainOptions, total=False", of("finetune"), changed(finetune, shared))
    yield from options_class("DistillOptions", "TrainOptions, total=False", of("distill"), changed(distill, shared))
    # A recipe or a search may be of any of the three commands.
    places = keys(Distill, {*Distill.model_fields} - {"data", "student", "teacher"}, all_names=True)
    out, config = keys(Distill, {*Distill.model_fields} - {"out"}), keys(Distill, {*Distill.model_fields} - {"config"})
    yield from options_class("RecipeOptions", "DistillOptions, total=False", of("recipe"), places | out | config)
    search = keys(SearchDistill, {*Distill.model_fields, "space"}) | places
    recipe = keys(Distill, {*Distill.model_fields} - {"recipe"})
    yield from options_class("TuneOptions", "DistillOptions, total=False", of("tune"), search | config | recipe)
    for verb, table, named in (
        ("prepare", TABLES["prepare"], {"data", "config"}), ("evaluate", TABLES["evaluate"], {"model", "config"}),
        ("head", TABLES["head"], {"data", "model", "out", "config"}),
        ("export", TABLES["export"], {"model", "out", "config"}),
        ("benchmark", TABLES["benchmark"], {"models", "config"}),
        ("study", TABLES["study"], {"name", "out"}), ("embed", ImageOptions, {"model"}),
        ("predict", PredictionOptions, {"model"}), ("select", TABLES["select"], {"pool", "teacher", "out", "config"}),
    ):  # fmt: skip
        own, base = keys(table, named), "TypedDict"
        if issubclass(table, Images):
            own, base = changed(own, images), "ImagesOptions"
        yield from options_class(f"{verb.title()}Options", f"{base}, total=False", of(verb), own)


def of(verb: str) -> str:
    return f"Options of `funmatch.{verb}`."


Keys = dict[str, tuple[str, str]]
"""Type and sentence of each key."""


def keys(table: type[Options], without: set[str], *, all_names: bool = False) -> Keys:
    """Returns the keys of a table's options: each under the name that the function uses, and under its other names.

    Args:
        without: options that are left out, whatever their name.
        all_names: under all its names even where the name is an argument of most functions (model, student).
    """
    found: Keys = {}
    for name, (word, *others) in option_names(table).items():
        if name in without:
            continue
        found[word] = type_of(table, name), sentence(table, name)
        found |= dict.fromkeys(others, (found[word][0], f"The same as {word}."))
    return found if all_names else {key: value for key, value in found.items() if key not in ("model", "student")}


def changed(own: Keys, base: Keys) -> Keys:
    """Returns the keys of which the base says something else; a class may not change their types."""
    for key in own.keys() & base.keys():
        assert own[key][0] == base[key][0], f"{key} has two types, {own[key][0]} and {base[key][0]}"
    return {key: value for key, value in own.items() if base.get(key) != value}


def type_of(table: type[Options], name: str) -> str:
    """Returns the type of an option's value in a call."""
    kind, opt = kind_of(table.model_fields[name]), table.opt(name)
    if opt.refers is Refers.MODEL:
        found = "Models" if kind.several else "Model"
    elif kind.pairs:
        found = "KeyValues"
    elif choices := kind.choices or named_choices(opt.metavar):
        found = f"Literal[{', '.join(map(repr, choices))}]"
    elif kind.several and kind.types == {str}:
        found = "Names"
    else:
        found = " | ".join(ONE[each] for each in ONE if each in kind.types)
        # Whole numbers are numbers to type checkers.
        found = found.replace("int | float", "float")
    if kind.several and found in ("int", "float", PATH):
        several = f"Sequence[{found}]"
        found = several if kind.count else f"{found} | {several}"
    if opt.function:
        found = f"{found} | {FUNCTION_TYPES[name]}"
    return f"{found} | None" if kind.optional else found


def named_choices(metavar: str | None) -> list[str]:
    """Returns the words that stand for a value in `--help`, of options that are declared for any text.

    So that the message for a wrong one lists near names.
    """
    return metavar.split("|") if metavar and "|" in metavar else []


def sentence(table: type[Options], name: str) -> str:
    """Returns what an option sets, and its default."""
    text = table.description(name)
    note = default_of(table, name)
    return in_python(f"{text} ({note})" if note and note != "required" else text, table)


def options_class(name: str, bases: str, about: str, found: Keys) -> Iterator[str]:
    """Yields a class of options."""
    yield f"class {name}({bases}):"
    yield f'    """{about}"""\n'
    for key, (kind, text) in found.items():
        yield literal(f"    {key}: ", kind)
        quoted = text.replace("\\", "\\\\")
        lines = textwrap.wrap(f'"""{quoted}"""', WIDTH - 4, break_on_hyphens=False, break_long_words=False)
        yield "\n".join(f"    {line}" for line in lines)
    yield ""


def literal(start: str, kind: str) -> str:
    """Returns an annotation as `ruff format` lays it out."""
    kind = kind.replace("'", '"')
    if len(start) + len(kind) <= WIDTH:
        return start + kind
    choices, rest = kind.removeprefix("Literal[").split("]")
    if rest:
        inside = f"        Literal[{choices}]"
        if len(inside) > WIDTH:
            each_line = "".join(f"            {each},\n" for each in choices.split(", "))
            inside = f"        Literal[\n{each_line}        ]"
        return f"{start}(\n{inside}\n        {rest.strip()}\n    )"
    inside = ", ".join(choices.split(", "))
    if len(inside) + 8 <= WIDTH:
        return f"{start}Literal[\n        {inside}\n    ]{rest}"
    return f"{start}Literal[\n" + "".join(f"        {each},\n" for each in choices.split(", ")) + f"    ]{rest}"


def signatures(function: Function) -> Iterator[str]:
    """Yields the signatures of a function: all required arguments, or a file or recipe that gives them."""
    chosen = [None, *function.apart]
    for key in chosen:
        optional = function.required if key else {}
        lines = [f"{name}: {kind}" for name, kind in function.required.items()] if not key else []
        lines += [f"{name}: {kind} | None = None" for name, kind in {**optional, **function.optional}.items()]
        named = [f"{each}: {PATH if each == 'config' else 'str'}" for each in function.apart if each == key]
        named += [
            f"{each}: {PATH if each == 'config' else 'str'} | None = None" for each in function.apart if each != key
        ]
        named += [
            f"{name}: {kind} = None" if kind.endswith("None") else f"{name}: {kind} = ()"
            for name, kind in function.keyword.items()
        ]
        lines += ["*", *named] if named else []
        lines.append(f"**options: Unpack[{function.options}]")
        if len(chosen) > 1 or [each.name for each in FUNCTIONS].count(function.name) > 1:
            yield "@overload"
        inline = f"def {function.name}({', '.join(lines)}) -> {function.returns}: ..."
        if len(inline) <= WIDTH:
            yield inline
        elif len(", ".join(lines)) + 4 <= WIDTH:
            yield f"def {function.name}(\n    {', '.join(lines)}\n) -> {function.returns}: ..."
        else:
            one_each = "".join(f"    {line},\n" for line in lines)
            yield f"def {function.name}(\n{one_each}) -> {function.returns}: ..."


if __name__ == "__main__":
    STUB.write_text(stub())
