"""Training on labels alone: the honest baseline, with the views and the loop of distillation."""

from typing import Any

from torch import Tensor

from funmatch.config import Train
from funmatch.data.batch import Batch
from funmatch.data.cache.open_cache import Cache
from funmatch.errors import InputError
from funmatch.ops.distances import cross_entropy, mix_labels
from funmatch.ops.mixing import mix_views
from funmatch.runtime import distributed
from funmatch.runtime.timing import timed
from funmatch.training.setup import TrainSetup, Trial, build_setup, open_data
from funmatch.training.teachers.loading import Modules
from funmatch.training.trainer import LossOf, run_training


def run(config: Train, given: Modules | None = None, trial: Trial | None = None) -> dict[str, Any]:
    """Teaches a network the labels, mixed as the views are, and returns the figures of the finished run.

    Args:
        given: modules from Python, by the names that stand for them.
        trial: what a search asks of the run, if it is part of one.
    """
    config.check()
    with distributed.process_group(config.device):
        lesson = build_train_setup(config, given, trial)
        return run_training(lesson, label_loss(lesson))


def build_train_setup(config: Train, given: Modules | None = None, trial: Trial | None = None) -> TrainSetup:
    """The run made ready."""
    cache = check_labels(config, open_data(config, trial))
    return build_setup("train", config, cache, classes=len(cache.classes), given=given, trial=trial)


def label_loss(lesson: TrainSetup) -> LossOf:
    """The loss of a batch on its labels, mixed as its views are."""
    config, classes = lesson.config, len(lesson.cache.classes)

    def loss_of(batch: Batch) -> Tensor:
        _, view = mix_views(batch.crops, (), batch.lam, batch.cutmix_boxes)
        labels = mix_labels(batch.labels, batch.own_weight, classes, config.label_smoothing)
        with timed("student"):
            said = lesson.student(view)
        return cross_entropy(said, labels).mean()

    return loss_of


def check_labels(config: Train, cache: Cache) -> Cache:
    """The images, if all that are learnt from have labels; else an `InputError`."""
    if not cache.splits["train"].labelled:
        labels = cache.splits["train"].labels(slice(None))
        missing = f"{int((labels < 0).sum()):,} of {len(labels):,} training images of {cache.name} have no labels"
        other = " (they are of other classes than --eval-data)" if config.eval_data else ""
        raise InputError(f"{missing}{other}; training on labels needs train/<class>/*.jpg, distilling needs none")
    return cache
