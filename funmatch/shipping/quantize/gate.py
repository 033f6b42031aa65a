"""Finds the layers that have to stay in fp32 for an INT8 model to keep its accuracy."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from funmatch.ops.intervals import paired_difference, wilson
from funmatch.runtime.log import info, track
from funmatch.shipping.quantize.graph import Graph
from funmatch.shipping.quantize.scores import Array, Images, Score, compare, logits_of, score
from funmatch.shipping.quantize.static import Ranges, write_int8
from funmatch.shipping.runtimes import open_runtime

SENSITIVITY_IMAGES = 64
"""Images by which layers are compared; each layer costs a pass over them."""
MOST = 0.5
"""Share of the layers that may stay in fp32; with more, the model is hardly smaller or faster."""


@dataclass(frozen=True)
class Sensitivity:
    """How much a layer alone changes the outputs, if only it is quantised.

    Attributes:
        layer: its name in the network.
        weights: number of its weights.
        kl: KL(fp32 model ‖ this model), the mean over images in nats.
        same: share of the images whose first class, or of the decisions that, stays.
    """

    layer: str
    weights: int
    kl: float
    same: float


@dataclass(frozen=True)
class Gate:
    """What an INT8 model may lose.

    Attributes:
        images: by which it is measured; by their labels, or else by agreement with the fp32 model.
        before: score of the fp32 model.
        plain: logits of the fp32 model.
        max_drop: percentage points.
        threads: of the runtime.
    """

    images: Images
    before: Score
    plain: Array
    max_drop: float
    threads: int | None

    def drop(self, after: Score) -> float:
        """Returns how much a model loses, in percentage points; negative for a gain."""
        if self.before.accuracy is None or after.accuracy is None:
            return 100 * (1 - after.same)
        return 100 * (self.before.accuracy - after.accuracy)

    def interval(self, after: Score) -> tuple[float, float]:
        """Returns the 95 % interval of `drop`, in percentage points: of what other images like these would lose."""
        if after.map_lost is not None:
            low, high = after.map_lost
        elif self.before.top1 is None or after.gained is None or after.lost is None:
            low, high = wilson(1 - after.same, after.images) or (0.0, 1.0)
        else:
            # Of the same images: what both have right or wrong says nothing about the difference.
            low, high = paired_difference(after.lost, after.gained, after.images)
        return 100 * low, 100 * high

    def is_too_coarse(self, after: Score) -> bool:
        """Returns whether chance alone moves `drop` by more than it may be: the images are too few for the limit."""
        low, high = self.interval(after)
        return (high - low) / 2 > self.max_drop

    def holds(self, after: Score) -> bool:
        # A hundredth of an image: differences of equal counts must not fail by rounding.
        return self.drop(after) <= self.max_drop + 1e-9

    def score(self, path: Path) -> Score:
        """Scores a model on the images, without latency."""
        return score(path, self.images, self.plain, threads=self.threads)[0]


def measure_sensitivity(
    graph: Graph, ranges: Ranges, images: Images, folder: Path, *, threads: int | None
) -> tuple[Sensitivity, ...]:
    """Quantises each layer alone and compares outputs with those in fp32; returns the most sensitive layer first."""
    batches, left = [], SENSITIVITY_IMAGES
    for batch in images.batches:
        batches.append(batch[:left])
        left -= len(batches[-1])
        if left <= 0:
            break
    plain = logits_of(open_runtime(graph.path, threads), batches)
    path, found = folder / "layer.onnx", []
    for layer in track(graph.layers, len(graph.layers), "layers"):
        write_int8(graph, ranges, path, only=layer.node)
        column = compare(logits_of(open_runtime(path, threads), batches), plain, images.task)
        found.append(Sensitivity(layer.name, layer.weights, column["kl"], column["agreement"]))
    return tuple(sorted(found, key=lambda each: -each.kl))


def keep_layers(
    graph: Graph, ranges: Ranges, order: Sequence[str], gate: Gate, path: Path
) -> tuple[tuple[str, ...], Score]:
    """Leaves the most sensitive layers in fp32, as few as the gate needs, and writes the model.

    Args:
        order: names of the layers, the most sensitive first.
        path: of the INT8 model.

    Returns:
        the layers in fp32, and the score; where the gate does not hold, those of the best attempt.
    """
    nodes = {layer.name: layer.node for layer in graph.layers}
    scores: dict[int, Score] = {}

    def attempt(count: int) -> bool:
        write_int8(graph, ranges, path, fp32=[nodes[name] for name in order[:count]])
        scores[count] = gate.score(path)
        info(f"{count} of {len(order)} layers in fp32: {gate.drop(scores[count]):.2f} points lost")
        return gate.holds(scores[count])

    count = fewest(attempt, int(MOST * len(order)))
    if count is None:
        count = min(scores, key=lambda each: (gate.drop(scores[each]), each), default=0)
    attempt(count)  # writes the model of this number again
    return tuple(order[:count]), scores[count]


def fewest(holds: Callable[[int], bool], most: int) -> int | None:
    """Returns the smallest number from 1 to `most` for which a condition holds that more only helps; None for none.

    It is tried for 1, 2, 4, …, and then halfway between the last two.
    """
    below, count = 0, min(1, most)
    while not count or not holds(count):
        if count == most:
            return None
        below, count = count, min(2 * count, most)
    while count - below > 1:
        middle = (below + count) // 2
        below, count = (below, middle) if holds(middle) else (middle, count)
    return count
