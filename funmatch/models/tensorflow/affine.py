"""What a graph does to images, where that is a scale and an offset for each channel.

What it computes from constants and small variables on the way are constants. Anything else that it does is named.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from funmatch.data.formats.protobuf import Damaged, number
from funmatch.errors import InputError
from funmatch.models.tensorflow.bundle import BFLOAT16, DTYPES, Bundle, read
from funmatch.models.tensorflow.graph import Graph, Output
from funmatch.models.tensorflow.nodes import MOST_VALUES, Node, Unclear, attribute, constant

LONGEST = 150  # operations in a row
RESIZES = {"ResizeBilinear", "ResizeBicubic", "ResizeNearestNeighbor", "ResizeArea", "ScaleAndTranslate"}
SHOWN = {"Placeholder", "PlaceholderWithDefault"}

FLOATS = {kind for kind, dtype in DTYPES.items() if dtype.kind == "f"} | {BFLOAT16}
WHOLE = {kind for kind, dtype in DTYPES.items() if dtype.kind in "iu"} - FLOATS

ARITHMETIC: dict[str, Callable[..., Any]] = {
    "Add": np.add,
    "AddV2": np.add,
    "BiasAdd": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "RealDiv": np.divide,
}
OF_CONSTANTS: dict[str, Callable[..., Any]] = ARITHMETIC | {
    "Maximum": np.maximum,
    "Minimum": np.minimum,
    "Pow": np.power,
    "Neg": np.negative,
    "Sqrt": np.sqrt,
    "Rsqrt": lambda x: 1 / np.sqrt(x),
    "Square": np.square,
    "Reciprocal": lambda x: 1 / x,
    "Inv": lambda x: 1 / x,
    "Reshape": lambda x, shape: np.reshape(x, np.asarray(shape, int)),
    "ExpandDims": lambda x, axis: np.expand_dims(x, int(axis)),
    "Cast": lambda x: x,
    "Squeeze": np.squeeze,
}


@dataclass(frozen=True)
class AffineImage:
    """Images after what was done to them: scale · image + offset, by channel.

    Attributes:
        border: pixels of zeros above, below, left and right.
        are_whole: whether they are whole numbers, 0 to 255.
    """

    scale: np.ndarray
    offset: np.ndarray
    border: tuple[int, int, int, int] = (0, 0, 0, 0)
    are_whole: bool = False


class GraphWalk:
    """The values in a graph, as far as they are needed: constants, and what is done to images."""

    def __init__(self, graph: Graph, bundle: Bundle) -> None:
        self.graph, self.bundle = graph, bundle
        self.known: dict[Output, AffineImage | np.ndarray] = {}
        self.shown: set[Output] = set()

    def of(self, output: Output, depth: int = 0) -> AffineImage | np.ndarray:
        """The value of an output.

        Raises:
            Unclear: it is none that can be told.
        """
        if output not in self.known:
            if depth > LONGEST:
                raise Unclear(f"its graph does more than {LONGEST} things to images before the first kernel")
            try:
                with np.errstate(all="ignore"):
                    self.known[output] = self._computed(output, self.graph.node(output), depth + 1)
            except (Unclear, Damaged, InputError):
                raise
            except (ValueError, TypeError, IndexError, OverflowError):
                raise _strange(output, self.graph.node(output)) from None
        return self.known[output]

    def _computed(self, output: Output, node: Node, depth: int) -> AffineImage | np.ndarray:
        if node.op in SHOWN:
            return self._shown(output, node)
        if node.op == "Const":
            return constant(node).astype(float)
        if node.op == "VarHandleOp":
            return self._variable(output)
        into = self.graph.inputs(output)
        if node.op in RESIZES and into:
            return _unpadded(self.of(into[0], depth), output, node)
        if output.number or node.op not in {*OF_CONSTANTS, "Pad", "PadV2"}:
            raise _strange(output, node)
        values = [self.of(each, depth) for each in into]
        if any(isinstance(value, AffineImage) for value in values):
            return _of_images(output, node, values)
        arrays = [value for value in values if isinstance(value, np.ndarray)]
        if node.op in ARITHMETIC and np.prod(np.broadcast_shapes(*(array.shape for array in arrays))) > MOST_VALUES:
            raise _strange(output, node)
        return np.asarray(OF_CONSTANTS[node.op](*arrays), float)

    def _shown(self, output: Output, node: Node) -> AffineImage:
        self.shown.add(output)
        if len(self.shown) > 1:
            raise Unclear("its graph is given more than images")
        kind = number(attribute(node, "dtype"), 6)
        return AffineImage(np.ones(3), np.zeros(3), are_whole=kind in WHOLE)

    def _variable(self, output: Output) -> np.ndarray:
        key = min(self.graph.keys.get(output.node, ()), default="")
        if key not in self.bundle.entries or np.prod(self.bundle.entries[key].shape, dtype=float) > MOST_VALUES:
            raise Unclear(f"its graph uses the variable {output.node} before the first kernel")
        return read(self.bundle, key).astype(float)


def _strange(output: Output, node: Node) -> Unclear:
    return Unclear(f"its graph applies {node.op} ({output.node}) to images before the first kernel")


def _unpadded(value: AffineImage | np.ndarray, output: Output, node: Node) -> AffineImage:
    """Images that may be resized, or have something added: those without a border."""
    if not isinstance(value, AffineImage) or any(value.border):
        raise _strange(output, node)
    return value


def _of_images(output: Output, node: Node, values: list[AffineImage | np.ndarray]) -> AffineImage:
    """What an operation makes of images."""
    if node.op in ("Pad", "PadV2"):
        return _padded(output, node, values)
    if node.op == "Cast" and isinstance(values[0], AffineImage) and number(attribute(node, "DstT"), 6) in FLOATS:
        return values[0]
    if node.op == "Neg" and isinstance(values[0], AffineImage):
        return replace(values[0], scale=-values[0].scale, offset=-values[0].offset)
    if node.op not in ARITHMETIC or len(values) != 2:
        raise _strange(output, node)
    left, right = values
    does = ARITHMETIC[node.op]
    if isinstance(left, AffineImage) and isinstance(right, np.ndarray):
        by = _by_channel(right, output, node)
        if node.op in ("Mul", "RealDiv"):
            return replace(left, scale=does(left.scale, by), offset=does(left.offset, by))
        left = _unpadded(left, output, node)
        return replace(left, offset=does(left.offset, by))
    if isinstance(right, AffineImage) and isinstance(left, np.ndarray) and node.op != "RealDiv":
        by = _by_channel(left, output, node)
        if node.op == "Mul":
            return replace(right, scale=by * right.scale, offset=by * right.offset)
        right = _unpadded(right, output, node)
        return replace(right, scale=does(0, right.scale), offset=does(by, right.offset))
    raise _strange(output, node)


def _by_channel(value: np.ndarray, output: Output, node: Node) -> np.ndarray:
    """A constant as three numbers."""
    if value.size not in (1, 3) or value.shape[-1:] not in ((), (value.size,)):
        raise _strange(output, node)
    return np.broadcast_to(value.reshape(-1), 3)


def _padded(output: Output, node: Node, values: list[AffineImage | np.ndarray]) -> AffineImage:
    """Images with more zeros around them."""
    image, widths, *filled = values
    if not isinstance(image, AffineImage) or not isinstance(widths, np.ndarray) or widths.shape != (4, 2):
        raise _strange(output, node)
    if any(isinstance(value, AffineImage) or value.any() for value in filled) or widths[[0, 3]].any():
        raise _strange(output, node)
    top, bottom, left, right = (int(a + b) for a, b in zip(image.border, widths[1:3].flat, strict=True))
    return replace(image, border=(top, bottom, left, right))
