"""Exports a model in several formats, and checks each in its own runtime."""

import copy
import json
import platform
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from funmatch.config import Export
from funmatch.errors import InputError
from funmatch.runtime.disk.files import write_folder_atomically
from funmatch.runtime.disk.partials import remove_beside
from funmatch.runtime.log import info, track
from funmatch.shipping.export import record, sidecars
from funmatch.shipping.export.formats import FORMATS, Job, make_job
from funmatch.shipping.export.locate import first_difference
from funmatch.shipping.export.smaller import write_smaller
from funmatch.shipping.export.verify import Comparison, compare, refuse_unless_equal
from funmatch.shipping.real_images import RealData, RealImages, open_real_data
from funmatch.shipping.runtimes import Runtime, model_files
from funmatch.training.student.trained_model import TrainedModel


def export(config: Export, model: TrainedModel, data: RealData | None) -> dict[str, Any]:
    """Writes a folder with a model in each of the formats, or finds it written by the same command.

    Args:
        config: the options.
        model: the model.
        data: images to compare on, and by which a smaller model is calibrated; None where neither is wanted.

    Returns:
        `out`, `model`, `run`, `formats`: by format `file`, `bytes`, and the figures of `verify.Comparison`; and
        `quantized`: as of `write_smaller`, or None.

    Raises:
        InputError: the folder exists, a network cannot be exported, or a file differs from PyTorch.
    """
    out = place_of(config, model)
    if config.quantize and config.probabilities and model.classifier.card.task == "multilabel":
        raise InputError(
            f"--quantize compares logits where an image may have several classes, as {model.name} gives them; omit "
            "--probabilities"
        )
    job = make_job(
        model, uint8=config.input == "uint8", probabilities=config.probabilities, opset=config.opset,
        fixed_batch=config.fixed_batch,
    )  # fmt: skip
    of = record.describe(config, model, job.about, data)
    found = None if config.overwrite else record.find(out, of)
    if found is not None:
        info(f"export: {out} is there already, as this command writes it")
        remove_beside(out)
    else:
        found = _write(config, job, data, out, of)
    run = str(model.run.folder) if model.run else None
    return {"out": str(out), "model": model.name, "run": run, **found}


def _write(config: Export, job: Job, data: RealData | None, out: Path, of: dict[str, Any]) -> dict[str, Any]:
    """Writes the folder, all of it or nothing; returns the `formats` and `quantized` of `export`."""
    images = data.choose(config.images, "val", "train", "test") if data and config.verify else None
    reference = _reference(job, images) if images else None
    out.parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    with write_folder_atomically(out) as partial:
        for name in dict.fromkeys(config.format):
            info(f"export: writing {name} …")
            FORMATS[name].write(job, partial)
            figures = _check(name, job, partial, images, reference) if images and reference is not None else {}
            found[name] = {"file": FORMATS[name].file, "bytes": _size(partial, name), **figures}
        smaller = write_smaller(config, data, partial / FORMATS["onnx"].file) if data and config.quantize else None
        shown = ("onnx", "openvino", "torch-export", "keras", "savedmodel", "tflite")
        name = next((FORMATS[each].file for each in shown if each in found), None)
        about = sidecars.with_tensorflow(job.about, [each["file"] for each in found.values()])
        sidecars.write_sidecars(partial, about, name)
        if images:
            checked = {"formats": found, **_circumstances(images)}
            (partial / sidecars.VERIFICATION).write_text(json.dumps(checked, indent=2))
        result = {"formats": found, "quantized": smaller}
        record.write(partial, of, result)
    return result


def place_of(config: Export, model: TrainedModel) -> Path:
    """Returns the folder to write, by default inside the run's.

    Raises:
        InputError: it exists without a record and must not be replaced, or there is no run whose folder it could be in.
    """
    if config.out is None and model.run is None:
        raise InputError(f"{config.model} is not a run, so pass --out, the folder for the files")
    out = config.out.expanduser() if config.out else model.run.folder / "export" if model.run else Path()
    if out.is_file():
        raise InputError(f"{out} is a file; choose another --out")
    if out.is_dir() and any(out.iterdir()):
        if not config.overwrite and not (out / record.RECORD).is_file():
            raise InputError(f"{out} exists; pass --overwrite to replace it, or another --out")
        # Whatever else is in a folder is not ours to remove.
        if not (out / sidecars.PREPROCESSING).is_file():
            raise InputError(f"{out} is not an export, so it is not replaced; choose another --out")
    return out


