"""Measures an ONNX model: accuracy, agreement, size, and latency."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from funmatch.ops import metrics
from funmatch.ops.tasks import ranking
from funmatch.ops.tasks.task import MULTICLASS, MULTILABEL, Task
from funmatch.shipping.runtimes import Runtime, open_runtime

SECONDS, WARM, RUNS = 1.5, 3, 200
"""Time for measuring latency; passes before that do not count; and passes at most."""
Array = np.ndarray


@dataclass(frozen=True)
class Images:
    """Views of images, and what is known of them.

    Attributes:
        batches: (n, 3, side, side) arrays of float32 in [0, 1] each; iterated several times.
        labels: (images,) class numbers, −1 for none; or (images, classes) in {0, 1} of several an image; None where no
            image has one.
        teacher: (images, classes) logits of the teacher; None where there is none.
        task: what outputs and labels mean.
    """

    batches: Iterable[Array]
    labels: Array | None = None
    teacher: Array | None = None
    task: Task = MULTICLASS


@dataclass(frozen=True)
class Score:
    """How good, large and fast a model is.

    Attributes:
        top1: accuracy, in [0, 1]; None without labels, and where an image may have several classes.
        agreement: share of the images whose first class is the teacher's, or of the decisions on all classes; None
            without a teacher.
        same: the same with the fp32 model in place of the teacher.
        kl: KL(fp32 model ‖ this model), the mean over images in nats.
        images: number of images.
        gained, lost: images that this model, and the fp32 model, alone has right; None without labels.
        bytes: size of the file.
        milliseconds: median latency for one image; None where it was not measured.
        map: mean average precision where an image may have several classes; None without labels.
        map_lost: 95 % interval of what it is less than that of the fp32 model.
    """

    top1: float | None
    agreement: float | None
    same: float
    kl: float
    images: int
    gained: int | None
    lost: int | None
    bytes: int
    milliseconds: float | None = None
    map: float | None = None
    map_lost: tuple[float, float] | None = None

    @property
    def accuracy(self) -> float | None:
        """The metric by which a loss is measured; None without labels."""
        return self.top1 if self.map is None else self.map


def logits_of(runtime: Runtime, batches: Iterable[Array]) -> Array:
    """Returns the outputs of all batches, (images, classes)."""
    return np.concatenate([runtime(runtime.as_input(batch)) for batch in batches])


def score(path: Path, images: Images, plain: Array | None = None, *, threads: int | None = None) -> tuple[Score, Array]:
    """Scores a model.

    Args:
        plain: logits of the fp32 model for these images; None for the fp32 model itself.
        threads: of the runtime; None: its own choice.

    Returns:
        the score, without the latency; and the logits, (images, classes).
    """
    logits = logits_of(open_runtime(path, threads), images.batches)
    reference = logits if plain is None else plain
    column = compare(logits, reference, images.task)
    top1 = gained = lost = precision = precision_lost = None
    if images.labels is not None and (images.labels >= 0).all():
        if images.task is MULTILABEL:
            own, before, labels = map(torch.from_numpy, (logits, reference, images.labels))
            precision = images.task.accuracy(own, labels)
            precision_lost = ranking.difference_interval(before, own, labels)
        else:
            right, before = (torch.from_numpy(each.argmax(-1) == images.labels) for each in (logits, reference))
            top1, (gained, lost) = right.double().mean().item(), metrics.alone_right(right, before)
    agreement = None
    if images.teacher is not None:
        agreement = compare(logits, images.teacher, images.task)["agreement"]
    same, kl, count = column["agreement"], column["kl"], len(logits)
    found = Score(top1, agreement, same, kl, count, gained, lost, path.stat().st_size)
    return replace(found, map=precision, map_lost=precision_lost), logits


def compare(logits: Array, reference: Array, task: Task = MULTICLASS) -> dict[str, float]:
    """Returns `agreement` and `kl` (nats, of the reference from the logits), means over images; (n, classes) each."""
    columns = task.compare(torch.from_numpy(logits), torch.from_numpy(reference))
    return {name: float(columns[name].double().mean()) for name in ("agreement", "kl")}


def latency(path: Path, batch: Array, *, threads: int | None = None, seconds: float = SECONDS) -> float:
    """Measures the median time of a forward pass, in milliseconds.

    Args:
        batch: the images of one pass, (n, 3, side, side) in [0, 1].
    """
    runtime = open_runtime(path, threads)
    views, times = runtime.as_input(batch), []
    for _ in range(WARM):
        runtime(views)
    until = time.perf_counter() + seconds
    while not times or (time.perf_counter() < until and len(times) < RUNS):
        began = time.perf_counter()
        runtime(views)
        times.append(time.perf_counter() - began)
    return 1000 * float(np.median(times))
