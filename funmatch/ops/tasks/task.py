"""The table of tasks: what logits and labels mean, and what a classifier is trained for and judged by."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

from torch import Tensor

from funmatch.config.choices import TaskName
from funmatch.ops import distances, metrics
from funmatch.ops.tasks import multiclass, multilabel

Measures = dict[str, float | None]


class Distance(Protocol):
    """`distances.distance`, or another with its arguments."""

    def __call__(
        self,
        name: str,
        student_logits: Tensor,
        teacher_logits: Tensor,
        temperature: float = 1.0,
        *,
        squared: bool = True,
        smoothing: float = 0.0,
    ) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Task:
    """A row of the table.

    Attributes:
        name: as `--task` takes it.
        of_model: says of a model what its outputs are, for messages.
        score: the metric by which students are compared where there are labels.
        shown: that metric's name, for people.
        probabilities: maps logits (n, classes) to probabilities.
        mix_labels: mixes the labels of a batch as its views are mixed, to targets (n, classes).
        label_loss: maps logits and targets to a loss an image, (n,).
        balanced_weights: maps the labels of all training images and the number of classes to a weight for each class.
        weighted_loss: maps logits, targets, the labels and λ that they were mixed from, and these weights to a loss an
            image, (n,).
        distance: computes the distance of a name between student and teacher, one an image, (n,).
        divergence: maps logits, and the reference's, to the KL divergence of each image in nats, (n,).
        decisions: maps logits to what is predicted: the first class of each image, or whether each class is.
        changes: maps logits, the reference's and a KL in nats to the decisions that changed, of each image, (n,): the
            share whose alternatives are not tied, the share of those that are, and the largest margin between them.
        mean_probabilities: combines several teachers' logits by their probabilities at a temperature.
        mean_over_views: combines the logits of an image's views by their probabilities.
        join_classes: maps the logits of several classes to that of one which stands for them.
        accuracy: maps logits and labels to the metric `score`.
        compare: maps logits and the teacher's to `agreement` and `kl` of each image, (n,).
        measure: maps logits, labels and the teacher's logits, where there are any, to the metrics of a split.
        loss_terms: maps the number of classes to the number of terms that a loss is the mean of.
        outcomes: maps the number of classes to that of a probability distribution's outcomes.
    """

    name: TaskName
    of_model: str
    score: str
    shown: str
    probabilities: Callable[[Tensor], Tensor]
    mix_labels: Callable[[Tensor, float | Tensor, int, float], Tensor]
    label_loss: Callable[[Tensor, Tensor], Tensor]
    balanced_weights: Callable[[Tensor, int], Tensor]
    weighted_loss: Callable[[Tensor, Tensor, Tensor, float | Tensor, Tensor], Tensor]
    distance: Distance
    divergence: Callable[[Tensor, Tensor], Tensor]
    decisions: Callable[[Tensor], Tensor]
    changes: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor]]
    mean_probabilities: Callable[[Sequence[Tensor], Sequence[float], float], Tensor]
    mean_over_views: Callable[[Tensor], Tensor]
    join_classes: Callable[[Tensor], Tensor]
    accuracy: Callable[[Tensor, Tensor], float | None]
    compare: Callable[[Tensor, Tensor], dict[str, Tensor]]
    measure: Callable[[Tensor, Tensor | None, Tensor | None], Measures]
    loss_terms: Callable[[int], int]
    outcomes: Callable[[int], int]


MULTICLASS = Task(
    name="multiclass", of_model="one class an image", score="top1", shown="top-1",
    probabilities=lambda logits: logits.softmax(-1),
    mix_labels=distances.mix_labels,
    label_loss=distances.cross_entropy,
    balanced_weights=distances.balanced_weights,
    weighted_loss=multiclass.weighted_cross_entropy,
    distance=distances.distance,
    divergence=distances.kl,
    decisions=lambda logits: logits.argmax(-1),
    changes=multiclass.changes,
    mean_probabilities=multiclass.mean_probabilities,
    mean_over_views=multiclass.mean_over_views,
    join_classes=multiclass.join_classes,
    accuracy=multiclass.accuracy,
    compare=lambda logits, teacher: metrics.per_image(logits, None, teacher),
    measure=multiclass.measure,
    loss_terms=lambda classes: 1,  # noqa: ARG005
    outcomes=lambda classes: classes,
)  # fmt: skip
MULTILABEL = Task(
    name="multilabel", of_model="any number of classes an image", score="map", shown="mAP",
    probabilities=lambda logits: logits.sigmoid(),
    mix_labels=multilabel.mix_labels,
    label_loss=multilabel.cross_entropy,
    balanced_weights=multilabel.balanced_weights,
    # Of a class's own term, whose target is mixed already.
    weighted_loss=lambda logits, targets, labels, lam, weights: multilabel.weighted_cross_entropy(  # noqa: ARG005
        logits, targets, weights
    ),
    distance=multilabel.distance,
    divergence=multilabel.kl,
    decisions=multilabel.decisions,
    changes=multilabel.changes,
    mean_probabilities=multilabel.mean_probabilities,
    mean_over_views=multilabel.mean_over_views,
    join_classes=multilabel.join_classes,
    accuracy=multilabel.accuracy,
    compare=multilabel.compare,
    measure=multilabel.measure,
    loss_terms=lambda classes: classes,
    # Of each class by itself: it is there or not.
    outcomes=lambda classes: 2,  # noqa: ARG005
)  # fmt: skip
TASKS: Mapping[str, Task] = MappingProxyType({each.name: each for each in (MULTICLASS, MULTILABEL)})


def task_of_metrics(metrics: Mapping[str, Any]) -> Task:
    """Returns the task that the metrics of a split are of: only those of several classes an image hold `map`."""
    return MULTILABEL if MULTILABEL.score in metrics else MULTICLASS


def task_of(name: str | None) -> Task:
    """Returns the task of a name; one class an image where nothing says another."""
    return TASKS[name or MULTICLASS.name]
