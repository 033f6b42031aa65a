"""Computes intervals and significance tests for the metrics of one classifier, or of two on the same images."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Z95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""
RESAMPLES = 2000
"""Bootstrap samples: the ends of a 95 % interval are then known to a few percent of its width."""
DRAWS = 4_000_000
"""Indices that are drawn at a time, 32 MB."""


def wilson(share: float, count: int, z: float = Z95) -> tuple[float, float] | None:
    """Computes Wilson's score interval of a share (Wilson, 1927).

    Unlike the normal approximation it stays in [0, 1], and has a width at 0 and 1.

    Args:
        share: in [0, 1].
        count: images that it is of.
        z: quantile; the default gives 95 %.

    Returns:
        lower and upper bound, None without images.
    """
    if not count:
        return None
    square = z * z / count
    middle = (share + square / 2) / (1 + square)
    half = z / (1 + square) * math.sqrt(share * (1 - share) / count + square / (4 * count))
    # At 0 and 1 the bounds are exact; rounding would leave 1e-17.
    return (0.0 if share <= 0 else max(0.0, middle - half)), (1.0 if share >= 1 else min(1.0, middle + half))


def paired_difference(gained: int, lost: int, count: int, z: float = Z95) -> tuple[float, float]:
    """Computes the interval of the difference of two accuracies on the same images (Agresti and Min, 2005).

    Half an image is added to each of the four cases, so that the interval has a width where both are right alike.

    Args:
        gained, lost: images that the first, and the second, alone has right.
        count: images; at least 1.
        z: quantile; the default gives 95 %.

    Returns:
        lower and upper bound of the first's accuracy less the second's, in [−1, 1].
    """
    total = count + 2
    mean = (gained - lost) / total
    half = z * math.sqrt((gained + lost + 1) / total - mean**2) / math.sqrt(total)
    return max(-1.0, mean - half), min(1.0, mean + half)


def mcnemar(gained: int, lost: int) -> float:
    """Computes the p value of McNemar's test: that two classifiers are equally often right alone.

    Args:
        gained, lost: images that the first, and the second, alone has right.

    Returns:
        the exact two-sided binomial probability, for any number of images; 1 where there are none.
    """
    total, fewer = gained + lost, min(gained, lost)
    if gained == lost:
        return 1.0
    # By logarithms, since 2^total is beyond any float from a thousand images on.
    logs = [math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) for k in range(fewer + 1)]
    largest = max(logs)
    tail = math.fsum(math.exp(each - largest) for each in logs)
    return min(1.0, 2 * tail * math.exp(largest - total * math.log(2)))


@dataclass(frozen=True)
class Difference:
    """A mean difference between two classifiers on the same images.

    Attributes:
        mean: the first's mean less the second's.
        low, high: its 95 % interval.
    """

    mean: float
    low: float
    high: float


def paired_bootstrap(
    columns: Mapping[str, Tensor], *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Difference]:
    """Computes bootstrap intervals of mean differences: images are drawn again with replacement (Efron, 1979).

    Args:
        columns: differences of each image, (n,) each, by name; n at least 1.
        resamples: number of samples.
        seed: of the draws. All columns are of the same draws.

    Returns:
        the differences by name, with percentile intervals.
    """
    values = torch.stack([column.double() for column in columns.values()], 1)
    count = len(values)
    generator = torch.Generator().manual_seed(seed)
    means = []
    # In chunks: 50,000 images drawn 2,000 times are 800 MB of indices.
    most = max(1, DRAWS // count)
    for start in range(0, resamples, most):
        shape = min(most, resamples - start), count
        drawn = torch.randint(count, shape, generator=generator, dtype=torch.int32)
        means.append(torch.stack([_times_drawn(sample, count) for sample in drawn]) @ values / count)
    bounds = torch.cat(means).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    rows = zip(columns, values.mean(0).tolist(), *bounds.tolist(), strict=True)
    return {name: Difference(*numbers) for name, *numbers in rows}


def _times_drawn(sample: Tensor, count: int) -> Tensor:
    """Returns how often each image is in a sample, (count,) float64."""
    return torch.bincount(sample, minlength=count).double()