def data_for(config: Export, model: TrainedModel) -> RealData | None:
    """Opens the images to compare on and to calibrate by; None where neither is wanted.

    Raises:
        InputError: there are none.
    """
    if not config.verify and not config.quantize:
        return None
    if config.verify and model.run is None and not config.data:
        raise InputError(
            f"no images to check the export on: {config.model} is not a run, so pass --data, or --no-verify"
        )
    return open_real_data(config, model)


def _reference(job: Job, images: RealImages) -> np.ndarray:
    """Computes the outputs of PyTorch, with the classifier as it is: neither folded nor traced."""
    outputs = []
    with torch.inference_mode():
        for batch in _tracked(job, images, "PyTorch"):
            views = torch.from_numpy(batch).float() / 255 if job.net.uint8 else torch.from_numpy(batch)
            logits = job.model.classifier(views).float()
            outputs.append((job.net.task.probabilities(logits) if job.net.probabilities else logits).numpy())
    return np.concatenate(outputs)


def _check(name: str, job: Job, folder: Path, images: RealImages, reference: np.ndarray) -> dict[str, Any]:
    """Compares a file in its runtime with PyTorch; returns the figures."""
    runtime = FORMATS[name].open(job, folder)
    outputs = np.concatenate([_compute(runtime, batch) for batch in _tracked(job, images, runtime.name)])
    expected = reference
    # timm's format has neither probabilities nor uint8: it is the network alone.
    if name == "timm" and job.net.probabilities:
        outputs = job.net.task.probabilities(torch.from_numpy(outputs)).numpy()
    comparison = compare(expected, outputs)
    if not comparison.agrees and not comparison.others:
        comparison = replace(comparison, rounding=_rounding(job, _image(images, comparison, uint8=job.net.uint8)))
    where = _where(job, folder, images, comparison) if name == "onnx" and not comparison.agrees else ""
    refuse_unless_equal(name, comparison, expected, outputs, job.model.class_names, where)
    return {"runtime": runtime.name, **comparison.to_json()}


def _where(job: Job, folder: Path, images: RealImages, comparison: Comparison) -> str:
    """Returns where in the network an ONNX file begins to differ, as a clause."""
    one = np.repeat(_image(images, comparison, uint8=job.net.uint8), job.fixed_batch or 1, axis=0)
    return first_difference(job.net, folder / FORMATS["onnx"].file, one)


def _image(images: RealImages, comparison: Comparison, *, uint8: bool) -> np.ndarray:
    """Returns the image that shows best how a file differs, as a batch."""
    return next(replace(images, split=images.split.subset(np.array([comparison.row]))).batches(uint8=uint8))


@torch.inference_mode()
def _rounding(job: Job, image: np.ndarray) -> float:
    """Returns the error of PyTorch's outputs in fp32, relative to the largest; 0 for networks that have no float64."""
    views = torch.from_numpy(image).float() / (255 if job.net.uint8 else 1)
    model = job.model.classifier
    try:
        exact = copy.deepcopy(model).double()(views.double())
    except RuntimeError:  # code that asks for float32
        return 0.0
    both = (model(views).double(), exact)
    outputs = [job.net.task.probabilities(each) if job.net.probabilities else each for each in both]
    return ((outputs[0] - outputs[1]).abs().max() / outputs[1].abs().max()).item()


def _compute(runtime: Runtime, batch: np.ndarray) -> np.ndarray:
    wanted = runtime.dtype == np.uint8
    if batch.dtype == np.uint8 and not wanted:
        batch = batch.astype(np.float32) / 255
    return runtime(batch)


def _tracked(job: Job, images: RealImages, label: str) -> Iterator[np.ndarray]:
    count = -(-len(images) // images.batch)
    return iter(track(images.batches(uint8=job.net.uint8), count, f"checking in {label}"))


def _size(folder: Path, name: str) -> int:
    """Returns the bytes of a format's files: OpenVINO and large ONNX files have their weights beside them."""
    path = folder / FORMATS[name].file
    files = [each for each in path.rglob("*") if each.is_file()] if path.is_dir() else model_files(path)
    return sum(each.stat().st_size for each in files)


def _circumstances(images: RealImages) -> dict[str, Any]:
    return {
        "images": {"split": images.split.name, "count": len(images)},
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "machine": platform.machine(),
    }
