"""Compares what a frozen network computes in an inference mode with plain fp32: by its logits, and by its features."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from funmatch.models.inference.modes import InferenceMode
from funmatch.ops.tasks.task import MULTICLASS, Task

MAX_KL = 1e-3
"""Largest mean KL divergence from the plain teacher, in nats, at which a mode counts as equal."""
MIN_AGREEMENT = 0.995
"""Least fraction of images on which both have the same first class."""
# By Pinsker's inequality a KL of MAX_KL moves a probability by at most this. Two classes that are nearer to each other
# are tied: which of them comes first is a matter of rounding.
TIE_MARGIN = (MAX_KL / 2) ** 0.5
MAX_ERROR, MIN_COSINE = 0.03, 0.999
"""Largest mean relative error of features, and least cosine of an image's, at which a mode counts as equal: about
what bf16 costs a deep network that passes by its logits."""


@dataclass(frozen=True)
class ParityCheck:
    """How far a mode's outputs are from those of plain fp32.

    Attributes:
        mode: the mode that was tried.
        images: number of images compared.
        kl: mean of KL(plain ‖ mode) over the images, nats; 0 where no logits are compared.
        agreement: fraction of images with the same first class, or one that is tied with it (`TIE_MARGIN`); of several
            classes an image, of decisions.
        failed: why the mode could not be computed, or None.
        error: of features, the mean over the images of ‖mode − plain‖ / ‖plain‖; None where none are compared.
        cosine: of features, the least over the images of their cosine.
        has_logits: whether logits were compared.
    """

    mode: InferenceMode
    images: int
    kl: float
    agreement: float
    failed: str | None = None
    error: float | None = None
    cosine: float | None = None
    has_logits: bool = True

    @property
    def good(self) -> bool:
        """Whether the mode counts as equal to plain fp32."""
        close = self.error is None or self.cosine is None or (self.error <= MAX_ERROR and self.cosine >= MIN_COSINE)
        return not self.failed and self.kl <= MAX_KL and self.agreement >= MIN_AGREEMENT and close

    def __str__(self) -> str:
        logits = f"KL {self.kl:.1e}, agreement {100 * self.agreement:.1f} %" if self.has_logits else ""
        features = (
            "" if self.error is None else f"error of features {self.error:.1e}, cosine at least {self.cosine:.4f}"
        )
        compared = ", ".join(filter(None, (logits, features)))
        return f"{self.mode}: {self.failed or f'{compared} on {self.images} images'}"

    @property
    def record(self) -> dict[str, float | None]:
        """What a run records of it: `kl` and `agreement` None without logits; `error` and `cosine` of features."""
        logits = (self.kl, self.agreement) if self.has_logits else (None, None)
        found: dict[str, float | None] = dict(zip(("kl", "agreement"), logits, strict=True))
        return found if self.error is None else found | {"error": self.error, "cosine": self.cosine}


def check_parity(
    mode: InferenceMode, rows: Tensor, reference: Tensor, classes: int | None = None, task: Task = MULTICLASS
) -> ParityCheck:
    """Compares a mode's answers with the plain teacher's, (n, width) each.

    Args:
        classes: how many of their numbers are logits, in front; the others are features. None: all are.
        task: what logits mean.
    """
    # A teacher that gives NaN does so in any mode; the check of its accuracy reports it.
    if not reference.isfinite().all():
        return ParityCheck(mode, len(reference), 0.0, 1.0)
    classes = rows.shape[-1] if classes is None else classes
    found = ParityCheck(mode, len(reference), 0.0, 1.0, has_logits=classes > 0)
    if classes:
        divergence, agreement = _compare_logits(rows[:, :classes], reference[:, :classes], task)
        found = replace(found, kl=divergence, agreement=agreement)
    if classes < rows.shape[-1]:
        error, cosine = _compare_features(rows[:, classes:], reference[:, classes:])
        found = replace(found, error=error, cosine=cosine)
    return found


def _compare_logits(logits: Tensor, reference: Tensor, task: Task) -> tuple[float, float]:
    """Returns the mean KL divergence and the agreement."""
    # Rounding may leave a KL of zero slightly negative.
    divergence = max(0.0, task.divergence(logits, reference).mean().item()) if logits.isfinite().all() else float("inf")
    return divergence, task.agreement(logits, reference, TIE_MARGIN)


def _compare_features(features: Tensor, reference: Tensor) -> tuple[float, float]:
    """Returns the mean relative error and the least cosine."""
    if not features.isfinite().all():
        return float("inf"), -1.0
    one, other = features.double(), reference.double()
    # Features of zeros have neither size nor direction; equal ones count as equal.
    error = (one - other).norm(dim=-1) / other.norm(dim=-1).clamp(min=1e-12)
    cosine = torch.cosine_similarity(one, other, dim=-1).where(error > 0, torch.ones_like(error))
    return error.mean().item(), cosine.min().item()
