"""Computes how well scores rank the images that have a class: average precision, F1, and what chance gives."""

import torch
from torch import Tensor

CLASSES_AT_ONCE = 64
"""Classes that are sorted at a time: 50,000 images of 1,000 classes would need gigabytes in double precision."""
DRAWS = 20
"""Random rankings by which chance is measured."""


def average_precisions(scores: Tensor, targets: Tensor) -> Tensor:
    """Computes each class's average precision, Σ (Rₖ − Rₖ₋₁) · Pₖ over the distinct scores, from the highest.

    Rₖ and Pₖ are recall and precision of the images whose score is at least the k-th. Images of equal scores count as
    one step, so that their order does not matter; nothing is interpolated. It is scikit-learn's definition.

    Args:
        scores: (n, classes), of which only the order within each class matters.
        targets: (n, classes), 1 for an image that has the class, else 0.

    Returns:
        (classes,) float64 in [0, 1]; NaN for a class that no image has.
    """
    parts = zip(scores.split(CLASSES_AT_ONCE, 1), targets.split(CLASSES_AT_ONCE, 1), strict=True)
    return torch.cat([_average_precisions(*part) for part in parts])


def _average_precisions(scores: Tensor, targets: Tensor) -> Tensor:
    ranked, order = scores.sort(dim=0, descending=True)
    hits = targets.gather(0, order).double()
    places = torch.arange(len(scores)).unsqueeze(1)
    precision = hits.cumsum(0) / (places + 1)
    # An image counts with the precision behind the last one of its score.
    is_last = torch.ones_like(ranked, dtype=torch.bool)
    is_last[:-1] = ranked[:-1] != ranked[1:]
    last = torch.where(is_last, places, len(scores)).flip(0).cummin(0).values.flip(0)
    return (hits * precision.gather(0, last)).sum(0) / hits.sum(0)


def mean_average_precision(scores: Tensor, targets: Tensor) -> float | None:
    """Computes the mean of `average_precisions` over the classes that some image has; None where no image has any."""
    each = average_precisions(scores, targets)
    present = each[~each.isnan()]
    return present.mean().item() if len(present) else None


def random_precision(targets: Tensor, seed: int = 0) -> tuple[float, float]:
    """Measures the mean average precision of random rankings, which is a little above the classes' mean share.

    The images keep their labels together, so that classes that occur with each other are not taken for independent.

    Args:
        targets: (n, classes) in {0, 1}; some image has a class.

    Returns:
        its mean and its standard deviation over `DRAWS` rankings.
    """
    generator = torch.Generator().manual_seed(seed)
    present = targets[:, targets.sum(0) > 0]
    places = torch.arange(1, len(present) + 1, dtype=torch.float64).unsqueeze(1)
    found = []
    for _ in range(DRAWS):
        drawn = present[torch.randperm(len(present), generator=generator)]
        each = [
            (part * part.double().cumsum(0) / places).sum(0) / part.sum(0) for part in drawn.split(CLASSES_AT_ONCE, 1)
        ]
        found.append(torch.cat(each).mean())
    means = torch.stack(found)
    return means.mean().item(), means.std().item()


def f1_scores(decisions: Tensor, targets: Tensor) -> tuple[float, float | None]:
    """Computes the F1 score of all decisions together, and the mean of the classes' own.

    Args:
        decisions: (n, classes) bool, whether the class is predicted.
        targets: (n, classes) in {0, 1}.

    Returns:
        2 · hits / (predicted + labelled) over all images and classes (micro), 0 where nothing is predicted or labelled;
        and its mean over the classes that some image has (macro), None where no image has any.
    """
    hits = (decisions * targets).sum(0).double()
    counts = decisions.sum(0).double() + targets.sum(0).double()
    micro = (2 * hits.sum() / counts.sum().clamp(min=1)).item()
    present = targets.sum(0) > 0
    each = 2 * hits[present] / counts[present]
    return micro, each.mean().item() if len(each) else None


def best_threshold(probabilities: Tensor, targets: Tensor) -> tuple[float, float]:
    """Finds the probability from which on classes are to be predicted for the highest F1 score of all decisions.

    Args:
        probabilities: (n, classes).
        targets: (n, classes) in {0, 1}; some image has a class.

    Returns:
        the threshold, the same for all classes, and the F1 score (micro) with it.
    """
    ranked, order = probabilities.flatten().sort(descending=True)
    hits = targets.flatten()[order].double().cumsum(0)
    predicted = torch.arange(1, len(ranked) + 1, dtype=torch.float64)
    scores = 2 * hits / (predicted + hits[-1])
    # Only behind the last of equal probabilities, which no threshold separates.
    scores[:-1][ranked[:-1] == ranked[1:]] = -1
    best = int(scores.argmax())
    return ranked[best].item(), scores[best].item()
