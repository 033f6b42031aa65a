"""Quantises the ONNX file of an export, on images of the run, and records what that changes."""

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import torch

from funmatch.config import Evaluate, Export
from funmatch.ops.tasks.task import task_of
from funmatch.runtime.disk.json_files import EACH, read_json
from funmatch.runtime.log import info
from funmatch.shipping.quantize.quantize import How, quantize_onnx
from funmatch.shipping.quantize.scores import Images
from funmatch.shipping.real_images import RealData, RealImages
from funmatch.training.evaluation import scoring
from funmatch.training.evaluation.subject import open_teachers
from funmatch.training.student.trained_model import TrainedModel

FILES = {8: "model-int8.onnx", 16: "model-fp16.onnx"}
REPORT = "quantize.json"
RANGES = {"funmatch?": {"ranges?": {EACH: (float, float)}, EACH: Any}, EACH: Any}
"""The part of a student's `config.json` that is read here."""
MEASURED = 2000
"""Images at most by which the loss of accuracy is measured: 1 point is 20 of them."""


def write_smaller(config: Export, data: RealData, source: Path) -> dict[str, Any]:
    """Writes the quantised model and its report beside an ONNX file.

    Args:
        config: the options, with `quantize`.
        data: images of the model.
        source: the ONNX file.

    Returns:
        what the report holds: `QuantizeResult.to_json`.

    Raises:
        InputError: there are too few images, or the model has no layer to quantise.
        WorkFailed: it loses more than allowed.
    """
    bits, model = config.quantize or 8, data.model
    calibration = data.choose(config.calibration, "train", "val", "test")
    validation = data.choose(MEASURED, "val", "test", "train")
    info(
        f"export: quantising to {bits} bits, calibrated on {len(calibration):,} images of {calibration.split.name}, "
        f"measured on {len(validation):,} of {validation.split.name} …"
    )
    how = How(
        bits=bits, max_drop=config.max_drop, sensitivity=config.sensitivity, advice=_advice(config, model),
        trained=_trained_ranges(model),
    )  # fmt: skip
    teacher = _teacher_logits(config, data, [calibration, validation])
    task = task_of(model.classifier.card.task)
    result = quantize_onnx(
        source,
        source.with_name(FILES[bits]),
        Images(calibration, teacher=teacher[0], task=task),
        Images(validation, _labels(validation, model), teacher[1], task),
        how,
    )
    found = result.to_json() | {
        "file": result.path.name, "calibration": len(calibration), "calibrated_on": calibration.split.name,
        "images": len(validation), "split": validation.split.name,
    }  # fmt: skip
    del found["path"]  # of a folder that is renamed
    (source.parent / REPORT).write_text(json.dumps(found, indent=2))
    return found


def _labels(images: RealImages, model: TrainedModel) -> np.ndarray | None:
    """Returns the labels of images where they are the model's classes, else None."""
    # Other data than the run's may have other classes, and then no accuracy.
    if not images.split.labelled or model.run is None:
        return None
    return images.split.labels(np.arange(len(images))).numpy()


def _teacher_logits(config: Export, data: RealData, images: list[RealImages]) -> list[np.ndarray | None]:
    """Returns the teacher's logits of each set of images; None for each where there is no teacher."""
    model = data.model
    if not model.knobs.get("teacher"):
        return [None for _ in images]
    options = Evaluate(model=config.model)
    view = scoring.eval_view_of(model.preprocessing, config.batch, torch.device("cpu"), "fp32")
    teachers = open_teachers(options, dict(model.knobs), data.cache, view, {})
    # A run whose teacher was moved is compared with itself in fp32.
    return [teachers.predict(each.split).numpy() if teachers else None for each in images]


def _trained_ranges(model: TrainedModel) -> dict[str, tuple[float, float]]:
    """Returns the ranges that a run which trained for 8 bits found for its layers; empty for any other."""
    if model.run is None or not (model.run.student / "config.json").is_file():
        return {}
    about = read_json(model.run.student / "config.json", RANGES)
    return {name: (low, high) for name, (low, high) in about.get("funmatch", {}).get("ranges", {}).items()}


def _advice(config: Export, model: TrainedModel) -> str:
    """Returns how to train the model for 8 bits; empty where it is not a run, or was trained so already."""
    if model.run is None or config.quantize != 8:
        return ""
    if model.knobs.get("quantize"):
        return "Train it longer, with another --out and --epochs"
    folder = model.run.folder
    command = shlex.join(["funmatch", "distill", str(folder), "--quantize", "8", "--out", f"{folder}-int8"])
    return f"Train it for 8 bits: {command}"
