"""Quantises a prepared ONNX graph to INT8 by ONNX Runtime's static quantisation, with ranges from calibration."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from funmatch.shipping.quantize.graph import LAYERS, Graph, quiet
from funmatch.shipping.runtimes import open_runtime, require

METHODS = {"minmax": "MinMax", "percentile": "Percentile", "entropy": "Entropy"}
"""Ways to choose the range of an activation, with ONNX Runtime's names for them."""
TRAINED = "trained"
"""Ranges that quantisation-aware training found."""
HISTOGRAM_PIXELS = 16 * 224 * 224
"""Pixels for the ways that keep all activations of what they get in memory: 16 images of 224 × 224."""
OPTIONS = {"percentile": {"percentile": 99.99}, "entropy": {"num_bins": 1024}}
"""Settings of a way; the other ones have none. Of 128 bins, ONNX Runtime's default, 128 levels have nothing to leave
out."""
EXTRA = {
    "WeightSymmetric": True,
    "ActivationSymmetric": False,
    # These give fp32 out of INT8 in one kernel, so what is between them need not be rounded once more.
    "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"],
}


@dataclass(frozen=True)
class Ranges:
    """Ranges of the activations of a graph.

    Attributes:
        method: how they were chosen, of `METHODS`.
        tensors: as ONNX Runtime's calibration gives them.
        outputs: whether what convolutions give, and what is between them, is 8 bits too; else only inputs of layers.
    """

    method: str
    tensors: Any
    outputs: bool = True


def calibrate(graph: Graph, method: str, batches: Iterable[np.ndarray], folder: Path) -> Ranges:
    """Chooses the range of each activation by the images of the batches.

    Args:
        method: of `METHODS`.
        batches: (n, 3, side, side) in [0, 1] each.
        folder: for a temporary model.
    """
    tools = require("onnxruntime.quantization")
    runtime = open_runtime(graph.path)
    with quiet():
        calibrator = tools.create_calibrator(
            graph.path, list(graph.operations), augmented_model_path=str(folder / f"{method}.onnx"),
            calibrate_method=getattr(tools.CalibrationMethod, METHODS[method]), extra_options=OPTIONS.get(method, {}),
        )  # fmt: skip
        name = calibrator.infer_session.get_inputs()[0].name
        # One histogram of all: one that later images widen gets more bins, without limit where a few values are large.
        for batch in batches if method == "minmax" else [_first(batches, HISTOGRAM_PIXELS)]:
            calibrator.collect_data(_reader(tools, name, runtime.as_input(batch)))
        return Ranges(method, calibrator.compute_data())


def with_trained(graph: Graph, ranges: Ranges, trained: Mapping[str, tuple[float, float]]) -> Ranges:
    """Returns ranges with those that training found for the inputs of layers, by the layers' names in the network."""
    data = require("onnxruntime.quantization.calibrate").TensorData
    tensors = copy.deepcopy(ranges.tensors)
    for layer in graph.layers:
        # The exporter's names may have more modules before the network's own.
        found = next((each for name, each in trained.items() if f".{layer.name}".endswith(f".{name}")), None)
        if found and layer.tensor in tensors:
            low, high = (np.array(value, np.float32) for value in found)
            tensors[layer.tensor] = data(lowest=low, highest=high)
    # Training rounded the inputs alone: outputs, e.g. those before a hard swish, may have no range that fits 8 bits.
    return Ranges(TRAINED, tensors, outputs=False)


def _first(batches: Iterable[np.ndarray], pixels: int) -> np.ndarray:
    """Returns the first images of batches, as many as have so many pixels, in one array."""
    found, count = [], 0
    for batch in batches:
        found.append(batch)
        count += len(batch)
        if count * batch.shape[-1] * batch.shape[-2] >= pixels:
            break
    one = np.concatenate(found)
    return one[: max(1, pixels // (one.shape[-1] * one.shape[-2]))]


def _reader(tools: Any, name: str, batch: np.ndarray) -> Any:
    """Returns ONNX Runtime's reader of a single batch."""

    class Reader(tools.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter([{name: batch}])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.left, None)

    return Reader()


def write_int8(graph: Graph, ranges: Ranges, path: Path, *, fp32: Iterable[str] = (), only: str | None = None) -> None:
    """Writes a graph with INT8 weights (one scale per output channel) and 8-bit activations.

    Args:
        fp32: nodes that stay in fp32.
        only: the only node that is quantised; None: all but those in `fp32`.
    """
    onnx, tools = require("onnx"), require("onnxruntime.quantization")
    quantizer = require("onnxruntime.quantization.qdq_quantizer").QDQQuantizer(
        onnx.load(str(graph.path)),
        per_channel=True,
        # Full range: 7 bits are for processors without VNNI, whose sums of 16 bits could overflow.
        reduce_range=False,
        # Of these types ONNX Runtime's kernels for x86 are the fastest.
        weight_qType=tools.QuantType.QInt8, activation_qType=tools.QuantType.QUInt8,
        tensors_range=ranges.tensors,
        nodes_to_quantize=[only] if only else [],
        # The products around a softmax lose most, and have no weights that would become smaller.
        nodes_to_exclude=[*fp32, *graph.products],
        op_types_to_quantize=list(graph.operations if ranges.outputs else LAYERS),
        extra_options=EXTRA if ranges.outputs else EXTRA | {"OpTypesToExcludeOutputQuantization": list(LAYERS)},
    )  # fmt: skip
    with quiet():
        quantizer.quantize_model()
    model = quantizer.model.model
    # Shapes and the exporter's notes on each operation, which nothing reads any more.
    del model.graph.value_info[:]
    for node in model.graph.node:
        del node.metadata_props[:]
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, graph.metadata)
    onnx.save(model, str(path))
