"""Finds the preprocessing in a SavedModel's graph: what it does to images before the first kernel, and after the head.

The graph is followed from the first convolution back to the images. `scale · image + offset` for each channel
corresponds to a mean and a standard deviation; other operations do not.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from funmatch.data.formats.protobuf import Damaged, text
from funmatch.errors import InputError
from funmatch.models.tensorflow.affine import AffineImage, GraphEvaluator
from funmatch.models.tensorflow.bundle import Bundle
from funmatch.models.tensorflow.graph import Graph, Output, open_graph
from funmatch.models.tensorflow.nodes import Missing, Node, Unclear, attribute, constant, numbers

Inputs = tuple[tuple[float, ...], tuple[float, ...]]
AS_GIVEN: Inputs = (0.0,) * 3, (1.0,) * 3
"""Mean and standard deviation for images in [0, 1], by channel; and those that leave such images as they are."""

LOW = -1e30
"""A padding below it is below all activations, as -inf is."""
BORDER = 3  # pixels of zeros around the images at BiT's first convolution
PRODUCTS = {"MatMul", "Conv2D", "BatchMatMulV2", "Einsum"}
SUMS = {"Add", "AddV2", "BiasAdd"}
RESHAPES = {"Reshape", "Squeeze", "ExpandDims", "Cast"}
MAX_STEPS_TO_HEAD = 20  # operations between the output and the head, and between the head and the last activations


class UnexpectedOperation(ValueError):
    """Raised for an operation where BiT has none."""


@dataclass(frozen=True)
class Preprocessing:
    """Result of following a graph.

    Attributes:
        inputs: mean and standard deviation for images in [0, 1]; None where they are unknown.
        is_plain: whether the graph passes images on unchanged, so that the network may be for images of any range.
        why: reason why inputs are unknown.
        stem: keys of the first kernel; empty where it was not found.
        used: keys of all variables that the output is computed from; None where that is unknown.
        before: keys of those that are used before the first kernel.
        is_missing: whether there is no graph at all.
        size: height and width of the images that the graph makes of its input, or of those that alone it takes, pixels;
            None where it takes any, and leaves them as they are.
        is_folded: whether the first convolution takes a variable as its kernel, and not one that is standardised first.
        graph: the graph itself.
    """

    inputs: Inputs | None = None
    is_plain: bool = False
    why: str = ""
    stem: frozenset[str] = frozenset()
    used: frozenset[str] | None = None
    before: frozenset[str] = frozenset()
    is_missing: bool = False
    size: tuple[int, int] | None = None
    is_folded: bool = False
    graph: Graph | None = field(default=None, repr=False)


def input_preprocessing(folder: Path, bundle: Bundle) -> Preprocessing:
    """Finds the preprocessing in the graph of a SavedModel.

    Raises:
        InputError: `saved_model.pb` is damaged.
    """
    path = folder / "saved_model.pb"
    try:
        graph = open_graph(path)
        preprocessing = Preprocessing(graph=graph, used=_keys(graph, graph.outputs))
        return _trace_input(preprocessing, graph, bundle)
    except Damaged as error:
        raise InputError(f"{path} is damaged: {error}; copy it again") from None
    except Unclear as error:
        # Not an error: the weights are identified without this graph, and a user can say what its images were.
        return Preprocessing(why=str(error), is_missing=isinstance(error, Missing))


def _trace_input(preprocessing: Preprocessing, graph: Graph, bundle: Bundle) -> Preprocessing:
    """Adds what the graph does to images before the only convolution with a kernel of the shape of BiT's first."""
    first = [
        (output, stem)
        for output in graph.before(graph.outputs)
        if graph.node(output).op == "Conv2D"
        for stem in graph.variables(graph.inputs(output)[1:])
        if all(key in bundle.entries and bundle.entries[key].shape[:3] == (7, 7, 3) for key in stem)
    ]
    # Two uses may come after different preprocessing, and nothing says which of them counts.
    if len(first) != 1:
        return replace(preprocessing, why=f"its graph uses a first kernel of BiT {len(first)} times")
    convolution, stem = first[0]
    # Returned even if the rest is unclear: `open_savedmodel` compares it with the network that it has found.
    images, *kernel = graph.inputs(convolution)
    is_folded = any(graph.node(each).op == "VarHandleOp" for each in kernel)
    preprocessing = replace(preprocessing, stem=frozenset(stem), is_folded=is_folded)
    try:
        evaluator = GraphEvaluator(graph, bundle)
        image = evaluator.evaluate(images)
        preprocessing = replace(preprocessing, size=evaluator.size)
        if not isinstance(image, AffineImage):
            raise Unclear("its graph gives the network no images")
        _check_border(graph.node(convolution), image)
        inputs, is_plain = as_inputs(image)
    except Unclear as error:
        return replace(preprocessing, why=str(error))
    # `before`: variables that scale the images are part of `inputs` now, and must not count as left-over weights.
    return replace(preprocessing, inputs=inputs, is_plain=is_plain, before=_keys(graph, [images]))


