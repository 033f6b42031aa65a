"""Computes the means of classes, and the linear head that tells which is nearest."""

import torch
from torch import Tensor

from funmatch.ops.heads.logistic import LinearHead


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
