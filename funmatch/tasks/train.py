"""Training on labels alone: the honest baseline, with the views and the loop of distillation."""

from typing import Any

from torch import Tensor

from funmatch import devices
from funmatch.config import Train
from funmatch.data.cache import Cache
from funmatch.data.loader import Batch
from funmatch.distances import cross_entropy, mixed_labels
from funmatch.errors import InputError
from funmatch.spans import span
from funmatch.tasks.lesson import Lesson, Trial, open_data, prepare
from funmatch.tasks.teachers import Modules
from funmatch.tasks.walk import LossOf, carry_out
from funmatch.views import seen


def run(config: Train, given: Modules | None = None, trial: Trial | None = None) -> dict[str, Any]:
    """Teaches a network the labels, mixed as the views are, and returns the figures of the finished run.

    Args:
        given: modules from Python, by the names that stand for them.
        trial: what a search asks of the run, if it is part of one.
    """
    config.check()
    with devices.joined(config.device):
        lesson = lesson_of(config, given, trial)
        return carry_out(lesson, label_loss(lesson))


def lesson_of(config: Train, given: Modules | None = None, trial: Trial | None = None) -> Lesson:
    """The run made ready."""
    cache = labelled(config, open_data(config, trial))
    return prepare("train", config, cache, classes=len(cache.classes), given=given, trial=trial)


def label_loss(lesson: Lesson) -> LossOf:
    """The loss of a batch on its labels, mixed as its views are."""
    config, classes = lesson.config, len(lesson.cache.classes)

    def loss_of(batch: Batch) -> Tensor:
        _, view = seen(batch.crops, (), batch.lam, batch.cuts)
        labels = mixed_labels(batch.labels, batch.own_share, classes, config.label_smoothing)
        with span("student"):
            said = lesson.student(view)
        return cross_entropy(said, labels).mean()

    return loss_of


def labelled(config: Train, cache: Cache) -> Cache:
    """The pictures, if all that are learnt from have labels; else an `InputError`."""
    if not cache.splits["train"].labelled:
        labels = cache.splits["train"].labels(slice(None))
        missing = f"{int((labels < 0).sum()):,} of {len(labels):,} training pictures of {cache.name} have no labels"
        other = " (they are of other classes than --eval-data)" if config.eval_data else ""
        raise InputError(f"{missing}{other}; training on labels needs train/<class>/*.jpg, distilling needs none")
    return cache
