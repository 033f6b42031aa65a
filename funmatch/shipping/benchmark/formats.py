"""Makes a model ready to compute in each format: PyTorch, compiled, ONNX Runtime, OpenVINO, and files of these."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from funmatch.data.cache.stores import CachedSplit
from funmatch.errors import InputError
from funmatch.models.class_map import ClassMap
from funmatch.models.classifier import Classifier, weight_bytes
from funmatch.ops.view_spec import Preprocessing
from funmatch.runtime import devices
from funmatch.runtime.disk.json_files import Damaged, read_json
from funmatch.shipping.export import formats as export_formats
from funmatch.shipping.export import sidecars
from funmatch.shipping.export.formats import Job, make_job
from funmatch.shipping.quantize.quantize import How, quantize_onnx
from funmatch.shipping.quantize.scores import Images
from funmatch.shipping.real_images import RealImages
from funmatch.shipping.runtimes import model_files, open_runtime
from funmatch.training.student.trained_model import TrainedModel

Predictor = Callable[[np.ndarray], np.ndarray]
"""Maps images (n, 3, side, side) to logits (n, classes) float32, and returns when they are there."""
ONNX = ("onnx", "onnxscript", "onnxruntime")
"""Modules that write and run ONNX files."""
CALIBRATION_IMAGES, CALIBRATED_AT_ONCE = 128, 32
"""Training images by which INT8 chooses its ranges, at most; and in a batch."""


@dataclass(frozen=True)
class Machine:
    """Where formats compute.

    Attributes:
        device: of PyTorch; the other runtimes compute on the CPU.
        precision: of PyTorch on it: fp32, bf16 or fp16.
        threads: of every runtime.
    """

    device: torch.device
    precision: str
    threads: int


@dataclass(frozen=True)
class Subject:
    """A model that is measured in several formats, or a file of a runtime.

    Attributes:
        label: its name in tables.
        name: as the user gave it.
        preprocessing: how it sees images.
        model: the model; None for a file.
        file: the file; None for a model.
        folder: for the files that its formats need.
        class_map: its outputs for each class of the images, or None for its own.
        training_images: from which INT8 chooses its ranges, or None.
    """

    label: str
    name: str
    preprocessing: Preprocessing
    model: TrainedModel | None
    file: Path | None
    folder: Path
    class_map: ClassMap | None = None
    training_images: CachedSplit | None = None

    @property
    def trained(self) -> TrainedModel:
        """The model; a file has none."""
        assert self.model
        return self.model

    @cached_property
    def job(self) -> Job:
        """The model as it is exported: its operations are recorded once for all formats."""
        return make_job(self.trained)

    @cached_property
    def onnx(self) -> Path:
        """The model as an ONNX file, which is written once for all formats that start from it."""
        exported = export_formats.FORMATS["onnx"]
        exported.write(self.job, self.folder)
        return self.folder / exported.file


@dataclass(frozen=True)
class Prepared:
    """A format that is ready to compute.

    Attributes:
        predict: computes logits of what `as_input` returns.
        paths: its files; empty for PyTorch, whose weights are in memory.
        file_bytes: size of its files.
        device: where it computes.
        as_input: returns images (n, 3, side, side) float32 in [0, 1] as the format takes them: some take bytes, as
            cameras and decoders give them.
    """

    predict: Predictor
    paths: tuple[Path, ...]
    file_bytes: int
    device: str
    as_input: Callable[[np.ndarray], np.ndarray] = lambda images: images


def _torch_predictor(network: Callable[[Tensor], Tensor], machine: Machine) -> Predictor:
    """Wraps a network: copies of images to the device and of logits from it count, as they do for whoever uses it."""

    @torch.inference_mode()
    def predict(images: np.ndarray) -> np.ndarray:
        views = torch.from_numpy(images).to(machine.device)
        with devices.autocast(machine.device, machine.precision):
            return network(views).float().cpu().numpy()

    return predict


def _in_torch(network: Callable[[Tensor], Tensor], classifier: Classifier, machine: Machine) -> Prepared:
    return Prepared(_torch_predictor(network, machine), (), weight_bytes(classifier.net), str(machine.device))


def _prepare_eager(subject: Subject, machine: Machine) -> Prepared:
    classifier = subject.trained.classifier.to(machine.device)
    return _in_torch(classifier, classifier, machine)


def _prepare_compiled(subject: Subject, machine: Machine) -> Prepared:
    classifier = subject.trained.classifier.to(machine.device)
    # Freezing folds BatchNorm and lets the compiler lay out kernels for this machine. For each size of batches anew:
    # kernels for any size are slower.
    compiled = torch.compile(classifier, dynamic=False, options={"freezing": True})
    return _in_torch(compiled, classifier, machine)


def _prepare_onnx(subject: Subject, machine: Machine) -> Prepared:
    return _open_runtime(subject.onnx, machine)


def _prepare_int8(subject: Subject, machine: Machine) -> Prepared:
    if subject.training_images is None:
        raise InputError("INT8 needs images by which it chooses the ranges of activations; pass --data")
    real = RealImages(subject.training_images, subject.trained, CALIBRATED_AT_ONCE)
    images = Images(list(real))
    # No limit: what INT8 loses is what the benchmark is to show.
    how = How(max_drop=100.0, threads=machine.threads)
    return _open_runtime(quantize_onnx(subject.onnx, subject.folder / "int8.onnx", images, images, how).path, machine)


def _prepare_openvino(subject: Subject, machine: Machine) -> Prepared:
    exported = export_formats.FORMATS["openvino"]
    exported.write(subject.job, subject.folder)
    return _open_runtime(subject.folder / exported.file, machine)


def open_file(subject: Subject, machine: Machine) -> Prepared:
    assert subject.file
    return _open_runtime(subject.file, machine)


def _open_runtime(path: Path, machine: Machine) -> Prepared:
    files = model_files(path)
    runtime = open_runtime(path, machine.threads)
    return Prepared(runtime, tuple(files), sum(each.stat().st_size for each in files), "cpu", runtime.as_input)


def preprocessing_beside(path: Path) -> Preprocessing | None:
    """Returns how a file's model sees images, as `funmatch export` wrote it beside the file; None if it did not."""
    try:
        about = read_json(path.with_name(sidecars.PREPROCESSING), {"preprocessing": dict})["preprocessing"]
        # Exports of earlier versions do not have all fields.
        return Preprocessing(**{each.name: about[each.name] for each in fields(Preprocessing) if each.name in about})
    except (OSError, Damaged, TypeError):
        return None


@dataclass(frozen=True)
class Format:
    """A row of the table of formats.

    Attributes:
        label: its name in tables.
        make: makes a model ready to compute in it.
        needs: modules of other packages.
        few_sizes: whether each size of batches costs much to prepare.
    """

    label: str
    make: Callable[[Subject, Machine], Prepared]
    needs: tuple[str, ...] = ()
    few_sizes: bool = False


FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "eager": Format("PyTorch", _prepare_eager),
        "compiled": Format("PyTorch compiled", _prepare_compiled, few_sizes=True),
        "onnx": Format("ONNX Runtime", _prepare_onnx, ONNX),
        "onnx-int8": Format("ONNX Runtime INT8", _prepare_int8, ONNX),
        "openvino": Format("OpenVINO", _prepare_openvino, ("openvino",)),
    }
)
"""The formats, in the order of tables: that of PyTorch comes first, the others are compared with it."""
