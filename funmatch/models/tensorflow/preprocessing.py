"""What a network in a SavedModel sees: what its graph does to images before the first kernel, and after the head.

The graph is followed from the first convolution back to the images. `scale · image + offset` for each channel is a
mean and a standard deviation; whatever else is done to them cannot be written as these.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from funmatch.data.formats.protobuf import Damaged, text
from funmatch.errors import InputError
from funmatch.models.tensorflow.affine import AffineImage, GraphWalk
from funmatch.models.tensorflow.bundle import Bundle
from funmatch.models.tensorflow.graph import Graph, Output, open_graph
from funmatch.models.tensorflow.nodes import Missing, Node, Unclear, attribute, numbers

Inputs = tuple[tuple[float, ...], tuple[float, ...]]
AS_GIVEN: Inputs = (0.0,) * 3, (1.0,) * 3
"""Mean and standard deviation of what networks see, for images in [0, 1]; and of one that sees [0, 1] as it is."""

BORDER = 3  # pixels of zeros that BiT's first convolution sees on each side
MULTIPLY = {"MatMul", "Conv2D", "BatchMatMulV2", "Einsum"}
SUMS = {"Add", "AddV2", "BiasAdd"}
SHAPING = {"Reshape", "Squeeze", "ExpandDims", "Cast"}


class Strange(ValueError):
    """An operation stands where BiT has none."""


@dataclass(frozen=True)
class Preprocessing:
    """What a graph says of a network.

    Attributes:
        inputs: mean and standard deviation for images in [0, 1]; None where they cannot be told.
        is_plain: whether the network sees images as they are given, so that they may have been of any range.
        why: they cannot be told.
        stem: the keys of the first kernel; none where it was not found.
        used: keys of all variables that the answer is computed from; None where that is not known.
        before: keys of those that are used before the first kernel.
        is_missing: whether there is no graph at all.
        graph: itself, to ask it more.
    """

    inputs: Inputs | None = None
    is_plain: bool = False
    why: str = ""
    stem: frozenset[str] = frozenset()
    used: frozenset[str] | None = None
    before: frozenset[str] = frozenset()
    is_missing: bool = False
    graph: Graph | None = field(default=None, repr=False)


def input_preprocessing(folder: Path, bundle: Bundle) -> Preprocessing:
    """What the graph of a SavedModel says of its network.

    Raises:
        InputError: `saved_model.pb` is damaged.
    """
    path = folder / "saved_model.pb"
    try:
        graph = open_graph(path)
        found = Preprocessing(graph=graph, used=_keys(graph, graph.answers))
        return _seen(found, graph, bundle)
    except Damaged as error:
        raise InputError(f"{path} is damaged: {error}; copy it again") from None
    except Unclear as error:
        return Preprocessing(why=str(error), is_missing=isinstance(error, Missing))


def _seen(found: Preprocessing, graph: Graph, bundle: Bundle) -> Preprocessing:
    """What is done to images before the one convolution with a kernel of BiT's first shape."""
    first = [
        (output, stem)
        for output in graph.before(graph.answers)
        if graph.node(output).op == "Conv2D"
        for stem in graph.variables(graph.inputs(output)[1:])
        if all(key in bundle.entries and bundle.entries[key].shape[:3] == (7, 7, 3) for key in stem)
    ]
    if len(first) != 1:
        return replace(found, why=f"its graph uses a first kernel of BiT {len(first)} times")
    convolution, stem = first[0]
    found = replace(found, stem=frozenset(stem))
    given = graph.inputs(convolution)[:1]
    try:
        image = GraphWalk(graph, bundle).of(given[0])
        if not isinstance(image, AffineImage):
            raise Unclear("its graph shows the network no images")
        _check_border(graph.node(convolution), image)
        inputs, is_plain = _as_inputs(image)
    except Unclear as error:
        return replace(found, why=str(error))
    return replace(found, inputs=inputs, is_plain=is_plain, before=_keys(graph, given))


def _keys(graph: Graph, outputs: list[Output]) -> frozenset[str]:
    return frozenset(key for keys in graph.variables(outputs) for key in keys)


def _check_border(convolution: Node, image: AffineImage) -> None:
    """Raises `Unclear` unless the first convolution stands on its images as BiT's does."""
    form = text(attribute(convolution, "padding"), 2)
    border = list(image.border)
    if form == "EXPLICIT":
        more = numbers(attribute(convolution, "explicit_paddings"))[2:6]
        border = [a + b for a, b in zip(border, more, strict=False)]
    strides = numbers(attribute(convolution, "strides"))
    layout = text(attribute(convolution, "data_format"), 2)
    if form not in ("VALID", "EXPLICIT") or border != [BORDER] * 4 or strides != [1, 2, 2, 1] or layout == "NCHW":
        raise Unclear(
            f"the first convolution of its graph is another than BiT's (padding {form}, {border}; strides {strides})"
        )


