"""Reads which layers a Keras model has, and in which order, from the description in its file; none is built."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from funmatch.models.tensorflow.nodes import Unclear
from funmatch.models.tensorflow.preprocessing import LOW

CONTAINERS = {"Functional", "Model", "Sequential"}
MOST = 4096  # layers of a model
MAX_DEPTH = 20  # of models in models


@dataclass(frozen=True)
class Layer:
    """A layer of a model.

    Attributes:
        kind: its class.
        name: empty where the file has none.
        config: arguments of its class.
        values: constants that it is called with.
    """

    kind: str
    name: str
    config: Mapping[str, Any]
    values: tuple[Any, ...] = field(default=(), compare=False)

    def holds(self, path: str) -> bool:
        """Returns whether a variable belongs to the layer, by its path in the file."""
        # Files of weights have groups by the layer's name, or by its class and a number.
        snake = re.sub(r"([a-z])([A-Z])", r"\1_\2", re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", self.kind)).lower()
        parts = path.split("/")
        return self.name in parts or any(re.sub(r"_\d+$", "", part) == snake for part in parts)


def is_container(row: Mapping[str, Any]) -> bool:
    """Returns whether a description is of a model of layers, in place of a layer."""
    return isinstance(row.get("class_name"), str) and row["class_name"] in CONTAINERS


def chain(config: Mapping[str, Any], depth: int) -> Iterator[Layer]:
    """Yields the layers from the input on, up to the first that has several inputs or several users."""
    inner = config.get("config")
    if not is_container(config) or not isinstance(inner, dict) or depth > MAX_DEPTH:
        return
    rows = _rows(inner.get("layers"))
    if config["class_name"] != "Sequential":
        rows = _in_order(rows)
    for row in rows:
        if is_container(row):
            yield from chain(row, depth + 1)
        else:
            yield _layer(row)


def layer_names(config: Mapping[str, Any]) -> list[str]:
    """Returns the names of all layers of a model, by which a network can be recognised."""
    return [layer.name for layer in all_layers(config, 0)]


def pool_padding(config: Mapping[str, Any] | None) -> str:
    """Returns the padding of a BiT network's max-pool, one of `bit.STEM_TYPES`: zeros but where a layer has -inf."""
    pads = [layer for layer in all_layers(config or {}, 0) if layer.kind == "Pad"]
    # The operation of Keras 3; the layer `ZeroPadding2D` has no value.
    values = [*(value for layer in pads for value in layer.values)]
    values += [plain_numbers(layer.config.get("constant_values")) for layer in pads]
    return "-inf" if any(value is not None and value.min() < LOW for value in values) else "zeros"


def all_layers(config: Mapping[str, Any], depth: int) -> Iterator[Layer]:
    """Yields all layers in the order of the file, in which each comes after those that it uses."""
    inner = config.get("config")
    if not is_container(config) or not isinstance(inner, dict) or depth > MAX_DEPTH:
        return
    for row in _rows(inner.get("layers")):
        yield from all_layers(row, depth + 1) if is_container(row) else [_layer(row)]


def _rows(layers: Any) -> list[dict[str, Any]]:
    """Returns the layers of a model that have arguments, as all have that Keras writes."""
    rows = layers if isinstance(layers, list) else []
    return [row for row in rows[:MOST] if isinstance(row, dict) and isinstance(row.get("config"), dict)]


def _layer(row: Mapping[str, Any]) -> Layer:
    settings, kind = row["config"], str(row.get("class_name"))
    if kind in ("TFOpLambda", "SlicingOpLambda"):
        kind = str(settings.get("function")).split(".")[-1]
    name = row.get("name") or settings.get("name") or ""
    return Layer(kind, str(name), settings, _constants(row.get("inbound_nodes")))


def _in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the layers of a model of Keras's functional kind that follow each other, from its only input on."""
    users: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        for name in _inputs(row.get("inbound_nodes")):
            users.setdefault(name, []).append(row)
    starts = [row for row in rows if row.get("class_name") == "InputLayer"]
    if len(starts) != 1:
        raise Unclear(f"it has {len(starts)} inputs")
    order, row = [], starts[0]
    while row not in order and len(order) < MOST:
        order.append(row)
        after = users.get(str(row.get("name")), [])
        if len(after) != 1 or len(set(_inputs(after[0].get("inbound_nodes")))) != 1:
            break
        row = after[0]
    return order


def _inputs(nodes: Any) -> list[str]:
    """Returns the names of the layers whose outputs a layer takes, of either Keras's notation."""
    found, waiting = [], [nodes]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            history = value.get("keras_history")
            if isinstance(history, list) and history:
                found.append(str(history[0]))
            else:
                waiting += value.values()
        elif isinstance(value, list):
            # Keras 2: [name, node, tensor, {arguments}].
            if len(value) >= 3 and isinstance(value[0], str) and type(value[1]) is int and type(value[2]) is int:
                found.append(value[0])
            else:
                waiting += value
    return found


def _constants(nodes: Any) -> tuple[Any, ...]:
    """Returns what an operation is called with in order, None for the image; empty if it is not called once so."""
    node = nodes[0] if isinstance(nodes, list) and len(nodes) == 1 else None
    if isinstance(node, dict):
        arguments = node.get("args")
        named = node.get("kwargs")
        values = [
            *(arguments if isinstance(arguments, list) else []),
            *(named.values() if isinstance(named, dict) else []),
        ]
        return tuple(None if _inputs(value) else plain_numbers(value) for value in values)
    # Keras 2: the image first, and a constant by its name.
    if isinstance(node, list) and len(node) == 1 and isinstance(node[0], list):
        node = node[0]
    if isinstance(node, list) and len(node) == 4 and isinstance(node[3], dict) and node[0] != "_CONSTANT_VALUE":
        return (None, plain_numbers(node[3].get("y")))
    return ()


def plain_numbers(value: Any) -> Any:
    """Returns the numbers of a constant; None if it is not of numbers."""
    if isinstance(value, dict) and value.get("class_name") in ("__numpy__", "__tensor__"):
        inner = value.get("config")
        value = inner.get("value") if isinstance(inner, dict) else None
    if value is None:
        return None
    try:
        array = np.asarray(value, float)
    except (ValueError, TypeError, OverflowError):
        return None
    return array if array.size in (1, 3) and array.shape[-1:] in ((), (array.size,)) else None
