"""Compares what a frozen network computes in an inference mode with plain fp32: by its logits, and by its features.

The promise is about the views that are compared: a mean KL of `MAX_KL` at most, and the same first class on
`MIN_AGREEMENT` of them. What it says of others is a matter of their number n: where no first class changed, no more
than 3 / n of all change, with a confidence of 95 % (1.2 % for 256 views, 9 % for 32); and a mode that changes 0.1 % of
them is refused by chance in 3 of 100 cases, with 256 views as with 32. More of what differs shows with more views: of
modes that change 2 %, 52 of 100 pass 32 views, and 4 of 100 pass 256.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from funmatch.models.inference.modes import InferenceMode
from funmatch.ops.tasks.task import MULTICLASS, Task

MAX_KL = 1e-3
"""Largest mean KL divergence from the plain teacher, in nats, at which a mode counts as equal. Two classes are tied if
so small a KL is enough to swap them: which of them comes first is a matter of rounding."""
MIN_AGREEMENT = 0.995
"""Least fraction of images on which both have the same first class."""
MAX_ERROR, MIN_COSINE = 0.03, 0.999
"""Largest mean relative error of features, and least cosine of an image's, at which a mode counts as equal: about
what bf16 costs a deep network that passes by its logits."""
FP32_KL, FP32_ERROR = 1e-6, 1e-3
"""Largest KL and error of features that fp32's own rounding causes."""
NUMBERS_SHAPE = {
    "images": int, "kl": float, "agreement": float, "error": float | None, "cosine": float | None, "has_logits": bool,
    "tied": float, "margin": float, "kl_deviation": float, "error_deviation": float,
}  # fmt: skip
"""Shape of `ParityCheck.numbers`."""
DEVIATIONS = 3.0
"""Standard deviations from a limit beyond which chance does not explain the distance."""


@dataclass(frozen=True)
class Differences:
    """How far a mode's outputs are from those of plain fp32, view by view: (n,) float64 each.

    Attributes:
        kl: KL(plain ‖ mode), nats; 0 where no logits are compared.
        changed: share of a view's decisions that are other ones; 0 or 1 of one class an image.
        tied: share of them that changed between classes which are tied.
        margin: the largest distance, in the plain teacher's probability, between two classes that changed places.
        error, cosine: of features; None where none are compared.
        has_logits: whether logits are compared.
    """

    kl: Tensor
    changed: Tensor
    tied: Tensor
    margin: Tensor
    error: Tensor | None = None
    cosine: Tensor | None = None
    has_logits: bool = True

    def joined(self, other: "Differences | None") -> "Differences":
        """Returns these and the other views' differences."""
        if other is None:
            return self
        names = ("kl", "changed", "tied", "margin", "error", "cosine")
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in names}
        return replace(self, **{name: torch.cat(pair) for name, pair in pairs.items() if pair[0] is not None})

    def check(self, mode: InferenceMode) -> "ParityCheck":
        """Returns what these differences say about a mode."""
        kl, kl_deviation = _mean(self.kl)
        found = ParityCheck(
            # Rounding may leave a KL of zero slightly negative.
            mode, len(self.kl), max(0.0, kl), 1 - self.changed.mean().item(), has_logits=self.has_logits,
            tied=self.tied.mean().item(), margin=self.margin.max().item(), kl_deviation=kl_deviation,
        )  # fmt: skip
        if self.error is None or self.cosine is None:
            return found
        error, error_deviation = _mean(self.error)
        return replace(found, error=error, cosine=self.cosine.min().item(), error_deviation=error_deviation)


