"""Measures how far probabilities can be trusted: calibration, proper scores, and temperature scaling."""

from dataclasses import dataclass

import torch
from torch import Tensor

ECE_BINS = 15
ROWS = 1024
"""Images whose probabilities are computed at a time, in float64: they then stay in the processor's cache."""
COLDEST, HOTTEST = 1e-3, 1e3
"""Bounds of a fitted temperature: without them it would be 0 where all images are right."""
NEWTON_STEPS = 60


def which_bin(confidence: Tensor, bins: int = ECE_BINS) -> Tensor:
    """Returns the bin of each confidence, (n,) int64: bins of equal width, closed on the right, the first also at 0.

    Guo et al., "On calibration of modern neural networks", 2017, equation 3. Other libraries put a confidence of
    exactly k / bins elsewhere: torchmetrics closes its bins on the left.
    """
    # float64 edges: in float32 confidences of exactly k/15 would fall to either side.
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=confidence.device)
    return torch.bucketize(confidence.double(), edges[1:-1])


def calibration_error(confidence: Tensor, correct: Tensor, bins: int = ECE_BINS) -> float:
    """Computes the expected calibration error: Σ over bins of |accuracy − confidence|, weighted by the bins' shares.

    Args:
        confidence: (n,) in [0, 1], the probability of the first class.
        correct: (n,) 0 or 1.
        bins: number of bins, as of `which_bin`.

    Returns:
        the error, in [0, 1].
    """
    # Sums instead of means in each bin: n · share · |accuracy − confidence| is the absolute value of their difference.
    gap = torch.zeros(bins, dtype=torch.float64, device=confidence.device)
    gap.index_add_(0, which_bin(confidence, bins), correct.double() - confidence.double())
    return (gap.abs().sum() / len(confidence)).item()


@dataclass(frozen=True)
class Bin:
    """A bin of a reliability diagram.

    Attributes:
        images: number of images in it.
        confidence, accuracy: their means, in [0, 1]; None without images.
    """

    images: int
    confidence: float | None
    accuracy: float | None


def reliability(confidence: Tensor, correct: Tensor, bins: int = ECE_BINS) -> list[Bin]:
    """Returns the bins of a reliability diagram; arguments as of `calibration_error`."""
    which = which_bin(confidence, bins)
    counts = torch.bincount(which, minlength=bins)
    sums = (torch.bincount(which, values.double(), minlength=bins) for values in (confidence, correct))
    means = ((each / counts).tolist() for each in sums)
    return [Bin(n, *(each if n else (None, None))) for n, *each in zip(counts.tolist(), *means, strict=True)]


