"""Tells runs that have trained a student from those that diverged, collapsed or learnt nothing."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from funmatch.data.cache.stores import CachedSplit
from funmatch.ops.metrics import constant_share, has_diverged, is_guess
from funmatch.ops.tasks.ranking import random_precision
from funmatch.ops.tasks.task import task_of_metrics
from funmatch.runtime.text import number, percent


def chance_threshold(chance: float, deviation: float) -> float:
    """Returns the metric below which a classifier is taken to guess.

    Two standard deviations above chance, or a tenth of the way from chance to 1 (`chance` of the way where that is
    less), whichever is more; but never more than halfway from chance to 1.
    """
    return min(chance + max(2 * deviation, min(chance, 0.1) * (1 - chance)), (1 + chance) / 2)


def chance_precision(labels: Tensor) -> float:
    """Returns the mean average precision below which a classifier is taken to rank images at random.

    Args:
        labels: (n, classes) in {0, 1}; some image has a class.
    """
    return chance_threshold(*random_precision(labels))


DECIDING = ("top1", "map", "knn", "agreement", "cosine")
"""Metrics by which runs are compared; see `deciding_metric`."""


def guessing(logits: Tensor, split: CachedSplit, teacher_logits: Tensor | None) -> dict[str, Any]:
    """Measures what tells a student that has learnt something from one that guesses.

    Args:
        logits: the student's, (n, classes).
        teacher_logits: (n, classes), or None: the labels are right then.

    Returns:
        `predicted_classes`, the number of classes that the student gives to any image, and `constant`, the accuracy or
        agreement of the best constant prediction; of several classes an image `chance`, the mean average precision up
        to which it is that of a random ranking; empty where there is neither teacher nor label.
    """
    if split.task == "multilabel":
        labels = split.labels(slice(None)) if split.labelled else None
        return {} if labels is None or not labels.any() else {"chance": chance_precision(labels)}
    if teacher_logits is None and not split.labelled:
        return {}
    right = split.labels(slice(None)) if teacher_logits is None else teacher_logits.argmax(-1)
    return {"predicted_classes": len(logits.argmax(-1).unique()), "constant": constant_share(right)}


def deciding_metric(metrics: Mapping[str, Any]) -> str:
    """Names the metric by which evaluations of a run are compared: the first that is known, the more the better.

    Accuracy, of several classes an image the mean average precision; of features the accuracy of nearest neighbours;
    without labels the agreement with the teacher; of features the cosine with the teacher's.
    """
    return next((name for name in DECIDING if metrics.get(name) is not None), "agreement")


def describe_failure(metrics: Mapping[str, Any], classes: int) -> str | None:
    """Says in what way a run has failed to train its student; returns None for one that has not.

    Args:
        metrics: what `result.json` holds, or the record of an evaluation; an earlier version had less in them.
        classes: number of classes.
    """
    if has_diverged(metrics.get("kl"), task_of_metrics(metrics).outcomes(classes)):
        return (
            f"has diverged: its student is further from its teacher than a uniform guess (KL {number(metrics['kl'])})"
        )
    if None not in (metrics.get("chance"), metrics.get("map")) and metrics["map"] < metrics["chance"]:
        return (
            f"has not trained its student: its mAP is {percent(metrics['map'])}, and that of random rankings up to "
            f"{percent(metrics['chance'])}"
        )
    constant, images = metrics.get("constant"), metrics.get("pictures")
    share = metrics.get("top1") if metrics.get("agreement") is None else metrics["agreement"]
    # Where all images have the same right class, a constant prediction is no failure.
    if constant is None or share is None or not images or constant == 1:
        return None
    if metrics["predicted_classes"] == 1:
        return "has collapsed: its student gives all images the same class"
    if is_guess(share, constant, images):
        return (
            f"has not trained its student: {percent(share)} are right, and one class for all images would have "
            f"{percent(constant)}"
        )
    return None
