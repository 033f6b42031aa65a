"""Reads single nodes of a TensorFlow graph: their inputs, attributes and constants."""

import math
from dataclasses import dataclass

import numpy as np

from funmatch.data.formats import protobuf
from funmatch.data.formats.protobuf import Damaged, Fields
from funmatch.models.tensorflow.bundle import BFLOAT16, DTYPES

MAX_VALUES = 4096  # of a constant that is read
VALUE_FIELDS = {1: (5, 4), 2: (6, 8), 3: (7, 0), 4: (7, 0), 5: (7, 0), 6: (7, 0), 9: (10, 0), 10: (11, 0)}
"""Fields of constants that list their values: by kind the field's number, and bytes per value, 0 for varints."""


class Unclear(ValueError):
    """Raised where a graph does not show what we need, although it may be intact."""


class Missing(Unclear):
    """Raised where there is no graph, or none that can be called."""


@dataclass(frozen=True)
class Node:
    """An operation.

    Attributes:
        op: type of operation.
        inputs: names of the outputs that it takes.
        fields: the `NodeDef`.
    """

    op: str
    inputs: list[str]
    fields: Fields


def attribute(node: Node, name: str) -> Fields:
    """Returns an `AttrValue` of a node, empty where it has none."""
    # A map is a list of pairs of key (1) and value (2), in any order.
    for pair in protobuf.messages(node.fields, 5):
        fields = protobuf.parse(pair)
        if protobuf.text(fields, 1) == name:
            return inner(fields, 2)
    return {}


def numbers(fields: Fields) -> list[int]:
    """Returns the integers of an `AttrValue` that is a list."""
    # Field 1 of an AttrValue is a list; of the lists in that, 3 holds the integers.
    return _varints(inner(fields, 1).get(3, []))


def tensor(node: Node) -> Fields:
    """Returns the `TensorProto` of a constant."""
    if node.op != "Const":
        raise Unclear(f"its graph computes with {node.op} what is a constant in others")
    # Field 8 of an AttrValue is a TensorProto: 1 kind, 2 shape, 4 all values as bytes, or 5 to 11 values one by one.
    return inner(attribute(node, "value"), 8)


def constant(node: Node) -> np.ndarray:
    """Reads a small constant.

    Raises:
        Damaged: its values do not match its shape.
        Unclear: it is large, or not of numbers.
    """
    fields = tensor(node)
    kind = protobuf.number(fields, 1)
    axes = [protobuf.number(protobuf.parse(axis), 1) for axis in protobuf.messages(inner(fields, 2), 2)]
    size = math.prod(axes)
    # Before anything is allocated: the shape comes from the file, and may ask for any amount of memory.
    if kind not in DTYPES or kind == BFLOAT16 or size > MAX_VALUES or len(axes) > 8:
        raise Unclear(f"its graph has a constant of kind {kind} and shape {tuple(axes)}")
    # Bytes before lists: TensorFlow, too, looks at the lists only where there are no bytes.
    if content := b"".join(protobuf.messages(fields, 4)):
        if len(content) != size * DTYPES[kind].itemsize:
            raise Damaged("a constant's values do not match its shape")
        return np.frombuffer(content, DTYPES[kind]).reshape(axes)
    values = _listed_values(fields, kind)[:size]
    if not len(values):
        # TensorFlow writes no value at all where all are zero.
        values = np.zeros(1, DTYPES[kind])
    # TensorFlow leaves out repetitions at the end: the last value stands for all that follow.
    return np.concatenate([values, np.repeat(values[-1:], size - len(values))])[:size].reshape(axes)


def _listed_values(fields: Fields, kind: int) -> np.ndarray:
    """Reads the values of a constant that lists them one by one."""
    if kind not in VALUE_FIELDS:
        raise Unclear(f"its graph has a constant of kind {kind} that lists its values")
    number, width = VALUE_FIELDS[kind]
    parts = fields.get(number, [])
    if width:
        # Writers may pack values of a fixed width into one string, or repeat the field; readers must take both.
        raw = b"".join(part if isinstance(part, bytes) else part.to_bytes(width, "little") for part in parts)
        if len(raw) % width:
            raise Damaged("a constant's values are cut off")
        return np.frombuffer(raw, DTYPES[kind])
    return np.array(_varints(parts), np.int64).astype(DTYPES[kind])


def _varints(parts: list[int | bytes]) -> list[int]:
    """Reads signed numbers, packed into strings or one by one."""
    values: list[int] = []
    for part in parts:
        at = 0
        while isinstance(part, bytes) and at < len(part):
            value, at = protobuf.varint(part, at, len(part))
            values.append(value)
        values += [] if isinstance(part, bytes) else [part]
    # Two's complement of 64 bits to a signed number.
    return [((value & (1 << 64) - 1) ^ 1 << 63) - (1 << 63) for value in values]


def inner(fields: Fields, number: int) -> Fields:
    """Returns the message of a field, empty where it is left out."""
    # Parts of a message that is written in several pieces are simply joined, as the format says.
    return protobuf.parse(b"".join(protobuf.messages(fields, number)))