def _keys(graph: Graph, outputs: list[Output]) -> frozenset[str]:
    # All names of a variable: a copy of it may be the one that the network was found by.
    return frozenset(key for keys in graph.variables(outputs) for key in keys)


def _check_border(convolution: Node, image: AffineImage) -> None:
    """Raises `Unclear` unless the first convolution has BiT's padding and strides."""
    # Field 2 of an AttrValue holds strings.
    padding = text(attribute(convolution, "padding"), 2)
    border = list(image.border)
    if padding == "EXPLICIT":
        # Pairs for batch, height, width and channels, of which those of height and width are taken.
        more = numbers(attribute(convolution, "explicit_paddings"))[2:6]
        # Not strict: a list of another length leaves a border unlike BiT's, which is refused below.
        border = [a + b for a, b in zip(border, more, strict=False)]
    strides = numbers(attribute(convolution, "strides"))
    layout = text(attribute(convolution, "data_format"), 2)
    # "SAME" pads 2 and 3 pixels here: the weights would fit, and every logit would be slightly wrong.
    if padding not in ("VALID", "EXPLICIT") or border != [BORDER] * 4 or strides != [1, 2, 2, 1] or layout == "NCHW":
        raise Unclear(
            f"the first convolution of its graph differs from BiT's (padding {padding}, {border}; strides {strides})"
        )


def as_inputs(image: AffineImage) -> tuple[Inputs, bool]:
    """Returns mean and standard deviation for images in [0, 1], and whether images are passed on unchanged.

    Whether the graph takes images in [0, 1] or in 0 … 255 is inferred from its result: zero must be inside the range of
    the images or close to it, and the range must become one of the size that networks are trained on.
    """
    scale, offset = image.scale, image.offset
    # scale · x + offset = (x − zero) / width
    with np.errstate(all="ignore"):
        zero, width = -offset / scale, 1 / scale
    # A scale of 0 or below is not a valid deviation, though an inverted image is affine too.
    if not (np.isfinite([scale, offset, zero, width]).all() and (scale > 0).all()):
        raise Unclear(f"its graph maps images x to {_written(scale)} · x + {_written(offset)}")

    def fits(largest: float) -> bool:
        spans = (scale * largest >= 0.5).all() and (scale * largest <= 50).all()
        return bool(spans and (zero >= -0.05 * largest).all() and (zero <= 1.05 * largest).all())

    # Integers are in 0 … 255 by their type, whatever the graph makes of them.
    ranges = [255.0] if image.is_integer else [largest for largest in (1.0, 255.0) if fits(largest)]
    # Caffe's preprocessing only subtracts a mean, and leaves a range of 255.
    if not ranges and (zero > 1.05).all() and (zero <= 255 * 1.05).all():
        ranges = [255.0]
    if len(ranges) != 1:
        raise Unclear(
            f"its graph maps images x to {_written(scale)} · x + {_written(offset)}, an unusual range for x in [0, 1] "
            "as well as in 0 … 255"
        )
    mean, std = zero / ranges[0], width / ranges[0]
    # Exactly 1 and 0: such a graph is the network alone, and says nothing about the images of its training.
    plain = not image.is_integer and bool((scale == 1).all() and (offset == 0).all())
    return (tuple(map(_without_rounding, mean)), tuple(map(_without_rounding, std))), plain


def _without_rounding(value: float) -> float:
    """Removes the rounding error of single precision from a number that was written with few digits."""
    # 0.485 comes out as 0.48500001, and two cards of the same mean should be equal.
    short = float(f"{value:.6g}")
    # + 0.0 makes 0.0 of -0.0, which would look different on the card.
    return short + 0.0 if abs(value - short) <= 3e-7 * max(abs(value), 1e-2) else float(value)


def _written(values: np.ndarray) -> str:
    return ", ".join(f"{value:.4g}" for value in dict.fromkeys(values.tolist()))


