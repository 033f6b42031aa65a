"""Opens an exported model in its own runtime: ONNX Runtime, torch.export or OpenVINO."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from funmatch.errors import InputError, first_line

EXTRAS = {"onnx": "ship", "onnxscript": "ship", "onnxruntime": "ship", "torchao": "ship", "pyarrow": "ship",
          "openvino": "openvino", "tensorflow": "tensorflow", "keras": "tensorflow"}  # fmt: skip
"""The extra of this package that installs a library."""
Array = np.ndarray


def to_bytes(images: Array) -> Array:
    """Returns images in [0, 1] as uint8, 0 … 255."""
    return np.round(images * 255).astype(np.uint8)


def model_files(path: Path) -> list[Path]:
    """Returns a model's file, and those beside it that hold its weights: OpenVINO's, and those of large ONNX files."""
    beside = path.with_suffix(".bin") if path.suffix == ".xml" else path.with_name(f"{path.name}.data")
    return [path, *([beside] if beside.is_file() else [])]


@dataclass(frozen=True)
class Runtime:
    """An exported model that is ready to compute.

    Attributes:
        name: of the runtime, with its version.
        path: of the model.
        compute: (n, 3, side, side) to (n, classes) float32, of the type that the model takes.
        batch: images in each of its batches; None for any number.
        dtype: float32 or uint8, what the model takes.
    """

    name: str
    path: Path
    compute: Callable[[Array], Array]
    batch: int | None
    dtype: np.dtype[Any]

    def as_input(self, images: Array) -> Array:
        """Returns images (n, 3, side, side) in [0, 1] as the model takes them, which may be as bytes."""
        return to_bytes(images) if self.dtype == np.uint8 else images

    def __call__(self, images: Array) -> Array:
        """Computes the outputs of (n, 3, side, side) images, of any number."""
        if self.batch is None or len(images) == self.batch:
            return self.compute(images)
        # A fixed batch gets its missing images as zeros, whose outputs are dropped.
        parts = []
        for start in range(0, len(images), self.batch):
            part = images[start : start + self.batch]
            missing = np.zeros((self.batch - len(part), *part.shape[1:]), part.dtype)
            parts.append(self.compute(np.concatenate([part, missing]))[: len(part)])
        return np.concatenate(parts)


def require(name: str) -> Any:
    """Imports an optional library.

    Raises:
        InputError: it is not installed; the message names the extra that installs it.
    """
    try:
        return import_module(name)
    except ImportError as error:
        # A library of its own may be missing, too: then its name tells more.
        missing = error.name or name
        raise InputError(
            f"{name} is not installed{f' completely: {missing} is missing' if missing != name else ''}; "
            f"pip install 'funmatch[{EXTRAS[name.partition('.')[0]]}]'"
        ) from None


def open_runtime(path: Path, threads: int | None = None) -> Runtime:
    """Opens an exported model by the ending of its file.

    Args:
        path: .onnx, .pt2 (torch.export) or .xml (OpenVINO).
        threads: of the runtime; None: its own choice.

    Raises:
        InputError: the runtime is not installed, or cannot read the file.
    """
    if path.suffix not in OPENERS:
        raise InputError(f"{path} is not an exported model; expected a file that ends in {', '.join(OPENERS)}")
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    try:
        return OPENERS[path.suffix](path, threads)
    except InputError:
        raise
    except Exception as error:  # runtimes raise types of their own for damaged files and unknown operators
        raise InputError(f"{path} cannot be opened in its runtime: {first_line(error)}") from error


def _open_onnx(path: Path, threads: int | None) -> Runtime:
    runtime = require("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors alone
    if threads:
        options.intra_op_num_threads = threads
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    given, (output, *_) = session.get_inputs()[0], session.get_outputs()
    batch = given.shape[0] if isinstance(given.shape[0], int) else None
    dtype = np.dtype(np.uint8 if given.type == "tensor(uint8)" else np.float32)

    def compute(images: Array) -> Array:
        return session.run([output.name], {given.name: images})[0].astype(np.float32, copy=False)

    return Runtime(f"ONNX Runtime {runtime.__version__}", path, compute, batch, dtype)


def _open_torch_export(path: Path, threads: int | None) -> Runtime:
    import torch

    if threads:
        torch.set_num_threads(threads)
    program = torch.export.load(path)
    network = program.module()
    # The last placeholder is the input; those before are weights.
    given = [node for node in program.graph.nodes if node.op == "placeholder"][-1].meta["val"]
    batch = given.shape[0] if isinstance(given.shape[0], int) else None
    dtype = np.dtype(np.uint8 if given.dtype == torch.uint8 else np.float32)

    def compute(images: Array) -> Array:
        with torch.inference_mode():
            return network(torch.from_numpy(np.ascontiguousarray(images))).float().numpy()

    return Runtime(f"PyTorch {torch.__version__}", path, compute, batch, dtype)


def _open_openvino(path: Path, threads: int | None) -> Runtime:
    openvino = require("openvino")
    config = {"INFERENCE_PRECISION_HINT": "f32"} | ({"INFERENCE_NUM_THREADS": threads} if threads else {})
    compiled = openvino.Core().compile_model(str(path), "CPU", config)
    given = compiled.input(0)
    batch = None if given.partial_shape[0].is_dynamic else given.partial_shape[0].get_length()
    version = openvino.__version__.partition("-")[0]

    def compute(images: Array) -> Array:
        return np.asarray(compiled(images)[0], dtype=np.float32)

    return Runtime(f"OpenVINO {version}", path, compute, batch, np.dtype(given.element_type.to_dtype()))


OPENERS: dict[str, Callable[[Path, int | None], Runtime]] = {
    ".onnx": _open_onnx, ".pt2": _open_torch_export, ".xml": _open_openvino,
}  # fmt: skip
"""How to open a file, by its ending."""
