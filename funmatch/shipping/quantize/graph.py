"""Prepares an ONNX graph for quantisation, and lists the layers of it that can be quantised."""

import ast
import logging
from collections.abc import Generator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from math import prod
from pathlib import Path
from typing import Any

from funmatch.errors import InputError
from funmatch.shipping.runtimes import require

LAYERS = ("Conv", "Gemm", "MatMul")
"""Operations that have weights; they are most of a network's size and time."""
BETWEEN = ("Add", "MaxPool", "AveragePool", "GlobalAveragePool")
"""Operations between the layers of a convolutional network."""
ATTENTION = ("Softmax", "LayerNormalization")
"""Operations by which a transformer is recognised."""
SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True)
class Layer:
    """An operation with weights.

    Attributes:
        name: of the module in the network, e.g. `layer1.0.conv1`.
        node: name of the operation in the graph.
        weights: number of its weights.
        tensor: name of its input.
    """

    name: str
    node: str
    weights: int
    tensor: str


@dataclass(frozen=True)
class Graph:
    """A graph that is ready to be quantised.

    Attributes:
        path: of the prepared model.
        layers: those that can be quantised, in the graph's order.
        operations: types of the operations that are quantised.
        products: nodes that multiply two activations, as in attention; they stay in fp32.
        metadata: what the exporter wrote about the model, by key.
    """

    path: Path
    layers: tuple[Layer, ...]
    operations: tuple[str, ...]
    products: tuple[str, ...]
    metadata: dict[str, str]


@contextmanager
def quiet() -> Generator[None]:
    """Keeps what ONNX Runtime's tools print and log for programmers from the terminal."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with redirect_stdout(StringIO()):
            yield
    finally:
        root.setLevel(level)


def prepare(source: Path, folder: Path) -> Graph:
    """Prepares a graph: folds constants and BatchNorm, and infers shapes.

    Args:
        folder: for the prepared model.

    Raises:
        InputError: the graph has no layer that can be quantised, or is quantised already.
    """
    onnx = require("onnx")
    shape_inference = require("onnxruntime.quantization.shape_inference")
    given = onnx.load(str(source))
    kinds = {node.op_type for node in given.graph.node}
    if kinds & {"QuantizeLinear", "DequantizeLinear"}:
        raise InputError(f"{source} is quantised already; give the fp32 model")
    path = folder / "prepared.onnx"
    with quiet():
        # ONNX Runtime would take HardSwish apart, which is then slower; so it only works where BatchNorm is left.
        shape_inference.quant_pre_process(
            str(source), str(path), skip_symbolic_shape=True, skip_optimization="BatchNormalization" not in kinds
        )
    model = onnx.load(str(path))
    # Names of modules are read from the exporter's graph: the tools above drop them, but keep the nodes' names.
    modules = {node.name: _module(node) for node in given.graph.node}
    layers = _layers(model, modules)
    if not layers:
        raise InputError(f"{source} has no layer to quantise: it has no {', '.join(LAYERS)} with constant weights")
    # The residual stream of a transformer has few values that are very large, which 8 bits cannot hold beside others.
    operations = LAYERS if kinds & {*ATTENTION} else (*LAYERS, *BETWEEN)
    with_weights = {layer.node for layer in layers}
    products = tuple(node.name for node in model.graph.node if node.op_type in LAYERS and node.name not in with_weights)
    return Graph(path, layers, operations, products, {each.key: each.value for each in given.metadata_props})


def _layers(model: Any, modules: dict[str, str]) -> tuple[Layer, ...]:
    sizes = {each.name: prod(each.dims) for each in model.graph.initializer}
    found: dict[str, Layer] = {}
    for node in model.graph.node:
        # The product of two activations, as in attention, has no weights.
        if node.op_type in LAYERS and node.input[1] in sizes:
            weight = node.input[1]
            name = weight.removesuffix(".weight") if weight.endswith(".weight") else modules.get(node.name, "")
            name = name.removeprefix("net.")
            # Two operations of a module, or of tied weights: the second is named by its node.
            name = node.name if not name or name in found else name
            found[name] = Layer(name, node.name, sizes[weight], node.input[0])
    return tuple(found.values())


def _module(node: Any) -> str:
    """Returns the name of the module that a node comes from, by what torch's exporter recorded; empty if it did not."""
    for each in node.metadata_props:
        if each.key == SCOPES:
            # From the network to the module, and last the operation.
            scopes = ast.literal_eval(each.value)
            return scopes[-2] if len(scopes) > 1 else ""
    return ""
