"""Computes a classifier's metrics: accuracy, agreement with the teacher, and calibration."""

import math

import torch
from torch import Tensor

from funmatch.ops.calibration import calibration_error
from funmatch.ops.distances import kl

METRICS = ("top1", "top5", "agreement", "agreement5", "kl", "ece", "balanced")


def per_image(logits: Tensor, labels: Tensor | None = None, teacher_logits: Tensor | None = None) -> dict[str, Tensor]:
    """Computes the columns that `summarize` averages, one value an image.

    Args:
        logits: (n, classes).
        labels: (n,) int64, or None without labels.
        teacher_logits: (n, classes), or None without a teacher.

    Returns:
        columns of (n,) float32: `confidence`, and `predicted`, the first class, int64; with labels `label`, `top1` and
        `top5`; with a teacher `agreement` and `agreement5` (the teacher's first class is the student's first, or one of
        its first five) and `kl` (KL(teacher ‖ student) at T = 1, in nats).
    """
    # float32: sixteen bits make ties among the first classes, and which of them topk takes is then a matter of chance.
    logits = logits.float()
    ranked = logits.topk(min(5, logits.shape[-1]), dim=-1).indices
    # Concatenated over batches before they are averaged: a mean of batches' means would favour the last, smaller one.
    # The predicted class by the same call as `top1`: of tied classes, argmax may take another.
    columns = {"confidence": logits.softmax(-1).amax(-1), "predicted": ranked[:, 0]}
    if labels is not None:
        hits = (ranked == labels[:, None]).float()
        columns |= {"label": labels.float(), "top1": hits[:, 0], "top5": hits.sum(-1)}
    if teacher_logits is not None:
        agrees = (ranked == teacher_logits.argmax(-1, keepdim=True)).float()
        columns |= {"agreement": agrees[:, 0], "agreement5": agrees.sum(-1), "kl": kl(logits, teacher_logits)}
    return columns


def summarize(columns: dict[str, Tensor]) -> dict[str, float | None]:
    """Averages the columns of `per_image` over a split.

    Args:
        columns: of `per_image`, concatenated over all batches.

    Returns:
        the metrics, None where labels or teacher are missing: `top1`, `top5`, `agreement`, `agreement5` in [0, 1];
        `kl` in nats; `ece` in [0, 1] (`calibration_error`); and `balanced`, the mean of the classes' recalls, which a
        constant prediction cannot lift above 1 / classes however uneven the classes are.
    """
    metrics: dict[str, float | None] = dict.fromkeys(METRICS)
    for name in ("top1", "top5", "agreement", "agreement5", "kl"):
        if name in columns:
            # float64: sums of 50,000 float32 numbers would lose the digits in which runs differ.
            metrics[name] = columns[name].double().mean().item()
    if "top1" in columns:
        metrics["ece"] = calibration_error(columns["confidence"], columns["top1"])
        # Of the classes that occur: a class without images has no recall.
        recalls = [columns["top1"][columns["label"] == label].double().mean() for label in columns["label"].unique()]
        metrics["balanced"] = torch.stack(recalls).mean().item()
    return metrics


def confusion(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Counts images by label (rows) and predicted class (columns).

    Args:
        predicted, labels: (n,) int64.
        classes: number of classes.

    Returns:
        (classes, classes) int64.
    """
    return torch.bincount(labels * classes + predicted, minlength=classes * classes).view(classes, classes)


def largest_confusions(predicted: Tensor, labels: Tensor, most: int) -> list[tuple[int, int, int]]:
    """Returns the confusions with the most images: label, predicted class, number of images.

    Args:
        predicted, labels: (n,) int64.
        most: number of confusions.
    """
    # By the pairs that occur: a matrix of 21,000 classes would take 3.5 GB.
    wrong = torch.stack([labels, predicted], 1)[labels != predicted]
    pairs, counts = wrong.unique(dim=0, return_counts=True)
    # Stable: of equal counts the first classes come first, on every machine.
    places = counts.argsort(descending=True, stable=True)[:most]
    return [
        (label, other, count)
        for (label, other), count in zip(pairs[places].tolist(), counts[places].tolist(), strict=True)
    ]


def class_means(values: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Returns the mean of the values of each class's images, (classes,) float64; NaN for a class without images."""
    sums = torch.bincount(labels, values.double(), minlength=classes)
    return sums / torch.bincount(labels, minlength=classes)


def macro_f1(predicted: Tensor, labels: Tensor, classes: int) -> float:
    """Computes the mean F1 score over the classes that occur as label or prediction; one that is never right has 0.

    Args:
        predicted, labels: (n,) int64.
        classes: number of classes.
    """
    right = torch.bincount(labels[labels == predicted], minlength=classes).double()
    present = sum(torch.bincount(each, minlength=classes) for each in (labels, predicted))
    return (2 * right / present)[present > 0].mean().item()


def has_diverged(kl: float | None, classes: int) -> bool:
    """Returns whether a student is further from its teacher than knowing nothing could be.

    The KL divergence of a uniform guess from any teacher is at most log(classes); twice that is left to a student that
    has only begun.

    Args:
        kl: KL(teacher ‖ student) in nats, the mean over images; None where it is not known, or not finite.
        classes: number of classes.
    """
    return kl is not None and kl > 2 * math.log(max(classes, 2))


def constant_share(classes: Tensor) -> float:
    """Returns the share of images that the best constant prediction has right: that of the most frequent class.

    Args:
        classes: the right class of each image, (n,) int64.
    """
    return (torch.bincount(classes).max() / len(classes)).item()


def is_guess(share: float, constant: float, images: int) -> bool:
    """Returns whether a share of right images is within two standard deviations of that of a constant prediction.

    Args:
        share, constant: of the classifier and of `constant_share`, in [0, 1].
        images: number of images.
    """
    return share <= constant + 2 * math.sqrt(constant * (1 - constant) / images)


def alone_right(first: Tensor, second: Tensor) -> tuple[int, int]:
    """Counts the images that one of two predictions alone has right; both tell which they have right, (n,) bool."""
    return int((first & ~second).sum()), int((second & ~first).sum())


def is_clearly_better(gained: int, lost: int) -> bool:
    """Returns whether the first of two predictions is better by more than two standard deviations (McNemar's test).

    Args:
        gained, lost: as of `alone_right`: only these images tell the two apart.
    """
    return gained - lost > 2 * math.sqrt(gained + lost)
