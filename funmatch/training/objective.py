"""Says what a student is trained for: the loss of a batch, where batches come from, and who it is compared with."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from funmatch.data.batch import Batch
from funmatch.data.loader import Batches
from funmatch.models.ensemble import TeacherEnsemble
from funmatch.training.loop import Losses
from funmatch.training.run.state import TeacherLogits


@dataclass(frozen=True)
class Objective:
    """What a student is trained for. Training on labels has no teachers, and the last four are None.

    Attributes:
        loss: a batch to its mean losses, of which `loss` is minimised.
        batches: the training batches.
        ahead: what else is done to a batch in the threads that make views.
        logits: a batch to the student's and the teachers' logits, (n, classes) each.
        teachers: the frozen teachers.
        teacher_logits: theirs on the validation split; on the main process only.
    """

    loss: Callable[[Batch], Losses]
    batches: Batches
    ahead: Callable[[Batch], Batch] | None = None
    logits: Callable[[Batch], tuple[Tensor, Tensor]] | None = None
    teachers: TeacherEnsemble | None = None
    teacher_logits: TeacherLogits | None = None
