"""The operations of a TensorFlow graph one by one: what a node is given, and the constants that it holds."""

import math
from dataclasses import dataclass

import numpy as np

from funmatch.data.formats import protobuf
from funmatch.data.formats.protobuf import Damaged, Fields
from funmatch.models.tensorflow.bundle import BFLOAT16, DTYPES

MOST_VALUES = 4096  # of a constant that is read
LISTED = {1: (5, 4), 2: (6, 8), 3: (7, 0), 4: (7, 0), 5: (7, 0), 6: (7, 0), 9: (10, 0), 10: (11, 0)}
"""Where a constant's values stand that are not written as one string: by kind the field, and bytes, 0 for varints."""


class Unclear(ValueError):
    """Something cannot be told from a graph, though it may be whole."""


class Missing(Unclear):
    """There is no graph, or none that can be called."""


@dataclass(frozen=True)
class Node:
    """An operation.

    Attributes:
        op: what it does.
        inputs: outputs that it is given, by name.
        fields: the whole message.
    """

    op: str
    inputs: list[str]
    fields: Fields


def attribute(node: Node, name: str) -> Fields:
    """An `AttrValue` of a node, empty where it has none."""
    for pair in protobuf.messages(node.fields, 5):
        found = protobuf.parse(pair)
        if protobuf.text(found, 1) == name:
            return inner(found, 2)
    return {}


def numbers(found: Fields) -> list[int]:
    """The whole numbers of an `AttrValue` that is a list."""
    return _varints(inner(found, 1).get(3, []))


def tensor(node: Node) -> Fields:
    """The `TensorProto` of a constant."""
    if node.op != "Const":
        raise Unclear(f"its graph computes by {node.op} what is a constant elsewhere")
    return inner(attribute(node, "value"), 8)


def constant(node: Node) -> np.ndarray:
    """A constant of few numbers.

    Raises:
        Damaged: its values are not those of its shape.
        Unclear: it has many, or no numbers.
    """
    found = tensor(node)
    kind = protobuf.number(found, 1)
    axes = [protobuf.number(protobuf.parse(axis), 1) for axis in protobuf.messages(inner(found, 2), 2)]
    size = math.prod(axes)
    if kind not in DTYPES or kind == BFLOAT16 or size > MOST_VALUES or len(axes) > 8:
        raise Unclear(f"its graph has a constant of kind {kind} and shape {tuple(axes)}")
    if content := b"".join(protobuf.messages(found, 4)):
        if len(content) != size * DTYPES[kind].itemsize:
            raise Damaged("a constant's values are not those of its shape")
        return np.frombuffer(content, DTYPES[kind]).reshape(axes)
    values = _listed(found, kind)[:size]
    if not len(values):
        values = np.zeros(1, DTYPES[kind])
    # The last value stands for all that follow.
    return np.concatenate([values, np.repeat(values[-1:], size - len(values))])[:size].reshape(axes)


def _listed(found: Fields, kind: int) -> np.ndarray:
    """The values of a constant that are written one by one."""
    if kind not in LISTED:
        raise Unclear(f"its graph has a constant of kind {kind}, a value at a time")
    number, width = LISTED[kind]
    parts = found.get(number, [])
    if width:
        raw = b"".join(part if isinstance(part, bytes) else part.to_bytes(width, "little") for part in parts)
        if len(raw) % width:
            raise Damaged("a constant's values are cut off")
        return np.frombuffer(raw, DTYPES[kind])
    return np.array(_varints(parts), np.int64).astype(DTYPES[kind])


def _varints(parts: list[int | bytes]) -> list[int]:
    """Numbers with a sign, packed into strings or one by one."""
    values: list[int] = []
    for part in parts:
        at = 0
        while isinstance(part, bytes) and at < len(part):
            value, at = protobuf.varint(part, at, len(part))
            values.append(value)
        values += [] if isinstance(part, bytes) else [part]
    return [((value & (1 << 64) - 1) ^ 1 << 63) - (1 << 63) for value in values]  # of two's complement


def inner(found: Fields, number: int) -> Fields:
    """The message of a field, empty where it is left out."""
    return protobuf.parse(b"".join(protobuf.messages(found, number)))
