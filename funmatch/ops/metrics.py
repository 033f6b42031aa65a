"""How good and how faithful a classifier is: figures of each image, then their summary."""

import torch
from torch import Tensor

from funmatch.ops.distances import kl

ECE_BINS = 15
METRICS = ("top1", "top5", "agreement", "agreement5", "kl", "ece", "balanced")


def per_image(logits: Tensor, labels: Tensor | None = None, teacher_logits: Tensor | None = None) -> dict[str, Tensor]:
    """What each image contributes to `summary`.

    Args:
        logits: (n, classes).
        labels: (n,) int64, or None where there are none.
        teacher_logits: (n, classes), or None where there is no teacher.

    Returns:
        columns of (n,) float32: `confidence`; with labels `label`, `top1` and `top5`; with a teacher `agreement` and
        `agreement5` (is the teacher's first class the student's first, or one of its first five?) and `kl`
        (KL(teacher ‖ student) at T = 1, in nats).
    """
    logits = logits.float()
    ranked = logits.topk(min(5, logits.shape[-1]), dim=-1).indices
    columns = {"confidence": logits.softmax(-1).amax(-1)}
    if labels is not None:
        hits = (ranked == labels[:, None]).float()
        columns |= {"label": labels.float(), "top1": hits[:, 0], "top5": hits.sum(-1)}
    if teacher_logits is not None:
        agrees = (ranked == teacher_logits.argmax(-1, keepdim=True)).float()
        columns |= {"agreement": agrees[:, 0], "agreement5": agrees.sum(-1), "kl": kl(logits, teacher_logits)}
    return columns


def summarize(columns: dict[str, Tensor]) -> dict[str, float | None]:
    """The figures of a split, each None where it could not be known.

    Returns:
        `top1`, `top5`, `agreement`, `agreement5` in [0, 1]; `kl` in nats; `ece` in [0, 1] (`calibration_error`); and
        `balanced`, the mean over classes of the share of their images that are right, which a constant
        answer cannot lift above 1 / classes however uneven the classes are.
    """
    figures: dict[str, float | None] = dict.fromkeys(METRICS)
    for name in ("top1", "top5", "agreement", "agreement5", "kl"):
        if name in columns:
            figures[name] = columns[name].double().mean().item()
    if "top1" in columns:
        figures["ece"] = calibration_error(columns["confidence"], columns["top1"])
        recalls = [columns["top1"][columns["label"] == label].double().mean() for label in columns["label"].unique()]
        figures["balanced"] = torch.stack(recalls).mean().item()
    return figures


def calibration_error(confidence: Tensor, correct: Tensor, bins: int = ECE_BINS) -> float:
    """Expected calibration error: Σ over bins of |accuracy − confidence|, weighted by the bin's share.

    Bins of equal width, closed on the right (Guo et al., "On calibration of modern neural networks", 2017, eq. 3).

    Args:
        confidence: of the first class, (n,) in [0, 1].
        correct: (n,) 0 or 1.
    """
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=confidence.device)
    which = torch.bucketize(confidence.double(), edges[1:-1])
    gap = torch.zeros(bins, dtype=torch.float64, device=confidence.device)
    gap.index_add_(0, which, correct.double() - confidence.double())
    return (gap.abs().sum() / len(confidence)).item()