def after_head(preprocessing: Preprocessing, kernel: str, bias: str, where: str) -> tuple[str, ...]:
    """Returns notes about what a graph does to the logits of its head.

    Args:
        preprocessing: result of `input_preprocessing`.
        kernel, bias: keys of the head.
        where: source of the model, for messages.

    Raises:
        InputError: the head's input is something else than the mean of the network's last activations.
    """
    if preprocessing.graph is None:
        return ()
    try:
        chains = [
            _operations_after_head(preprocessing.graph, output, kernel, bias) for output in preprocessing.graph.outputs
        ]
    except UnexpectedOperation as error:
        raise unexpected(str(error), where) from None
    except Unclear as error:
        return (f"unknown what the original model does to the logits of its head, as {error}",)
    # A graph may return probabilities beside logits; the output that is nearest to the head is the one to report.
    ops = min((ops for ops in chains if ops is not None), key=len, default=None)
    if ops is None:
        return ("the original model's output is not that of its head, whose logits are used here",)
    return applied(ops[::-1])


def applied(operations: Sequence[str]) -> tuple[str, ...]:
    """Returns a note about what a model does to its logits, in order; none where it leaves them as they are."""
    if not operations:
        return ()
    return (
        f"the original model applies {', '.join(operations)} to the logits of its head; they are used unchanged here",
    )


def unexpected(operation: str, where: str) -> InputError:
    """Builds the error for a model that changes the features before they reach its head."""
    return InputError(
        f"{where} applies {operation} to the input of its head, which no BiT network does; make it a part of the head, "
        "or leave it out, and save the model again"
    )


def pool_padding(graph: Graph) -> str:
    """Returns the padding of a BiT network's max-pool, one of `bit.STEM_TYPES`; zeros unless its graph has -inf."""
    try:
        pads = [graph.inputs(each)[0] for each in graph.before(graph.outputs) if graph.node(each).op == "MaxPool"]
        values = [constant(graph.node(graph.inputs(pad)[2])) for pad in pads if graph.node(pad).op == "PadV2"]
    except (Unclear, Damaged, IndexError):
        return "zeros"
    return "-inf" if any(float(value.min(initial=0)) < LOW for value in values) else "zeros"


def sided(size: tuple[int, int]) -> tuple[int | None, tuple[str, ...]]:
    """Returns the image size of a model that makes images of a size itself, or takes no others, and notes about it.

    Args:
        size: height and width, pixels.
    """
    height, width = size
    shape = f"{height} × {width} pixels"
    if height == width:
        usage = "which is used as its image size unless --side says otherwise"
        return height, (f"the original model is for images of {shape}, {usage}",)
    return None, (f"the original model is for images of {shape}; here images are square, so pass --side",)


def _operations_after_head(graph: Graph, output: Output, kernel: str, bias: str) -> list[str] | None:
    """Returns the operations between an output and the head, the last first; None if it does not come from the head."""
    ops: list[str] = []
    for _ in range(MAX_STEPS_TO_HEAD):
        op, into = graph.node(output).op, graph.inputs(output)
        # The second input alone: the first of a product behind the head depends on the head's kernel, too.
        if op in PRODUCTS and kernel in _keys(graph, into[1:]):
            _check_features(graph, into[0])
            return ops
        # Of several inputs, the one that depends on the head's kernel leads there.
        computed = [each for each in into if graph.node(each).op not in ("VarHandleOp", "Const")]
        if len(computed) > 1:
            computed = [each for each in computed if kernel in _keys(graph, [each])]
        if not computed:
            return None
        others = [each for each in into if each not in computed]
        added = graph.variables(others) if op in SUMS else []
        # The head's own bias and changes of shape are parts of the logits.
        if op not in RESHAPES and not (len(added) == 1 and bias in added[0]):
            ops.append(op)
        output = computed[0]
    return None


def _check_features(graph: Graph, output: Output) -> None:
    """Raises `UnexpectedOperation` if anything but a mean is between the last activations and the head."""
    for _ in range(MAX_STEPS_TO_HEAD):
        op = graph.node(output).op
        if op in ("Relu", "Placeholder"):
            return
        # Anything else, such as a norm, would change the logits, and no BiT network has a place for it.
        if op not in RESHAPES | {"Mean", "AvgPool"}:
            raise UnexpectedOperation(op)
        output = graph.inputs(output)[0]
