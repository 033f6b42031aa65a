"""Traces what a graph does to images, as far as that is a scale and an offset for each channel.

Values that the graph computes from constants and small variables are folded. Any other operation is reported by name.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from funmatch.data.formats.protobuf import Damaged, messages, number, parse
from funmatch.errors import InputError
from funmatch.models.tensorflow.bundle import BFLOAT16, DTYPES, Bundle, read
from funmatch.models.tensorflow.graph import Graph, Output
from funmatch.models.tensorflow.nodes import MAX_VALUES, Node, Unclear, attribute, constant, inner

MAX_DEPTH = 150  # operations in a row; below Python's own limit of recursion
RESIZES = {"ResizeBilinear", "ResizeBicubic", "ResizeNearestNeighbor", "ResizeArea", "ScaleAndTranslate"}
MAX_SIDE = 1 << 14  # pixels
PLACEHOLDERS = {"Placeholder", "PlaceholderWithDefault"}

FLOATS = {kind for kind, dtype in DTYPES.items() if dtype.kind == "f"} | {BFLOAT16}
INTEGERS = {kind for kind, dtype in DTYPES.items() if dtype.kind in "iu"} - FLOATS

ARITHMETIC: dict[str, Callable[..., Any]] = {
    "Add": np.add,
    "AddV2": np.add,
    "BiasAdd": np.add,  # NHWC: along the last axis, as numpy broadcasts; NCHW is refused at the convolution
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
    """Images after some operations: scale · image + offset.

    Attributes:
        scale, offset: by channel, (3,).
        border: pixels of zeros above, below, left and right.
        is_integer: whether the graph's input is of integers, 0 … 255.
    """

    scale: np.ndarray
    offset: np.ndarray
    border: tuple[int, int, int, int] = (0, 0, 0, 0)
    is_integer: bool = False


class GraphEvaluator:
    """Computes values in a graph on demand: constants, and affine functions of its images.

    Attributes:
        graph, bundle: the graph and the values of its variables.
        values: those computed so far.
        inputs: placeholders that were met.
        size: height and width, in pixels, of the last resizing before the network, or of the images that alone the
            graph takes; None where it takes any.
    """

    def __init__(self, graph: Graph, bundle: Bundle) -> None:
        self.graph, self.bundle = graph, bundle
        self.values: dict[Output, AffineImage | np.ndarray] = {}
        self.inputs: set[Output] = set()
        self.size: tuple[int, int] | None = None

    def evaluate(self, output: Output, depth: int = 0) -> AffineImage | np.ndarray:
        """Returns the value of an output.

        Raises:
            Unclear: it is neither constant nor affine in the images.
        """
        # Stored, since branches that part and meet again would double the work each time.
        if output not in self.values:
            if depth > MAX_DEPTH:
                raise Unclear(f"its graph applies more than {MAX_DEPTH} operations to images before the first kernel")
            try:
                # A division by zero gives infinities, which `preprocessing` refuses with the numbers in its message.
                with np.errstate(all="ignore"):
                    self.values[output] = self._compute(output, self.graph.node(output), depth + 1)
            # These are ValueErrors too, but know better what is wrong than the message below.
            except (Unclear, Damaged, InputError):
                raise
            # The graph is a foreign file: numpy fails on shapes and values that no one thought of.
            except (ValueError, TypeError, IndexError, OverflowError):
                raise _unsupported(output, self.graph.node(output)) from None
        return self.values[output]

    def _compute(self, output: Output, node: Node, depth: int) -> AffineImage | np.ndarray:
        if node.op in PLACEHOLDERS:
            return self._input(output, node)
        if node.op == "Const":
            # float64, so that folding adds no rounding to that of the graph's own float32.
            return constant(node).astype(float)
        if node.op == "VarHandleOp":
            return self._variable(output)
        into = self.graph.inputs(output)
        if node.op in RESIZES and into:
            # Resizing does not change the range of values, unless zeros of a border are mixed in.
            # Only the first input is followed: the size is often computed from the images' shape, which is not affine.
            # First, since operations are followed from the network back to the images: the last resizing counts.
            self.size = self.size or self._size(into[1:2])
            return _unpadded(self.evaluate(into[0], depth), output, node)
        # All of these have a single output, number 0; another number means a different operation of the same name.
        if output.number or node.op not in {*OF_CONSTANTS, "Pad", "PadV2"}:
            raise _unsupported(output, node)
        values = [self.evaluate(each, depth) for each in into]
        if any(isinstance(value, AffineImage) for value in values):
            return _apply(output, node, values)
        arrays = [value for value in values if isinstance(value, np.ndarray)]
        # Small constants of shapes (n, 1) and (1, n) can broadcast to gigabytes.
        if node.op in ARITHMETIC and np.prod(np.broadcast_shapes(*(array.shape for array in arrays))) > MAX_VALUES:
            raise _unsupported(output, node)
        return np.asarray(OF_CONSTANTS[node.op](*arrays), float)

    def _input(self, output: Output, node: Node) -> AffineImage:
        self.inputs.add(output)
        if len(self.inputs) > 1:
            raise Unclear("its graph has other inputs than images")
        kind = number(attribute(node, "dtype"), 6)
        # Field 7 of an AttrValue is a shape; open axes are -1.
        axes = [number(parse(axis), 1) for axis in messages(inner(attribute(node, "shape"), 7), 2)]
        if len(axes) == 4 and all(0 < n < MAX_SIDE for n in axes[1:3]):
            self.size = self.size or (axes[1], axes[2])
        return AffineImage(np.ones(3), np.zeros(3), is_integer=kind in INTEGERS)

    def _size(self, outputs: list[Output]) -> tuple[int, int] | None:
        """Returns the height and the width that a resizing asks for, if these are constants."""
        for output in outputs:
            try:
                sizes = constant(self.graph.node(output)).reshape(-1).tolist()
            except (Unclear, Damaged, ValueError):
                return None
            if len(sizes) == 2 and all(0 < n < MAX_SIDE and n == int(n) for n in sizes):
                return int(sizes[0]), int(sizes[1])
        return None

    def _variable(self, output: Output) -> np.ndarray:
        # Several keys are copies of one variable, so any will do; `min`, so that it is always the same one.
        key = min(self.graph.keys.get(output.node, ()), default="")
        # As a float: the axes of a tensor of an unknown kind are unchecked, and their product can overflow.
        if key not in self.bundle.entries or np.prod(self.bundle.entries[key].shape, dtype=float) > MAX_VALUES:
            raise Unclear(f"its graph uses the variable {output.node} before the first kernel")
        return read(self.bundle, key).astype(float)


def _unsupported(output: Output, node: Node) -> Unclear:
    return Unclear(f"its graph applies {node.op} ({output.node}) to images before the first kernel")


def _unpadded(value: AffineImage | np.ndarray, output: Output, node: Node) -> AffineImage:
    """Returns images that have no border yet; otherwise its zeros would be changed, too."""
    if not isinstance(value, AffineImage) or any(value.border):
        raise _unsupported(output, node)
    return value


def _apply(output: Output, node: Node, values: list[AffineImage | np.ndarray]) -> AffineImage:
    """Applies an operation to images."""
    if node.op in ("Pad", "PadV2"):
        return _pad(output, node, values)
    # To floats only: a cast to integers rounds the images, which is not affine.
    if node.op == "Cast" and isinstance(values[0], AffineImage) and number(attribute(node, "DstT"), 6) in FLOATS:
        return values[0]
    # Allowed after padding: the zeros of a border stay zeros.
    if node.op == "Neg" and isinstance(values[0], AffineImage):
        return replace(values[0], scale=-values[0].scale, offset=-values[0].offset)
    if node.op not in ARITHMETIC or len(values) != 2:
        raise _unsupported(output, node)
    left, right = values
    operation = ARITHMETIC[node.op]
    if isinstance(left, AffineImage) and isinstance(right, np.ndarray):
        operand = _by_channel(right, output, node)
        # A factor leaves the zeros of a border zero, so it is allowed after padding; a summand is not.
        if node.op in ("Mul", "RealDiv"):
            return replace(left, scale=operation(left.scale, operand), offset=operation(left.offset, operand))
        left = _unpadded(left, output, node)
        return replace(left, offset=operation(left.offset, operand))
    # A constant divided by images is not affine in them.
    if isinstance(right, AffineImage) and isinstance(left, np.ndarray) and node.op != "RealDiv":
        operand = _by_channel(left, output, node)
        if node.op == "Mul":
            return replace(right, scale=operand * right.scale, offset=operand * right.offset)
        right = _unpadded(right, output, node)
        # For c − image, the operation with 0 gives the sign of the scale.
        return replace(right, scale=operation(0, right.scale), offset=operation(operand, right.offset))
    raise _unsupported(output, node)


def _by_channel(value: np.ndarray, output: Output, node: Node) -> np.ndarray:
    """Returns a constant as three numbers."""
    # The last axis is the channels'. Three numbers of shape (3, 1) would be added by column, not by channel.
    if value.size not in (1, 3) or value.shape[-1:] not in ((), (value.size,)):
        raise _unsupported(output, node)
    return np.broadcast_to(value.reshape(-1), 3)


def _pad(output: Output, node: Node, values: list[AffineImage | np.ndarray]) -> AffineImage:
    """Adds to the border of images."""
    image, widths, *filling = values
    if not isinstance(image, AffineImage) or not isinstance(widths, np.ndarray) or widths.shape != (4, 2):
        raise _unsupported(output, node)
    # Zeros around height and width only, as at BiT's first convolution; axes 0 and 3 are the batch and the channels.
    if any(isinstance(value, AffineImage) or value.any() for value in filling) or widths[[0, 3]].any():
        raise _unsupported(output, node)
    top, bottom, left, right = (int(a + b) for a, b in zip(image.border, widths[1:3].flat, strict=True))
    return replace(image, border=(top, bottom, left, right))
