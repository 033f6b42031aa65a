"""Writes a network as an ONNX file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from funmatch.models.classifier import weight_bytes
from funmatch.shipping.export.network import ExportNet, explain_failure, quiet
from funmatch.shipping.runtimes import require

INPUT, LOGITS, PROBABILITIES = "images", "logits", "probabilities"
"""Names of the model's input and output."""
LARGE = 1_800_000_000
"""Bytes of weights from which a file needs another beside it: the format's own limit is 2 GB."""


def write_onnx(
    net: ExportNet, program: torch.export.ExportedProgram, path: Path, *, opset: int, metadata: Mapping[str, str]
) -> None:
    """Writes an ONNX file.

    Args:
        net: the network.
        program: what `network.trace` recorded of it.
        path: the file.
        opset: version of the operators.
        metadata: texts to keep in the file.

    Raises:
        InputError: onnx is not installed, or an operator of the network is missing in it.
    """
    require("onnx")
    require("onnxscript")
    try:
        with quiet():
            exported: Any = torch.onnx.export(
                program, dynamo=True, opset_version=opset, input_names=[INPUT], verbose=False,
                output_names=[PROBABILITIES if net.probabilities else LOGITS],
            )  # fmt: skip
    except Exception as error:  # the exporter has a dozen types of its own
        advice = "try another --opset, or --format torch-export"
        raise explain_failure(error, program, net.classifier.card.name, advice) from error
    model = exported.model
    for node in model.graph:
        # Paths of this machine, a page for each operation.
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)
    model.producer_name = "funmatch"
    model.metadata_props.update(metadata)
    exported.save(path, external_data=weight_bytes(net) > LARGE)