@dataclass(frozen=True)
class ParityCheck:
    """How far a mode's outputs are from those of plain fp32.

    Attributes:
        mode: the mode that was tried.
        images: number of images compared.
        kl: mean of KL(plain ‖ mode) over the images, nats; 0 where no logits are compared.
        agreement: fraction of images with the same first class, or one that is tied with it; of several classes an
            image, of decisions.
        failed: why the mode could not be computed, or None.
        error: of features, the mean over the images of ‖mode − plain‖ / ‖plain‖; None where none are compared.
        cosine: of features, the least over the images of their cosine.
        has_logits: whether logits were compared.
        tied: fraction of images on which the first class is another one that is tied with it.
        margin: largest difference between the plain teacher's probabilities of two classes that changed places.
        kl_deviation, error_deviation: standard deviations of the means `kl` and `error`.
    """

    mode: InferenceMode
    images: int
    kl: float
    agreement: float
    failed: str | None = None
    error: float | None = None
    cosine: float | None = None
    has_logits: bool = True
    tied: float = 0.0
    margin: float = 0.0
    kl_deviation: float = 0.0
    error_deviation: float = 0.0

    @property
    def good(self) -> bool:
        """Whether the mode counts as equal to plain fp32."""
        close = self.error is None or self.cosine is None or (self.error <= MAX_ERROR and self.cosine >= MIN_COSINE)
        return not self.failed and self.kl <= MAX_KL and self.agreement >= MIN_AGREEMENT and close

    @property
    def hopeless(self) -> bool:
        """Whether it differs by so much that chance does not explain it, and more images would only confirm it."""
        limit = 1 - MIN_AGREEMENT
        # Of n images a mode at the limit changes limit · n, with the standard deviation of a Poisson distribution.
        changes_many = 1 - self.agreement > limit + DEVIATIONS * math.sqrt(limit / self.images)
        differs = self.kl - DEVIATIONS * self.kl_deviation > MAX_KL
        error = (self.error or 0.0) - DEVIATIONS * self.error_deviation > MAX_ERROR
        turned = self.cosine is not None and self.cosine < MIN_COSINE  # the least of more images is no larger
        return bool(self.failed) or changes_many or differs or error or turned

    @property
    def near_limit(self) -> bool:
        """Whether chance may explain that the mode is equal, or that it is not: more images may decide otherwise."""
        close = abs(self.kl - MAX_KL) <= DEVIATIONS * self.kl_deviation
        close_error = self.error is not None and abs(self.error - MAX_ERROR) <= DEVIATIONS * self.error_deviation
        return not self.hopeless and (self.agreement < 1 or close or close_error)

    @property
    def is_rounding_of_fp32(self) -> bool:
        """Whether it computes in fp32 and differs no more than that rounds: a few images show it."""
        close = self.kl <= FP32_KL and self.agreement == 1 and (self.error or 0.0) <= FP32_ERROR
        return self.mode.precision == "fp32" and close and self.good

    def __str__(self) -> str:
        changed = 1 - self.agreement + self.tied
        # Ties too: how near to each other the classes are tells what a disagreement weighs.
        detail = f" ({100 * changed:.1f} % changed, at margins up to {self.margin:.3f})" if changed > 0 else ""
        logits = f"KL {self.kl:.1e}, agreement {100 * self.agreement:.1f} %{detail}" if self.has_logits else ""
        features = (
            "" if self.error is None else f"error of features {self.error:.1e}, cosine at least {self.cosine:.4f}"
        )
        compared = ", ".join(filter(None, (logits, features)))
        return f"{self.mode}: {self.failed or f'{compared} on {self.images} images'}"

    @property
    def numbers(self) -> dict[str, Any]:
        """All but the mode and a failure, as JSON has it: with the mode, these give an equal check."""
        return {name: value for name, value in vars(self).items() if name not in ("mode", "failed")}

    @property
    def record(self) -> dict[str, float | None]:
        """What a run records of it: `kl` and `agreement`, None without logits; `tied` and `margin`; `error`, `cosine`.

        `tied` and `margin` where a first class changed, `error` and `cosine` where features are compared.
        """
        logits = (self.kl, self.agreement) if self.has_logits else (None, None)
        found: dict[str, float | None] = dict(zip(("kl", "agreement"), logits, strict=True))
        if self.margin:
            found |= {"tied": self.tied, "margin": self.margin}
        return found if self.error is None else found | {"error": self.error, "cosine": self.cosine}


def compare(rows: Tensor, reference: Tensor, classes: int | None = None, task: Task = MULTICLASS) -> Differences:
    """Compares answers with the plain teacher's, (n, width) each.

    Args:
        classes: how many of their numbers are logits, in front; the others are features. None: all are.
        task: what logits mean.
    """
    classes = rows.shape[-1] if classes is None else classes
    # A teacher that gives NaN does so in any mode; the check of its accuracy reports it.
    rows = torch.where(reference.isfinite().all(-1, keepdim=True), rows, 0.0)
    reference = torch.where(reference.isfinite().all(-1, keepdim=True), reference, 0.0)
    nothing = torch.zeros(len(rows), dtype=torch.float64)
    found = Differences(nothing, nothing, nothing, nothing, has_logits=classes > 0)
    if classes:
        logits, expected = rows[:, :classes], reference[:, :classes]
        changed, tied, margin = (each.double().cpu() for each in task.changes(logits, expected, MAX_KL))
        found = replace(found, kl=_or_infinite(task.divergence(logits, expected)), changed=changed, tied=tied)
        found = replace(found, margin=margin)
    if classes < rows.shape[-1]:
        error, cosine = _compare_features(rows[:, classes:], reference[:, classes:])
        found = replace(found, error=error, cosine=cosine)
    return found


def check_parity(
    mode: InferenceMode, rows: Tensor, reference: Tensor, classes: int | None = None, task: Task = MULTICLASS
) -> ParityCheck:
    """Compares a mode's answers with the plain teacher's; arguments as of `compare`."""
    return compare(rows, reference, classes, task).check(mode)


def _compare_features(features: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the relative error of each image, and the cosine, (n,) each."""
    one, other = features.double(), reference.double()
    # Features of zeros have neither size nor direction; equal ones count as equal.
    error = (one - other).norm(dim=-1) / other.norm(dim=-1).clamp(min=1e-12)
    cosine = torch.cosine_similarity(one, other, dim=-1).where(error > 0, torch.ones_like(error))
    finite = features.isfinite().all(-1)
    return _or_infinite(error), cosine.where(finite, -torch.ones_like(cosine)).cpu()


def _or_infinite(differences: Tensor) -> Tensor:
    """Returns differences as float64 on the CPU, infinite where they are not a number, as those of an overflow are."""
    return differences.double().cpu().nan_to_num(nan=torch.inf, posinf=torch.inf)


def _mean(values: Tensor) -> tuple[float, float]:
    """Returns the mean of values, (n,), and its standard deviation; 0 for that of one value, or of infinite ones."""
    mean = values.mean().item()
    if len(values) < 2 or not math.isfinite(mean):
        return mean, 0.0
    return mean, values.std().item() / math.sqrt(len(values))
