"""The functions for a finished run or a model: evaluate, export, benchmark, predict, embed, select, load."""

# Annotations stay text, so that they may name torch's classes, which are not imported.
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union

from funmatch.commands.python.arguments import Call, given, model_name, pairs, read_call, run_call
from funmatch.commands.python.messages import python_words
from funmatch.commands.python.signatures import with_options
from funmatch.commands.verbs import TABLES, load_function
from funmatch.config import ImageOptions, PredictionOptions
from funmatch.errors import InputError
from funmatch.reports.result import Result
from funmatch.runtime.functions import allow

if TYPE_CHECKING:  # torch takes seconds to import, and most words on a command line need none
    import numpy as np
    from torch import nn

    from funmatch.models.classifier import Classifier
    from funmatch.reports.predictions import Prediction, Predictions


# `Union`, since `|` does not take a class by its name.
Model: TypeAlias = Union[str, Path, "nn.Module", Result]
"""A model named as on the command line, a finished run, or a module: a `Classifier`, a timm model, or any module that
maps images (n, 3, side, side) in [0, 1] to logits (n, classes)."""


@with_options(TABLES["evaluate"], "evaluate")
def evaluate(model: Model | None = None, **options: Any) -> dict[str, Any]:
    """Evaluates a run or a model on a split, or several (`others=[…]`) on the same images.

    Returns:
        `top1`, `top5`, `agreement`, `kl`, `ece`, `split`, `pictures`, `parameters`, `step`, `run`, …; see
        docs/evaluation.md.

    Examples:
        >>> metrics = funmatch.evaluate("fashion-mini-teacher", data="fashion-mini", split="val")
        >>> metrics["pictures"], metrics["top1"] > 0.8
        (500, True)
    """
    return run_call("evaluate", TABLES["evaluate"], given({"model": model}) | options).to_json()


@with_options(TABLES["export"], "export")
def export(model: Model | None = None, out: str | Path | None = None, **options: Any) -> dict[str, Any]:
    """Writes a model for other runtimes, each file compared with PyTorch in its own.

    Args:
        out: the folder to write; None: `export` in the run's.

    Returns:
        `out`, `model`, `run`, and `formats`: by format `file`, `bytes`, `max_relative`, `same_top1`, …

    Examples:
        >>> found = funmatch.export(
        ...     "fashion-mini-teacher", "exported", data="fashion-mini", format=["torch-export"], images=8
        ... )
        >>> found["formats"]["torch-export"]["max_relative"] < 1e-4
        True
    """
    return run_call("export", TABLES["export"], given({"model": model, "out": out}) | options).to_json()


@with_options(TABLES["benchmark"], "benchmark")
def benchmark(models: Model | Sequence[Model] | None = None, **options: Any) -> dict[str, Any]:
    """Measures size, latency, throughput, memory and accuracy of models in every format, beside their teacher.

    Args:
        models: one model or several, or exported files (`.onnx`, OpenVINO's `.xml`, `.pt2`). The memory of a module is
            unknown, since another process cannot load it.

    Returns:
        `machine`, `versions`, `threads`, `images`, `models`, …, and `results`, a row for each format of each model:
        `status`, `bytes`, `top1`, `agreement`, `ms`, `ms_p90`, `ms_p99`, `images_per_second`, `batch`,
        `memory_bytes`, …; None stands for what was not measured.

    Examples:
        >>> found = funmatch.benchmark(
        ...     "fashion-mini-teacher", data="fashion-mini", formats="eager", images=100, memory=False, spread="90%"
        ... )
        >>> [(each["format"], each["status"], each["ms"] > 0) for each in found["results"]]
        [('eager', 'ok', True)]
    """
    return run_call("benchmark", TABLES["benchmark"], given({"models": models}) | options).to_json()


@with_options(PredictionOptions, "predict")
def predict(model: Model, images: Any, **options: Any) -> Prediction | Predictions:
    """Predicts the classes of images.

    Args:
        model: a run folder, a finished run, any model name, or a module.
        images: one image, or several: a path (of a file, a folder, a pattern, a data set), a PIL image, an array of
            height × width × 3 or a tensor of 3 × height × width (uint8, or floats from 0 to 1, not normalised), a batch
            of these, or a list or an iterator of any of these.

    Returns:
        for one image a `Prediction` with `label`, `score`, `top` and `probabilities`, and with a teacher `teacher`,
        `agreement` and `kl`; for several a list of these that has `labels`, `scores` and `probabilities` of all. Images
        that cannot be read have an `error`.

    Raises:
        funmatch.InputError: an argument is invalid, or the only image cannot be read.

    Examples:
        >>> found = funmatch.predict("fashion-mini-teacher", "fashion-mini", split="val")
        >>> len(found), found[0].label, found.probabilities.shape
        (500, 'ankle boot', (500, 10))
    """
    with python_words(PredictionOptions):
        call = _finished_call("predict", PredictionOptions, given({"model": model}) | options)
        found = load_function("reports.predictions:collect")(call.options, images, call.objects)
        return _only(found, images, found[0].error) if _is_single(images) else found