def _as_inputs(image: AffineImage) -> tuple[Inputs, bool]:
    """Mean and standard deviation for images in [0, 1], and whether nothing was done to images at all.

    Whether the network was shown images in [0, 1] or in 0 … 255 is told by where it puts these: the middle of what it
    sees must lie in the range, and the range must then be of the size that networks are shown.
    """
    scale, offset = image.scale, image.offset
    with np.errstate(all="ignore"):
        zero, width = -offset / scale, 1 / scale
    if not (np.isfinite([scale, offset, zero, width]).all() and (scale > 0).all()):
        raise Unclear(f"its graph maps images x to {_written(scale)} · x + {_written(offset)}")

    def fits(largest: float) -> bool:
        spans = (scale * largest >= 0.5).all() and (scale * largest <= 50).all()
        return bool(spans and (zero >= -0.05 * largest).all() and (zero <= 1.05 * largest).all())

    ranges = [255.0] if image.are_whole else [largest for largest in (1.0, 255.0) if fits(largest)]
    if not ranges and (zero > 1.05).all() and (zero <= 255 * 1.05).all():
        ranges = [255.0]  # nothing but a mean is subtracted
    if len(ranges) != 1:
        raise Unclear(
            f"its graph maps images x to {_written(scale)} · x + {_written(offset)}, for x in [0, 1] as well as in "
            "0 … 255 an odd range"
        )
    mean, std = zero / ranges[0], width / ranges[0]
    plain = not image.are_whole and bool((scale == 1).all() and (offset == 0).all())
    return (tuple(map(_near, mean)), tuple(map(_near, std))), plain


def _near(value: float) -> float:
    """A number without what single precision has added to it."""
    short = float(f"{value:.6g}")
    return short + 0.0 if abs(value - short) <= 3e-7 * max(abs(value), 1e-2) else float(value)


def _written(values: np.ndarray) -> str:
    return ", ".join(f"{value:.4g}" for value in dict.fromkeys(values.tolist()))


def after_head(seen: Preprocessing, kernel: str, bias: str, where: str) -> tuple[str, ...]:
    """What a person should know of what a graph does to the logits of its head.

    Args:
        kernel, bias: the keys of the head.
        where: for messages.

    Raises:
        InputError: the head is given something else than the mean of the network's last activations.
    """
    if seen.graph is None:
        return ()
    try:
        found = [_since_head(seen.graph, answer, kernel, bias) for answer in seen.graph.answers]
    except Strange as error:
        raise InputError(
            f"{where} applies {error} to what its network gives to its head, which no BiT network does; make it a part "
            "of the head, or leave it out, and save the model again"
        ) from None
    except Unclear as error:
        return (f"what the original does to the logits of its head cannot be told, as {error}",)
    ops = min((ops for ops in found if ops is not None), key=len, default=None)
    if ops is None:
        return ("the original does not answer with its head, whose logits are taken here",)
    applied = ", ".join(reversed(ops))
    return (f"the original applies {applied} to the logits of its head; here they are left as they are",) if ops else ()


def _since_head(graph: Graph, output: Output, kernel: str, bias: str) -> list[str] | None:
    """The operations between an answer and the head, the last first; None if it is not from the head."""
    ops: list[str] = []
    for _ in range(20):
        op, into = graph.node(output).op, graph.inputs(output)
        if op in MULTIPLY and kernel in _keys(graph, into[1:]):
            _check_features(graph, into[0])
            return ops
        around = [each for each in into if graph.node(each).op not in ("VarHandleOp", "Const")]
        if len(around) > 1:
            around = [each for each in around if kernel in _keys(graph, [each])]
        if not around:
            return None
        beside = [each for each in into if each not in around]
        added = graph.variables(beside) if op in SUMS else []
        if op not in SHAPING and not (len(added) == 1 and bias in added[0]):
            ops.append(op)
        output = around[0]
    return None


def _check_features(graph: Graph, output: Output) -> None:
    """Raises `Strange` if anything but a mean lies between the last activations and the head."""
    for _ in range(20):
        op = graph.node(output).op
        if op in ("Relu", "Placeholder"):
            return
        if op not in SHAPING | {"Mean", "AvgPool"}:
            raise Strange(op)
        output = graph.inputs(output)[0]
