"""Fits multinomial logistic regression with an L2 penalty on all weights but the bias, as scikit-learn's.

Where an image may have several classes, it is a binary one for each of them (scikit-learn's `OneVsRestClassifier`).

The minimum of Σ loss + ‖W‖² / 2C is found by L-BFGS, whose first guess of the curvature is that of features of this
covariance, so that the steps that it takes hardly depend on how the features are scaled or correlated. The product of
the features with a direction is computed once, and the length of a step found on it without touching them again.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCE = 1e-9
"""Nats of the mean loss that the next step may still gain, by the curvature that L-BFGS knows, at the end."""
MOST_STEPS = 1000
MEMORY = 10
"""Steps from which L-BFGS learns the curvature."""
ROWS = 8192
"""Images whose classes are computed at a time."""
SAMPLED = 8
"""Images for each feature, at most, from which the covariance is estimated: it only makes the steps fewer."""
FLAT = 0.1
"""Share of its first slope that the loss may have along a direction at the end of a step."""
DOUBLE = 2**20
"""Numbers up to which features are computed with in double precision."""


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation of features, each (d,) float64; the deviation is 1 for features that do not vary."""

    mean: Tensor
    std: Tensor

    def apply(self, features: Tensor) -> Tensor:
        """Returns features (n, d) with these subtracted and divided by, float64 if they are few, else float32."""
        # Rows at a time: in double precision all of them at once could take more memory than there is.
        kind = _precise(features.device) if features.numel() <= DOUBLE else torch.float32
        found = torch.empty(features.shape, dtype=kind, device=features.device)
        mean, std = (each.to(features.device, _precise(features.device)) for each in (self.mean, self.std))
        for rows in _blocks(len(features)):
            found[rows] = ((features[rows].to(mean.dtype) - mean) / std).to(kind)
        return found


def moments(features: Tensor, *, scale: bool) -> Moments:
    """Returns the mean of features (n, d), and their standard deviation if they are to be scaled, else ones."""
    mean = torch.zeros(features.shape[1], dtype=torch.float64)
    for rows in _blocks(len(features)):
        mean += features[rows].double().sum(0) / len(features)
    if not scale:
        return Moments(mean, torch.ones_like(mean))
    variance = torch.zeros_like(mean)
    for rows in _blocks(len(features)):
        variance += (features[rows].double() - mean).square().sum(0) / len(features)
    std = variance.sqrt()
    # What does not vary but by rounding would be blown up to noise.
    least = torch.finfo(features.dtype).eps * mean.abs() * 10
    return Moments(mean, torch.where(std > least, std, 1.0))


@dataclass(frozen=True)
class LinearHead:
    """A linear head: logits are features · weight + bias.

    Attributes:
        weight: (d, classes) float64.
        bias: (classes,) float64.
        steps: that it took to find them.
        converged: whether they are the minimum, up to rounding.
    """

    weight: Tensor
    bias: Tensor
    steps: int = 0
    converged: bool = True

    def __call__(self, features: Tensor) -> Tensor:
        """Returns the logits of features (n, d), (n, classes) float32."""
        return torch.addmm(self.bias.float(), features.float(), self.weight.float())

    def scaled(self, factor: float) -> "LinearHead":
        """Returns the head with logits that are larger by a factor."""
        return LinearHead(self.weight * factor, self.bias * factor, self.steps, self.converged)

    def unscaled(self, by: Moments) -> "LinearHead":
        """Returns the head with the same logits for features as they were before `by` was applied."""
        weight = self.weight / by.std[:, None]
        return LinearHead(weight, self.bias - by.mean @ weight, self.steps, self.converged)


def fit_logistic(
    features: Tensor, labels: Tensor, classes: int, strengths: Sequence[float], weights: Tensor | None = None
) -> Iterator[LinearHead]:
    """Fits a head for each strength, each beginning at the one before: give them from the strongest penalty on.

    Args:
        features: (n, d), of mean 0 (`Moments.apply`): the bias, which has no penalty, takes the place of any other.
        labels: (n,) int64; or (n, classes) in {0, 1}, where an image may have several classes.
        classes: number of classes; for two, of which an image has one, the penalty is that of a single row of weights,
            as in scikit-learn.
        strengths: C, the inverse of the penalty.
        weights: of the classes in the loss, (classes,); None for all 1. Of several classes an image, those of an
            image's own classes, beside the others' 1.
    """
    one_each = labels.ndim == 1
    problem = (_Problem if one_each else _ProblemOfSets)(features, labels, classes, weights)
    place = torch.zeros(features.shape[1] + 1, classes, dtype=_precise(features.device), device=features.device)
    for strength in strengths:
        # A single row w has the logits ±w/2, whose squares add up to half of its own.
        ridge = (2 if classes == 2 and one_each else 1) / (strength * len(features))
        place, steps, converged = _minimise(problem, place, ridge)
        yield LinearHead(place[:-1].double().cpu(), place[-1].double().cpu(), steps, converged)