def proper_scores(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> dict[str, Tensor]:
    """Computes negative log-likelihood, Brier score and confidence of each image.

    Args:
        logits: (n, classes), each row with a finite number; −∞ stands for a probability of 0.
        labels: (n,) int64.
        temperature: by which logits are divided.

    Returns:
        (n,) float64 each: `nll` in nats; `brier`, Σ over classes of (p − y)², in [0, 2] (Brier, 1950); `confidence`,
        the probability of the first class.
    """
    found: dict[str, list[Tensor]] = {"nll": [], "brier": [], "confidence": []}
    for rows, own in zip(logits.split(ROWS), labels.split(ROWS), strict=True):
        # float64: at 1,000 classes float32 would lose the sixth digit of the mean.
        logs = (rows.double() / temperature).log_softmax(-1)
        right = logs.gather(1, own[:, None])[:, 0]
        shares = logs.exp_()
        found["nll"].append(-right)
        # Σ (p − y)² = Σ p² − 2 p(label) + 1, which needs no second matrix.
        found["brier"].append(torch.linalg.vecdot(shares, shares) - 2 * right.exp() + 1)
        found["confidence"].append(shares.amax(-1))
    return {name: torch.cat(parts) if parts else torch.zeros(0).double() for name, parts in found.items()}


def entropy(logits: Tensor) -> Tensor:
    """Computes the entropy of each image's probabilities in nats, (n,) float64, of logits (n, classes)."""
    parts = [-torch.special.xlogy(p, p).sum(-1) for p in (rows.double().softmax(-1) for rows in logits.split(ROWS))]
    return torch.cat(parts) if parts else torch.zeros(0).double()


def fit_temperature(logits: Tensor, labels: Tensor, start: float = 1.0) -> float | None:
    """Fits the temperature of temperature scaling: that of the least mean negative log-likelihood (Guo et al., 2017).

    Newton's method on β = 1 / T, in which the likelihood is convex, so that there is one minimum and it is found from
    anywhere.

    Args:
        logits: (n, classes), finite or −∞.
        labels: (n,) int64.
        start: first guess; it changes only how long this takes.

    Returns:
        T between `COLDEST` and `HOTTEST`; None where it is undefined: no images, a label of probability 0, or logits
        that are equal in every row, which are the same at any temperature.
    """
    own = logits.gather(1, labels[:, None]) if len(logits) else logits
    if not len(logits) or not bool(own.isfinite().all()):
        return None
    low, high, beta = 1 / HOTTEST, 1 / COLDEST, 1 / start
    for _ in range(NEWTON_STEPS):
        slope, curvature = _slope_and_curvature(logits, labels, beta)
        if slope == 0 and curvature == 0:
            return None if _is_flat(logits) else 1 / beta
        # The minimum lies where the slope is 0: each slope halves the interval in which it may be.
        low, high = (beta, high) if slope < 0 else (low, beta)
        step = beta - slope / curvature if curvature > 0 else float("nan")
        # Far from the minimum a Newton step may leave the interval, or crawl; the middle, of logarithms, never does.
        following = step if low < step < high else (low * high) ** 0.5
        if abs(following - beta) <= 1e-10 * beta:
            return 1 / following
        beta = following
    return 1 / beta


def _is_flat(logits: Tensor) -> bool:
    return bool((logits == logits.amax(-1, keepdim=True)).all())


def _slope_and_curvature(logits: Tensor, labels: Tensor, beta: float) -> tuple[float, float]:
    """Computes both derivatives by β of the mean negative log-likelihood of β · logits."""
    slope = curvature = 0.0
    for rows, own in zip(logits.split(ROWS), labels.split(ROWS), strict=True):
        # From the largest logit: differences of logits around 1e4 would lose all digits in squares of the logits.
        wide = rows.double()
        shifted = wide - wide.amax(-1, keepdim=True)
        shares = (beta * shifted).softmax(-1)
        # A probability of 0 counts nothing, though 0 · −∞ is not a number.
        shifted.masked_fill_(shifted.isinf(), 0.0)
        mean = torch.linalg.vecdot(shares, shifted)
        slope += float((mean - shifted.gather(1, own[:, None])[:, 0]).sum())
        curvature += float((torch.linalg.vecdot(shares, shifted.square_()) - mean.square()).clamp_(min=0).sum())
    return slope / len(logits), curvature / len(logits)


def half_scaled(logits: Tensor, labels: Tensor, start: float = 1.0) -> Tensor | None:
    """Scales each half of some images by the temperature that was fitted on the other half (cross-fitting).

    Args:
        logits: (n, classes). labels: (n,) int64.

    Returns:
        (n, classes), or None where a temperature is undefined. `start` is as of `fit_temperature`.
    """
    # Alternating images: those of a class lie together, and each half then has some of every class.
    halves = [slice(0, None, 2), slice(1, None, 2)]
    one, other = (fit_temperature(logits[half], labels[half], start) for half in halves)
    if one is None or other is None:
        return None
    scaled = logits.clone()
    scaled[halves[0]] /= other
    scaled[halves[1]] /= one
    return scaled


COVERAGES = (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.25, 0.1)


@dataclass(frozen=True)
class Selective:
    """Accuracy when a classifier may abstain on the images that it is least confident of.

    Attributes:
        accuracy: by coverage, the share of images that it answers, for `COVERAGES`; of at least one image.
        aurc: area under the risk-coverage curve: the error rate's mean over all coverages, in [0, 1].
    """

    accuracy: dict[float, float]
    aurc: float


def selective(confidence: Tensor, correct: Tensor) -> Selective:
    """Computes selective accuracy (Geifman & El-Yaniv, 2017); arguments as of `calibration_error`, n at least 1.

    Images of equal confidence count as their mean, so that their order does not matter.
    """
    levels, group = confidence.double().unique(return_inverse=True)
    sizes = torch.bincount(group, minlength=len(levels))
    share = torch.bincount(group, correct.double(), minlength=len(levels)) / sizes
    # The most confident first; `levels` ascend.
    right = share.flip(0).repeat_interleave(sizes.flip(0)).cumsum(0)
    curve = right / torch.arange(1, len(right) + 1, dtype=torch.float64)
    places = {each: max(1, round(each * len(curve))) for each in COVERAGES}
    return Selective({each: curve[place - 1].item() for each, place in places.items()}, (1 - curve).mean().item())
