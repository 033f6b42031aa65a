"""Trains on labels alone: the baseline of distillation, with the same views and the same loop."""

from typing import Any

import numpy as np

from funmatch.config import Train
from funmatch.data.cache.open_cache import Cache
from funmatch.data.loader import Batch
from funmatch.data.readers.class_notes import first_of
from funmatch.errors import InputError
from funmatch.ops.mixing import mix_views
from funmatch.ops.tasks.task import task_of
from funmatch.runtime import distributed
from funmatch.runtime.timing import timed
from funmatch.training.loop import Losses
from funmatch.training.objective import Objective
from funmatch.training.setup import TrainSetup, Trial, build_setup, finished_result, open_data
from funmatch.training.student.build import Modules
from funmatch.training.trainer import run_training


def run(config: Train, given: Modules | None = None, trial: Trial | None = None) -> dict[str, Any]:
    """Trains a network on labels, mixed as the views are, and returns the metrics of the finished run.

    Args:
        given: modules from Python, by the names that stand for them.
        trial: the search that the run is part of, if any.
    """
    with distributed.process_group(config.device, config.hang_timeout):
        return run_on_labels(build_train_setup(config, given, trial))


def run_on_labels(setup: TrainSetup[Any]) -> dict[str, Any]:
    """Trains on labels to the end, unless the run is finished; returns its metrics."""
    # A finished run returns its result at once, so that a repeated command costs nothing.
    return finished_result(setup) or run_training(setup, label_objective(setup))


def build_train_setup(config: Train, given: Modules | None = None, trial: Trial | None = None) -> TrainSetup[Train]:
    """Builds the run, and checks that its images have labels."""
    cache, resolved = open_data(config, trial)
    check_labels(resolved, cache)
    classes = len(cache.classes)
    return build_setup("train", resolved, cache, num_classes=classes, given=given, requested=config, trial=trial)


def label_objective(setup: TrainSetup[Any]) -> Objective:
    """Returns the objective: the task's cross-entropy with labels that are mixed as their views are."""
    config, student, num_classes = setup.config, setup.student.classifier, len(setup.cache.classes)
    task, class_weights = task_of(config.task), None
    if config.class_weights == "balanced":
        labels = setup.cache.splits["train"].labels(slice(None))
        class_weights = task.balanced_weights(labels, num_classes).to(setup.loop.device)

    def loss(batch: Batch) -> Losses:
        _, view = mix_views(batch.crops, (), batch.lam, batch.cutmix_boxes)
        # Mixed by the area that CutMix really kept, not by the λ that was drawn.
        labels = task.mix_labels(batch.labels, batch.own_weight, num_classes, config.label_smoothing)
        with timed("student"):
            logits = student(view)
        if class_weights is None:
            each = task.label_loss(logits, labels)
        else:
            each = task.weighted_loss(logits, labels, batch.labels, batch.own_weight, class_weights)
        # Over the images, not over their weights: pieces of a batch and processes then add up to the same gradient.
        return {"loss": each.mean()}

    return Objective(loss, setup.loader)


def check_labels(config: Train, cache: Cache) -> Cache:
    """Returns the images, or raises `InputError` if some training images have no labels, or all have the same."""
    # Before the student is built: the check costs nothing.
    train = cache.splits["train"]
    if not train.labelled:
        count = int((train.index["label"] < 0).sum())
        missing = f"{count:,} of {len(train):,} training images of {cache.name} have no labels"
        # Labels were dropped when the data was opened, so the cause is named here.
        other = " (its classes are not those of --eval-data)" if config.eval_data else ""
        raise InputError(
            f"{missing}{other}; training on labels needs train/<class>/*.jpg, distillation needs no labels"
        )
    # Any network is right about all of them at once, which would look like a perfect one.
    counts = train.class_counts(len(cache.classes))
    if not ((counts > 0) & (counts < len(train))).any():
        names = [cache.classes[label] for label in np.flatnonzero(counts)]
        same = f"are of one class, {names[0]}" if len(names) == 1 else f"have the classes {first_of(names)}"
        raise InputError(
            f"all {len(train):,} training images of {cache.name} {same}; "
            "training on labels needs at least two classes, each of some images alone"
        )
    return cache
