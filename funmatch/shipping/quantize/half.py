"""Converts an ONNX model to half precision, with inputs and outputs as they were."""

import warnings
from pathlib import Path

from funmatch.shipping.runtimes import require


def write_half(source: Path, path: Path) -> None:
    """Writes a model with weights and activations in fp16; inputs and outputs keep their type."""
    onnx = require("onnx")
    model = onnx.load(str(source))
    with warnings.catch_warnings():
        # Weights beyond the smallest and largest fp16 number are moved to it; accuracy is measured afterwards.
        warnings.simplefilter("ignore")
        converted = require("onnxruntime.transformers.float16").convert_float_to_float16(model, keep_io_types=True)
    onnx.save(converted, str(path))
