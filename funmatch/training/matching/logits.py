"""Computes the loss of logits: the distance of the student's from the teachers', and a share of labels."""

from torch import Tensor

from funmatch.config import Distill
from funmatch.data.loader import Batch
from funmatch.ops.distances import standardize_logits
from funmatch.ops.tasks.task import task_of
from funmatch.training.loop import Losses
from funmatch.training.teachers.tape import fold_dropped_classes


def distillation_loss(student: Tensor, teacher: Tensor, batch: Batch, config: Distill) -> Losses:
    """Computes (1 − w) · distance + w · cross-entropy on labels, the mean over a batch; w is the label weight.

    Args:
        student, teacher: logits, (n, classes); the teacher's of all teachers combined.

    Returns:
        scalars: `loss`, `distance`, and `label_loss` where w > 0.
    """
    logits, target, task = student, teacher, task_of(config.task)
    if config.tape_top is not None:
        # A tape reads back the classes that it dropped as equally likely; folded into one, that is not distilled.
        logits, target = fold_dropped_classes(student, teacher, config.tape_top, config.temperature)
    if config.standardise:
        logits, target = standardize_logits(student), standardize_logits(teacher)
    per_image = task.distance(
        config.distance, logits, target, config.temperature, squared=config.t_squared, smoothing=config.label_smoothing
    )
    if not config.label_weight:  # images may have no labels then
        loss = per_image.mean()
        return {"loss": loss, "distance": loss.detach()}
    labels = task.mix_labels(batch.labels, batch.own_weight, student.shape[-1], config.label_smoothing)
    label_loss = task.label_loss(student, labels)
    loss = (1 - config.label_weight) * per_image + config.label_weight * label_loss
    return {"loss": loss.mean(), "distance": per_image.detach().mean(), "label_loss": label_loss.detach().mean()}
