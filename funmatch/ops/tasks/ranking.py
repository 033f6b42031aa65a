"""Computes how well scores rank the images that have a class: average precision, F1, and what chance gives."""

from collections.abc import Sequence

import torch
from torch import Tensor

CLASSES_AT_ONCE = 64
"""Classes that are sorted at a time: 50,000 images of 1,000 classes would need gigabytes in double precision."""
DRAWS = 20
"""Random rankings by which chance is measured."""
RESAMPLES = 2000
"""Bootstrap samples of an interval, as many as `WORK` allows, but at least `LEAST_RESAMPLES`."""
LEAST_RESAMPLES = 200
WORK = 1_000_000_000
"""Scores that are counted for an interval: seconds on one core."""
MOST_SCORES = 20_000_000
"""Scores up to which there is an interval; of more, their orders take gigabytes."""


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
    _, hits, last = _rank(scores, targets)
    precision = hits.cumsum(0) / torch.arange(1, len(scores) + 1).unsqueeze(1)
    return (hits * precision.gather(0, last)).sum(0) / hits.sum(0)


def _rank(scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ranks the images of each class by their scores, the highest first.

    Returns:
        the images in this order, whether they have the class, float64, and the last place of each one's score, (n,
        classes) each.
    """
    ranked, order = scores.sort(dim=0, descending=True)
    hits = targets.gather(0, order).double()
    places = torch.arange(len(scores)).unsqueeze(1)
    # An image counts with the precision behind the last one of its score.
    is_last = torch.ones_like(ranked, dtype=torch.bool)
    is_last[:-1] = ranked[:-1] != ranked[1:]
    return order, hits, torch.where(is_last, places, len(scores)).flip(0).cummin(0).values.flip(0)


def _repeated(ranked: tuple[Tensor, Tensor, Tensor], times: Tensor) -> Tensor:
    """Computes average precisions of images of which each counts so many times, (n,) float64."""
    order, hits, last = ranked
    drawn = times[order]
    found = drawn * hits
    # In front of the first image that is drawn there is none, and nothing to count.
    precision = found.cumsum(0) / drawn.cumsum(0).clamp(min=1)
    return (found * precision.gather(0, last)).sum(0) / found.sum(0)


def precision_interval(scores: Tensor, targets: Tensor, seed: int = 0) -> tuple[float, float] | None:
    """Computes the 95 % bootstrap interval of `mean_average_precision`: images are drawn again with replacement.

    Args:
        scores: (n, classes).
        targets: (n, classes) in {0, 1}.
        seed: of the draws.

    Returns:
        the percentiles 2.5 and 97.5; None where no image has a class, or there are more than `MOST_SCORES`.
    """
    found = _resampled([scores], targets, seed)
    return None if found is None else _percentiles(found[:, 0])


def difference_interval(scores: Tensor, other: Tensor, targets: Tensor, seed: int = 0) -> tuple[float, float] | None:
    """Computes the 95 % bootstrap interval of the difference of two models' mean average precisions on the same images.

    Args:
        scores, other: (n, classes) each.
        targets, seed: as of `precision_interval`.

    Returns:
        percentiles of the first's less the other's; None as of `precision_interval`.
    """
    found = _resampled([scores, other], targets, seed)
    return None if found is None else _percentiles(found[:, 0] - found[:, 1])


def _resampled(models: Sequence[Tensor], targets: Tensor, seed: int) -> Tensor | None:
    """Computes mean average precisions of several models on images that are drawn again, (resamples, models)."""
    present = targets.sum(0) > 0
    targets = targets[:, present]
    if not targets.numel() or targets.numel() > MOST_SCORES:
        return None
    parts, count = [], len(targets)
    for scores in models:
        pairs = zip(scores[:, present].split(CLASSES_AT_ONCE, 1), targets.split(CLASSES_AT_ONCE, 1), strict=True)
        parts.append([_rank(*pair) for pair in pairs])
    generator = torch.Generator().manual_seed(seed)
    means = []
    for _ in range(min(RESAMPLES, max(LEAST_RESAMPLES, WORK // targets.numel()))):
        drawn = torch.randint(count, (count,), generator=generator)
        times = torch.bincount(drawn, minlength=count).double()
        # A class that no drawn image has is left out, as classes without images are.
        means.append(torch.stack([torch.cat([_repeated(part, times) for part in each]).nanmean() for each in parts]))
    return torch.stack(means)


def _percentiles(values: Tensor) -> tuple[float, float]:
    # Where no drawn image has any class there is no mean.
    low, high = values.nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


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
