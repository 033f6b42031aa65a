"""Computes the losses of features: distances of pooled features and of tokens, weighted, of each teacher."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from funmatch.config import Distill
from funmatch.config.teachers.matching import RELATIONAL
from funmatch.data.loader import Batch
from funmatch.models.inference.answers import Layout, Parts
from funmatch.ops.features import losses
from funmatch.training.loop import Losses
from funmatch.training.matching.memory import Memory

DISTANCES = {"cosine": losses.cosine, "l2": losses.l2}


@dataclass(frozen=True)
class FeatureMatching:
    """What a student matches besides, or instead of, its teachers' logits.

    Attributes:
        config: the options.
        layout: of the rows of answers, the student's and the teachers'.
        shares: weight of each teacher; they sum to 1.
        memory: what is kept of earlier batches.
        standardised: whether the teachers' features are standardised.
    """

    config: Distill
    layout: Layout
    shares: tuple[float, ...]
    memory: Memory
    standardised: bool

    def losses(
        self, student: Tensor, teacher: Tensor, batch: Batch, of_logits: Callable[[Tensor, Tensor], Losses]
    ) -> Losses:
        """Computes the losses of a batch.

        Args:
            student, teacher: rows of answers, (n, width).
            of_logits: computes the losses of logits.

        Returns:
            scalars: `loss`, the weighted sum; `features` and `tokens` without their weights; those of logits.
        """
        weights = self.config.weight_of
        # In fp32: similarities at a low temperature would be coarse in sixteen bits.
        with torch.autocast(student.device.type, enabled=False):
            own, target = self.layout.split(student), self.targets(self.layout.split(teacher))
            parts = {"features": self.features(own.pooled, target.pooled, batch)}
            if target.tokens:
                parts["tokens"] = self.tokens(own.tokens, target.tokens)
            total = torch.stack([weights[name] * each for name, each in parts.items()]).sum()
            found: dict[str, Tensor] = {name: each.detach() for name, each in parts.items()}
        if self.layout.classes:
            logits = of_logits(own.logits, target.logits)
            total = total + weights["logits"] * logits["loss"]
            found = {**{name: each for name, each in logits.items() if name != "loss"}, **found}
        return {"loss": total, **found}

    def targets(self, parts: Parts) -> Parts:
        """Returns the teachers' answers as the student is to match them."""
        return self.memory.standardize(parts) if self.standardised else parts

    def features(self, student: Sequence[Tensor], teacher: Sequence[Tensor], batch: Batch) -> Tensor:
        """Computes the weighted distance of pooled features, the mean over a batch; adds the batch to the queue."""
        queues: Sequence[Tensor | None] = [None] * len(teacher)
        if len(self.memory.queue):
            # Before it is read: what a gradient needs must not change between the forward and the backward pass.
            self.memory.push(batch.step, batch.first_row, [*teacher])
            queues = self.memory.earlier(batch.step)
        each = [
            share * self._distance(name, own, target, queue) * weight
            for own, target, queue, share in zip(student, teacher, queues, self.shares, strict=True)
            for name, weight in self.config.feature_losses.items()
        ]
        return torch.stack(each).sum(0).mean()

    def _distance(self, name: str, student: Tensor, teacher: Tensor, queue: Tensor | None) -> Tensor:
        if queue is not None and name == "queue-kl":
            return losses.queue_kl(student, teacher, queue, self.config.feature_temperature)
        if name == "batch-kl":
            return losses.batch_kl(student, teacher, self.config.feature_temperature)
        return DISTANCES[name](student, teacher)

    def tokens(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Computes the weighted distance of tokens, the mean over a batch."""
        weights = {name: weight for name, weight in self.config.feature_losses.items() if name not in RELATIONAL}
        each = [
            share * weight * DISTANCES[name](own, target)
            for own, target, share in zip(student, teacher, self.shares, strict=True)
            for name, weight in weights.items()
        ]
        return torch.stack(each).sum(0).mean()
