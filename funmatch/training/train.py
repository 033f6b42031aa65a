"""Training on labels alone: the honest baseline, with the views and the loop of distillation."""

from typing import Any

from torch import Tensor

from funmatch.config import Train
from funmatch.data.batch import Batch
from funmatch.data.cache.open_cache import Cache
from funmatch.errors import InputError
from funmatch.ops.distances import cross_entropy, mixed_labels
from funmatch.ops.mixing import seen
from funmatch.runtime import distributed
from funmatch.runtime.timing import span
from funmatch.training.setup import Lesson, Trial, open_data, prepare
from funmatch.training.teachers.loading import Modules
from funmatch.training.trainer import LossOf, carry_out


def run(config: Train, given: Modules | None = None, trial: Trial | None = None) -> dict[str, Any]:
    """Teaches a network the labels, mixed as the views are, and returns the figures of the finished run.

    Args:
        given: modules from Python, by the names that stand for them.
        trial: what a search asks of the run, if it is part of one.
    """
    config.check()
    with distributed.joined(config.device):
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