class _Problem:
    """The mean loss of features and labels."""

    def __init__(self, features: Tensor, labels: Tensor, classes: int, weights: Tensor | None = None) -> None:
        self.features, self.classes = features, classes
        self.labels = labels.to(features.device)
        self.weights = None if weights is None else weights.to(features)
        few = features[:: max(1, len(features) // (SAMPLED * features.shape[1]))]
        self.covariance = (few.T @ few).to(_precise(features.device)) / len(few)

    def scores(self, place: Tensor) -> Tensor:
        """Returns features · weights + bias, (n, classes)."""
        place = place.to(self.features.dtype)
        # Classes first: the product of a few long rows takes half the time, or less, of that of a few columns.
        return (place[:-1].T.contiguous() @ self.features.T).T + place[-1]

    def residuals(self, scores: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yields p − y of some images at a time, (rows, classes): the slope of each one's loss in its scores."""
        for rows in _blocks(len(scores)):
            found = scores[rows].softmax(-1)
            own = self.labels[rows]
            found[torch.arange(len(found), device=found.device), own] -= 1
            yield rows, found if self.weights is None else found * self.weights[own][:, None]

    def gradient(self, scores: Tensor, place: Tensor, ridge: float) -> tuple[Tensor, float]:
        """Returns the gradient, (d + 1, classes), and the mean of p (1 − p)."""
        found, spread = torch.zeros_like(place), 0.0
        for rows, residuals in self.residuals(scores):
            found[:-1] += (residuals.T @ self.features[rows]).T.to(found.dtype)
            found[-1] += residuals.sum(0).to(found.dtype)
            # |p − y| (1 − |p − y|) is p (1 − p), whether y is 0 or 1.
            spread += float((residuals.abs() * (1 - residuals.abs()).clamp(min=0)).sum())
        found /= len(scores)
        found[:-1] += ridge * place[:-1]
        return found, max(spread / scores.numel(), 1e-6)

    def slope(self, scores: Tensor, moved: Tensor, length: float) -> float:
        """Returns the slope of the mean loss along a direction, whose product with the features is `moved`."""
        total = 0.0
        for rows, residuals in self.residuals(scores + length * moved):
            total += float((residuals * moved[rows]).sum(dtype=_precise(moved.device)))
        return total / len(scores)

    def preconditioner(self, spread: float, ridge: float) -> Callable[[Tensor], Tensor]:
        """Returns what multiplies a gradient by the inverse of the estimated curvature."""
        curvature = spread * self.covariance
        # A little more on the diagonal: it must be positive even where features are dependent.
        extra = ridge + 1e-10 * float(curvature.diagonal().mean()) + 1e-30
        curvature.diagonal().add_(extra)
        # The inverse itself: a product with it takes a tenth of the time of two triangular solutions.
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(curvature))

        def apply(gradient: Tensor) -> Tensor:
            return torch.cat([(gradient[:-1].T.contiguous() @ inverse).T, gradient[-1:] / spread])

        return apply


class _ProblemOfSets(_Problem):
    """The mean over images of the sum of the binary losses of all classes; labels are (n, classes) in {0, 1}."""

    def residuals(self, scores: Tensor) -> Iterator[tuple[slice, Tensor]]:
        for rows in _blocks(len(scores)):
            own = self.labels[rows].to(scores.dtype)
            found = scores[rows].sigmoid() - own
            yield rows, found if self.weights is None else found * (1 + own * (self.weights - 1))


def _minimise(problem: _Problem, place: Tensor, ridge: float) -> tuple[Tensor, int, bool]:
    """Returns the place of the minimum, the steps to it, and whether it was reached."""
    scores = problem.scores(place)
    gradient, spread = problem.gradient(scores, place, ridge)
    precondition, past = problem.preconditioner(spread, ridge), []
    for step in range(MOST_STEPS):
        direction = -_times_inverse_curvature(gradient, past, precondition)
        slope = float((gradient * direction).sum())
        if -slope <= TOLERANCE:
            return place, step, True
        moved = problem.scores(direction)
        length = _search(problem, scores, moved, slope, ridge, place, direction)
        place = place + length * direction
        scores += length * moved
        before, (gradient, _) = gradient, problem.gradient(scores, place, ridge)
        change, bend = length * direction, gradient - before
        if float((change * bend).sum()) <= 0:
            # Only rounding bends it upwards: this is as far as the arithmetic goes.
            return place, step + 1, True
        past = [*past[-MEMORY + 1 :], (change, bend)]
    return place, MOST_STEPS, False


def _search(
    problem: _Problem, scores: Tensor, moved: Tensor, slope: float, ridge: float, place: Tensor, direction: Tensor
) -> float:
    """Returns how far to go along a direction: where the loss, which is convex, is nearly flat.

    Args:
        slope: of the loss at the beginning, negative.
    """
    # Of the penalty, whose slope grows evenly.
    first = ridge * float((place[:-1] * direction[:-1]).sum())
    growth = ridge * float(direction[:-1].square().sum())
    low, high, length = (0.0, slope), None, 1.0
    for _ in range(50):
        found = problem.slope(scores, moved, length) + first + length * growth
        if abs(found) <= FLAT * -slope:
            break
        if found < 0:
            low = length, found
        else:
            high = length, found
        if high is None:
            length *= 4
            continue
        share = low[1] / (low[1] - high[1])
        length = low[0] + min(max(share, 0.1), 0.9) * (high[0] - low[0])
    return length


def _times_inverse_curvature(
    gradient: Tensor, past: list[tuple[Tensor, Tensor]], precondition: Callable[[Tensor], Tensor]
) -> Tensor:
    """Returns the gradient times the inverse curvature that L-BFGS has learnt (its two loops)."""
    rest, shares = gradient, []
    for change, bend in reversed(past):
        share = (change * rest).sum() / (change * bend).sum()
        rest = rest - share * bend
        shares.append(share)
    found = precondition(rest)
    if past:
        change, bend = past[-1]
        found *= (change * bend).sum() / (bend * precondition(bend)).sum()
    for (change, bend), share in zip(past, reversed(shares), strict=True):
        found = found + change * (share - (bend * found).sum() / (change * bend).sum())
    return found


def _blocks(count: int) -> Iterator[slice]:
    return (slice(start, start + ROWS) for start in range(0, count, ROWS))


def _precise(device: torch.device) -> torch.dtype:
    """Returns the most precise numbers that a device computes with."""
    return torch.float32 if device.type == "mps" else torch.float64
