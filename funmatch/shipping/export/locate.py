"""Finds the module of a network from which on its ONNX file computes something else."""

import ast
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from funmatch.shipping.export.network import ExportNet
from funmatch.shipping.runtimes import require

DIFFERS = 1e-3
"""Difference of a module's output, relative to its largest value, that is more than rounding."""
SCOPES = "pkg.torch.onnx.name_scopes"
"""The entry in which torch's exporter writes to which modules an operation belongs."""


def first_difference(net: ExportNet, path: Path, images: np.ndarray) -> str:
    """Returns which module is the first whose output differs, as a clause for a message; empty where none is found.

    Args:
        net: the network that was exported.
        path: its ONNX file.
        images: as the network takes them.
    """
    onnx, runtime = require("onnx"), require("onnxruntime")
    expected = _outputs_by_module(net, torch.from_numpy(images))
    model = onnx.load(path)
    # The last operation of a module gives its output. Sorted as they are computed, as nodes of a file are.
    names = {module: node.output[0] for node in model.graph.node for module in _modules_of(node) if module in expected}
    known = {each.name for each in model.graph.output}
    wanted = [name for name in dict.fromkeys(names.values()) if name not in known]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    outputs = [each.name for each in session.get_outputs()]
    found = dict(zip(outputs, session.run(None, {session.get_inputs()[0].name: images}), strict=True))
    for module, name in names.items():
        # The exporter joins some operations, after which a module has no output of its own.
        if found[name].shape == expected[module].shape and _distance(found[name], expected[module]) > DIFFERS:
            kind = type(net.get_submodule(module)).__name__
            return f"the first module that differs is {module.removeprefix('classifier.net.')} ({kind})"
    return ""


def _outputs_by_module(net: ExportNet, images: Tensor) -> dict[str, np.ndarray]:
    """Computes the output of each module that has no parts, in the order in which they are computed."""
    outputs: dict[str, np.ndarray] = {}
    leaves = [(name, module) for name, module in net.named_modules() if not list(module.children())]

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                outputs[name] = output.numpy().copy()  # the next module may work in place

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in leaves]
    try:
        with torch.no_grad():
            net(images)
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def _modules_of(node: Any) -> list[str]:
    for entry in node.metadata_props:
        if entry.key == SCOPES:
            return [str(each) for each in ast.literal_eval(entry.value)]
    return []


def _distance(found: np.ndarray, expected: np.ndarray) -> float:
    scale = max(float(np.abs(expected).max()), float(np.finfo(np.float32).tiny))
    return float(np.nan_to_num(np.abs(found - expected), nan=np.inf).max()) / scale
