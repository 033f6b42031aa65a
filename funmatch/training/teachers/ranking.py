"""Compares candidate teachers before a run, from their answers alone."""

import math
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from funmatch.config import Distill
from funmatch.data.loader import Batch
from funmatch.data.prefetch import prefetch
from funmatch.models.ensemble import TeacherEnsemble
from funmatch.models.flops import gflop
from funmatch.ops.tasks.task import task_of
from funmatch.runtime import devices
from funmatch.runtime.log import ProgressBar
from funmatch.training.evaluation import scoring
from funmatch.training.objective import TeacherLogits
from funmatch.training.setup import TrainSetup
from funmatch.training.teachers.source import views_by_side

GROUPS = 10
"""Parts of the views over whose mean answers the spread is taken."""


@dataclass(frozen=True)
class Answers:
    """A teacher's answers to training views.

    Attributes:
        logits: (views, classes) float32 on the CPU.
        seconds: of the forward pass of each batch, for one view.
    """

    logits: Tensor
    seconds: list[float]


def compare(
    setup: TrainSetup[Distill], teachers: TeacherEnsemble, logits: TeacherLogits, views: int
) -> list[dict[str, Any]]:
    """Compares the members of an ensemble.

    Args:
        setup: the run, whose views they are shown.
        teachers: the candidates, frozen.
        logits: theirs on the validation split.
        views: number of training views that each is shown; the same for all.

    Returns:
        for each candidate `teacher`, `top1` (or the task's metric) on the validation images (None without labels),
        `entropy` of its answers to the views (nats), `spread` of its mean answer, `gflop` (None where it cannot be
        counted) and `ms` of the forward pass of one view (that of the fastest batch), `parameters`, `side`; the best
        first: the most accurate, or without labels the one of the smallest spread.
    """
    split = setup.evaluation.validation
    task = task_of(split.task)
    answers = answer_views(setup, teachers, views)
    found: list[dict[str, Any]] = []
    for member, own, each in zip(teachers.members, logits.members, answers, strict=True):
        probabilities = task.probabilities(each.logits)
        found.append({
            "teacher": member.name,
            task.score: scoring.score(own, split)[task.score],
            # The cross-entropy with itself.
            "entropy": float(task.label_loss(each.logits, probabilities).mean()),
            "spread": spread_of_mean(probabilities),
            "gflop": gflop(member.frozen.classifier.net, member.side),
            # Others wait for kernels to be compiled, or for other programs.
            "ms": 1e3 * min(each.seconds),
            "parameters": member.frozen.size,
            "side": member.side,
        })  # fmt: skip
    return sorted(found, key=lambda row: row["spread"] if row[task.score] is None else -row[task.score])


@torch.inference_mode()
def answer_views(setup: TrainSetup[Distill], teachers: TeacherEnsemble, views: int) -> list[Answers]:
    """Returns the answers of each member of an ensemble to the first training views of a run."""
    loader, device = setup.loader, setup.loop.device
    steps = math.ceil(views / loader.size)
    rows: list[list[Tensor]] = [[] for _ in teachers.members]
    seconds: list[list[float]] = [[] for _ in teachers.members]
    finish = partial(Batch.pin_memory, device=device)
    with ProgressBar("views", steps, 0) as bar:
        for number, batch in enumerate(prefetch(loader, 0, steps, workers=setup.workers, finish=finish), 1):
            shown, _ = views_by_side(batch.to(device), loader.teacher_sides)
            for member, answered, times in zip(teachers.members, rows, seconds, strict=True):
                devices.synchronize(device)
                began = time.perf_counter()
                logits = teachers.forward_chunked(member, shown[member.side])
                # Without it only the launch of kernels would be timed.
                devices.synchronize(device)
                times.append((time.perf_counter() - began) / len(logits))
                answered.append(logits.float().cpu())
            bar.update(number, f"{number * loader.size:,}")
    return [Answers(torch.cat(answered)[:views], times) for answered, times in zip(rows, seconds, strict=True)]


def spread_of_mean(probabilities: Tensor) -> float:
    """Computes how much the mean answer to some views differs from that to others ("T. stddev").

    Args:
        probabilities: (views, classes), in the order of the views.

    Returns:
        the standard deviation, over `GROUPS` parts of the views, of the mean probability of a class; the mean over
        classes.

    References:
        Wang et al., "What Makes a 'Good' Data Augmentation in Knowledge Distillation", NeurIPS 2022, section 3.
    """
    size = len(probabilities) // GROUPS
    means = probabilities[: size * GROUPS].double().view(GROUPS, size, -1).mean(1)
    return float(means.std(0).mean())
