"""Computes the metrics of a model that gives an image any number of classes: of all images, and of each class."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from funmatch.ops.tasks import multilabel, ranking
from funmatch.training.run.folder import finite


@dataclass(frozen=True)
class Answers:
    """What one model, and its teacher, say of the images of a split.

    Attributes:
        logits: (n, classes).
        labels: (n, classes) in {0, 1}, or None without labels.
        teacher_logits: (n, classes), or None without a teacher.
    """

    logits: Tensor
    labels: Tensor | None
    teacher_logits: Tensor | None


def figures(
    logits: Tensor, labels: Tensor | None, teacher_logits: Tensor | None, names: Sequence[str], seed: int
) -> dict[str, Any]:
    """Returns all metrics of one model on a split.

    Args:
        logits: (n, classes).
        labels: (n, classes) in {0, 1}, or None without labels.
        teacher_logits: (n, classes), or None without a teacher.
        names: of the classes.
        seed: of the bootstrap intervals.

    Returns:
        those of `multilabel.measure`; `nll` and `brier`, the means over images and classes of the binary cross-entropy
        and of (p − y)²; `threshold` and `f1_best`, the probability from which on classes are to be predicted for the
        highest F1 score on these very images, and that score; `without_images`, the number of classes that no image
        has, which `map` and `f1_macro` leave out; `intervals`, that of `map`; and `classes`, a row each. None where
        labels are missing.
    """
    found: dict[str, Any] = multilabel.measure(logits, labels, teacher_logits)
    found |= dict.fromkeys(("nll", "brier", "threshold", "f1_best", "without_images")) | {"intervals": {}}
    if labels is not None:
        probabilities = logits.float().sigmoid()
        found["nll"] = multilabel.cross_entropy(logits, labels).double().mean().item()
        found["brier"] = (probabilities - labels).square().double().mean().item()
        found["without_images"] = int((labels.sum(0) == 0).sum())
        if labels.any():
            found["threshold"], found["f1_best"] = ranking.best_threshold(probabilities, labels)
            found["intervals"] = {"map": ranking.precision_interval(logits.float(), labels, seed)}
    return found | {"classes": class_rows(logits, labels, teacher_logits, names)}


def class_rows(
    logits: Tensor, labels: Tensor | None, teacher_logits: Tensor | None, names: Sequence[str]
) -> list[dict[str, Any]]:
    """Returns the metrics of each class.

    Returns:
        `name`, `predicted` (images for which the class is predicted), and where they are known `images` (that have the
        class), `ap` (average precision), `precision`, `recall` and `f1` of the decisions at 1/2, `teacher_ap`, and
        `agreement` with the teacher's decisions. None where a share is of no images.
    """
    chosen = multilabel.decisions(logits)
    columns: dict[str, list[Any]] = {"predicted": chosen.sum(0).tolist()}
    if labels is not None:
        hits, predicted, having = (chosen * labels).sum(0).double(), chosen.sum(0).double(), labels.sum(0).double()
        columns |= {
            "images": having.long().tolist(),
            "ap": ranking.average_precisions(logits.float(), labels).tolist(),
            "precision": (hits / predicted).tolist(),
            "recall": (hits / having).tolist(),
            "f1": torch.where(having > 0, 2 * hits / (predicted + having), torch.nan).tolist(),
        }
    if teacher_logits is not None:
        same = chosen == multilabel.decisions(teacher_logits)
        columns["agreement"] = same.double().mean(0).tolist()
        if labels is not None:
            columns["teacher_ap"] = ranking.average_precisions(teacher_logits.float(), labels).tolist()
    return [
        {"name": name} | {key: finite(values[number]) for key, values in columns.items()}
        for number, name in enumerate(names)
    ]