@with_options(ImageOptions, "embed")
def embed(model: Model, images: Any, **options: Any) -> np.ndarray:
    """Computes the features of images: what the model's last layer classifies.

    Args:
        model: a run folder, a finished run, any model name, or a module.
        images: one image, or several, as for `predict`.

    Returns:
        (images, features) float32, or (features,) for one image; NaN for images that cannot be read.

    Raises:
        funmatch.InputError: an argument is invalid, the only image cannot be read, or the model has no features.

    Examples:
        >>> funmatch.embed("fashion-mini-teacher", "fashion-mini", split="val").shape
        (500, 48)
    """
    with python_words(ImageOptions):
        call = _finished_call("embed", ImageOptions, given({"model": model}) | options)
        rows, reasons = load_function("shipping.embed:embed_given")(call.options, images, call.objects)
        return _only(rows, images, reasons[0]) if _is_single(images) else rows


@with_options(TABLES["select"], "select")
def select(
    pool: str | Path | Sequence[str | Path] | None = None,
    teacher: Model | None = None,
    out: str | Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Chooses images from an unlabelled pool: for each class those that a teacher is surest of, as a table of paths.

    Args:
        pool: folders, files, patterns or tables of paths.
        teacher: a run folder, a finished run, any model name, or a module.
        out: the table, .csv or .parquet; `data="csv:chosen.csv"` reads it.

    Returns:
        `images`, `unreadable`, `unsure`, `chosen`, `classes`, `short`, `kept_clear`, `repeated`, `out`, `teacher`,
        `seconds`.

    Raises:
        funmatch.InputError: there is no such model or image, or the table is there already.

    Examples:
        >>> from PIL import Image
        >>> Image.new("RGB", (32, 32), "grey").save("grey.png")
        >>> found = funmatch.select("grey.png", "fashion-mini-teacher", "chosen.csv", per_class=1)
        >>> found["images"], found["chosen"]
        (1, 1)
    """
    named = {"pool": pool, "teacher": teacher, "out": out}
    return run_call("select", TABLES["select"], given(named) | options).to_json()


def load(
    model: Model,
    *,
    weights: str | Path | None = None,
    options: Mapping[str, Any] | Sequence[str] = (),
    classes: int | None = None,
    side: int | None = None,
    pretrained: bool = True,
    inputs: Any = None,
) -> Classifier:
    """Loads a classifier: a `torch.nn.Module` that maps images (n, 3, side, side) in [0, 1] to logits (n, classes).

    Args:
        model: any model name, a module, a run folder, or a finished run.
        weights: a file of weights for a timm name.
        options: arguments of the constructor, `{"channels": [16, 32]}`.
        classes: number of classes; weights with another number get a new head of zeros. None keeps the head.
        side: of the views, pixels, for networks with a fixed input.
        pretrained: whether a bare timm name means its pretrained weights.
        inputs: mean and standard deviation of the images that a SavedModel was trained on.

    Raises:
        funmatch.InputError: there is no such model, or weights do not fit.

    Examples:
        >>> teacher = funmatch.load("fashion-mini-teacher")
        >>> teacher.eval()(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """
    from funmatch.models import load as models

    name = model_name(model)
    allow(name)
    file = None if weights is None else Path(weights)
    with python_words(TABLES["evaluate"]):
        return models.load(
            name, weights=file, options=pairs(options), classes=classes, side=side, pretrained=pretrained, inputs=inputs
        )


def _is_single(images: Any) -> bool:
    return load_function("shipping.sources.given:is_single")(images)


def _only(found: Any, images: Any, reason: str | None) -> Any:
    """Returns the only one; raises `InputError` if its image cannot be read."""
    if reason:
        raise InputError(f"{images if isinstance(images, str | Path) else 'the image'} cannot be read: {reason}")
    return found[0]


def _finished_call(verb: str, table: type[ImageOptions], arguments: Mapping[str, Any]) -> Call:
    """Builds the options of a call, and refuses names that mean nothing before torch is imported."""
    call = read_call(verb, table, arguments)
    load_function("commands.common.preflight:check")(verb, call.options)
    return call
