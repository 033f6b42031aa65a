"""Computes the means of classes, and the linear head that tells which is nearest."""

import torch
import torch.nn.functional as F
from torch import Tensor

from funmatch.ops.heads.logistic import LinearHead

ROWS = 8192
"""Images whose features are added up at a time."""
STEEPEST = 1e4
"""Bound of a slope, and of its inverse, for similarities of deviation 1."""
HALVINGS = 60


def class_means(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Returns the mean of each class's features, (classes, d) float64, of features (n, d) and labels (n,) int64."""
    sums = torch.zeros(classes, features.shape[1], dtype=torch.float64).index_add_(0, labels, features.double())
    return sums / torch.bincount(labels, minlength=classes).clamp(min=1)[:, None]


def nearest_mean(features: Tensor, labels: Tensor, classes: int) -> LinearHead:
    """Returns the head whose logits are −‖x − mean‖² / 2, but for a number that all classes of an image share."""
    means = class_means(features, labels, classes)
    # From the centre of all, so that the products are of the size of the differences.
    center = means.mean(0)
    means = means - center
    weight = means.T.contiguous()
    return LinearHead(weight, -means.square().sum(-1) / 2 - center @ weight)


def means_of_sets(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the mean features of the images with a class, and of those without it.

    Args:
        features: (n, d).
        labels: (n, classes) in {0, 1}.

    Returns:
        (classes, d) float64 each. Both are the mean of all images for a class that none of them has, or all of them:
        nothing is nearer to one than to the other.
    """
    total = torch.zeros(features.shape[1], dtype=torch.float64)
    sums = torch.zeros(labels.shape[1], features.shape[1], dtype=torch.float64)
    for rows, own in zip(features.split(ROWS), labels.split(ROWS), strict=True):
        total += rows.double().sum(0)
        sums += own.double().T @ rows.double()
    counts = labels.sum(0, dtype=torch.float64)[:, None]
    others = len(features) - counts
    mean, is_fixed = total / len(features), (counts == 0) | (others == 0)
    return (
        torch.where(is_fixed, mean, sums / counts.clamp(min=1)),
        torch.where(is_fixed, mean, (total - sums) / others.clamp(min=1)),
    )


def nearer_mean(features: Tensor, labels: Tensor) -> LinearHead:
    """Returns the head whose logits are (‖x − mean of the others‖² − ‖x − mean of the class‖²) / 2, class by class.

    Args:
        features: (n, d).
        labels: (n, classes) in {0, 1}.
    """
    own, others = means_of_sets(features, labels)
    weight = (own - others).T.contiguous()
    # The plane between two means goes through the middle of them.
    return LinearHead(weight, -(weight * (own + others).T).sum(0) / 2)


def prior_log_odds(labels: Tensor) -> Tensor:
    """Returns the log-odds of each class's share of the images, (classes,) float64, of labels (n, classes) in {0, 1}.

    Half an image is added to either side, which keeps them finite for classes of none or all.
    """
    counts = labels.sum(0, dtype=torch.float64)
    return ((counts + 0.5) / (len(labels) - counts + 0.5)).log()


def fit_slope(similarity: Tensor, prior: Tensor, labels: Tensor) -> float:
    """Fits the β of the least log loss of the probabilities σ(β · similarity + prior).

    One more case, of usual size, counts as wrong: without it there would be no such β where all decisions are right.

    Args:
        similarity: (n, classes), positive where the class is more likely than its share.
        prior: (classes,) log-odds.
        labels: (n, classes) in {0, 1}.

    Returns:
        β > 0; 1 where all similarities are 0.
    """
    size = similarity.double().square().mean().sqrt()
    if not size > 0:
        return 1.0
    cases, targets = similarity.double() / size, labels.double()
    usual = cases.abs().median()
    low, high = 1 / STEEPEST, STEEPEST
    # The loss is convex in β, so its slope rises: halve the interval in which it is 0, on the scale of logarithms.
    for _ in range(HALVINGS):
        middle = (low * high) ** 0.5
        slope = (cases * ((middle * cases + prior).sigmoid() - targets)).sum() + usual * (middle * usual).sigmoid()
        low, high = (middle, high) if slope < 0 else (low, middle)
    return ((low * high) ** 0.5) / size.item()


def directions(features: Tensor, labels: Tensor) -> Tensor:
    """Returns for each class its images' mean direction minus that of all others, (classes, d) float32.

    The product with a feature of length 1 is the difference of its two cosines.

    Args:
        features: (n, d).
        labels: (n, classes) in {0, 1}.
    """
    # Of directions: otherwise the images with the longest features would decide.
    own, others = means_of_sets(F.normalize(features, dim=-1), labels)
    return (F.normalize(own, dim=-1) - F.normalize(others, dim=-1)).float()
