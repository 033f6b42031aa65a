"""Defines what a student is trained for: the loss of a batch, the batches, and the teachers to compare with."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from funmatch.data.loader import Batch, Batches
from funmatch.models.ensemble import TeacherEnsemble
from funmatch.training.loop import Losses
from funmatch.training.matching.losses import FeatureMatching


@dataclass(frozen=True)
class TeacherLogits:
    """The teachers' logits of the validation split, (n, classes): combined, and of each member.

    Where features are matched, [logits | pooled features].
    """

    combined: Tensor
    members: list[Tensor]


@dataclass(frozen=True)
class Objective:
    """The objective of a run. Training on labels has no teachers, and the last five attributes are None.

    Attributes:
        loss: maps a batch to its mean losses, of which `loss` is minimised.
        batches: the training batches.
        ahead: applied to each batch in the threads that prepare batches.
        logits: maps a batch to the student's and the teachers' logits, (n, classes) each, or rows of their answers.
        teachers: the frozen teachers.
        teacher_logits: the teachers' logits of the validation split; on the main process only.
        matching: what is matched besides logits.
    """

    # Fields and not a subclass of the trainer: training on labels, fine-tuning and distilling share one loop.
    loss: Callable[[Batch], Losses]
    batches: Batches
    ahead: Callable[[Batch], Batch] | None = None
    logits: Callable[[Batch], tuple[Tensor, Tensor]] | None = None
    teachers: TeacherEnsemble | None = None
    teacher_logits: TeacherLogits | None = None
    matching: FeatureMatching | None = None
