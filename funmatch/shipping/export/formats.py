"""Writes a model in each of the formats, and opens it in its runtime."""

import copy
import io
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from errno import ENOSPC
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from funmatch.config import Export
from funmatch.errors import InputError
from funmatch.models import bit
from funmatch.models.classifier import crop_fraction
from funmatch.models.inference.fold import bit_for_timm
from funmatch.models.save import save
from funmatch.models.transformers.network import TransformersNet
from funmatch.runtime.disk.files import write_atomically
from funmatch.shipping.export import sidecars, tensorflow
from funmatch.shipping.export.network import ExportNet, explain_failure, quiet, trace, with_plain_attention
from funmatch.shipping.export.onnx_file import write_onnx
from funmatch.shipping.runtimes import Runtime, open_runtime, require
from funmatch.training.student.trained_model import TrainedModel

ALMOST_FULL = 1 << 20
"""Free bytes of a disk below which a library's failure to write is taken for a full one."""


@dataclass(frozen=True)
class Job:
    """What is exported.

    Attributes:
        model: the model.
        net: its network for other runtimes.
        about: of `sidecars.describe`, which formats keep as metadata.
        opset: version of ONNX's operators.
        fixed_batch: number of images that the files take at a time; None: any.
    """

    model: TrainedModel
    net: ExportNet
    about: dict[str, Any]
    opset: int
    fixed_batch: int | None

    @cached_property
    def program(self) -> torch.export.ExportedProgram:
        """The network's operations, recorded once for all formats of PyTorch and OpenVINO."""
        return trace(self.net, self.model.preprocessing.side, self.fixed_batch)

    @cached_property
    def keras_model(self) -> Any:
        """The network in layers of Keras, for all formats of TensorFlow."""
        return tensorflow.build(self.net, self.model.preprocessing.side, self.fixed_batch)

    @cached_property
    def program_for_onnx(self) -> torch.export.ExportedProgram:
        """The network's operations without fused attention."""
        plain = with_plain_attention(self.net)
        return self.program if plain is self.net else trace(plain, self.model.preprocessing.side, self.fixed_batch)


def make_job(
    model: TrainedModel,
    *,
    uint8: bool = False,
    probabilities: bool = False,
    opset: int = Export.model_fields["opset"].default,
    fixed_batch: int | None = None,
) -> Job:
    """Returns a model as it is exported, by default to logits of [0, 1] images, of any number.

    Args:
        uint8, probabilities: of `ExportNet`.
        opset, fixed_batch: of `Job`.
    """
    net = ExportNet(model.classifier, uint8=uint8, probabilities=probabilities)
    about = sidecars.describe(model, uint8=uint8, probabilities=probabilities, fixed_batch=fixed_batch)
    return Job(model, net, about, opset, fixed_batch)


@dataclass(frozen=True)
class Format:
    """A row of the table of formats.

    Attributes:
        file: name of the model's file.
        write: writes it into a folder.
        open: opens what was written there.
    """

    file: str
    write: Callable[[Job, Path], None]
    open: Callable[[Job, Path], Runtime]


def _write_onnx(job: Job, folder: Path) -> None:
    metadata = sidecars.as_metadata(job.about)
    write_onnx(job.net, job.program_for_onnx, folder / "model.onnx", opset=job.opset, metadata=metadata)


def _write_torch_export(job: Job, folder: Path) -> None:
    # Through memory: on a full disk, torch's own writer aborts the process.
    file = io.BytesIO()
    with quiet():
        torch.export.save(job.program, file, extra_files={"about.json": json.dumps(job.about)})
    write_atomically(folder / "model.pt2", file.getbuffer())


def _write_openvino(job: Job, folder: Path) -> None:
    openvino, program = require("openvino"), job.program
    try:
        with quiet():
            model = openvino.convert_model(program)
    except Exception as error:  # types of its own, for operators that it lacks
        name = job.net.classifier.card.name
        raise explain_failure(error, program, name, "try --format onnx, which OpenVINO reads, too") from error
    # By itself it leaves every size open.
    side = job.model.preprocessing.side
    model.reshape([job.fixed_batch or -1, 3, side, side])
    (given,), (output,) = model.inputs, model.outputs
    given.get_tensor().set_names({"images"})
    output.get_tensor().set_names({str(job.about["output"])})
    for key, text in sidecars.as_metadata(job.about).items():
        model.set_rt_info(text, ["funmatch", key])
    # In full precision: by itself it rounds the weights to 16 bits.
    try:
        openvino.save_model(model, folder / "model.xml", compress_to_fp16=False)
    except RuntimeError as error:  # "iostream error", whatever the cause
        if shutil.disk_usage(folder).free < ALMOST_FULL:
            raise OSError(ENOSPC, os.strerror(ENOSPC), str(folder)) from error
        raise


def _write_timm(job: Job, folder: Path) -> None:
    model, how = job.model, job.model.preprocessing
    if model.classifier.function not in (None, bit.OWN) or isinstance(model.classifier.net, TransformersNet):
        raise InputError(f"{model.name} is not a network of timm, which cannot load it; choose other formats")
    classifier = copy.deepcopy(model.classifier)  # saving may scale its kernels
    if classifier.function == bit.OWN:
        classifier = bit_for_timm(classifier)
    fraction = crop_fraction(how.side, how.short_side)
    card = replace(
        classifier.card, side=how.side, crop_fraction=fraction, classes=classifier.card.classes, squash=how.squash,
        resample=how.resample, floor=how.floor,
    )  # fmt: skip
    (folder / "timm").mkdir()
    save(classifier, folder / "timm", card=card, about={"top1": card.top1, "source": job.about["source"]})


def _open_timm(job: Job, folder: Path) -> Runtime:
    import timm

    place = folder / "timm"
    net = timm.create_model(f"local-dir:{place}", pretrained=True).eval()
    mean, std = (np.array(each, np.float32).reshape(-1, 1, 1) for each in
                 (job.model.classifier.card.mean, job.model.classifier.card.std))  # fmt: skip

    @torch.inference_mode()
    def compute(images: np.ndarray) -> np.ndarray:
        views = images.mean(1, keepdims=True) if len(mean) == 1 else images
        return net(torch.from_numpy((views - mean) / std)).float().numpy()

    return Runtime(f"timm {timm.__version__}", place, compute, None, np.dtype(np.float32))


def _open_file(name: str) -> Callable[[Job, Path], Runtime]:
    return lambda _job, folder: open_runtime(folder / name)


def _for_tensorflow(name: str) -> Format:
    def write(job: Job, folder: Path) -> None:
        tensorflow.write(name, lambda: job.keras_model, folder)

    return Format(name, write, lambda _job, folder: tensorflow.open_written(folder / name))


FORMATS: dict[str, Format] = {
    "onnx": Format("model.onnx", _write_onnx, _open_file("model.onnx")),
    "torch-export": Format("model.pt2", _write_torch_export, _open_file("model.pt2")),
    "openvino": Format("model.xml", _write_openvino, _open_file("model.xml")),
    "timm": Format("timm", _write_timm, _open_timm),
    "keras": _for_tensorflow(tensorflow.KERAS),
    "savedmodel": _for_tensorflow(tensorflow.SAVEDMODEL),
    "tflite": _for_tensorflow(tensorflow.TFLITE),
}
"""The formats of `funmatch export`; a new one is a row here, and a word of its option."""
