"""Sets up a run as its command does, but without a run folder: to describe it, to measure it, to take a step again."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from funmatch.config import Distill, Finetune, Train
from funmatch.training import distill, finetune, train
from funmatch.training.objective import Objective
from funmatch.training.setup import TrainSetup
from funmatch.training.student.build import Modules
from funmatch.training.teachers.loading import LoadedTeacher


def build(config: Train, modules: Modules | None = None) -> tuple[TrainSetup[Any], list[LoadedTeacher]]:
    """Opens the images, builds the student and loads the teachers of a run; training on labels has no teachers.

    Args:
        modules: modules from Python, by the names that stand for them.
    """
    # The kinds of runs before their base class: each of them is a `Train` too.
    if isinstance(config, Distill):
        cache, resolved, loaded = distill.open_inputs(config, modules)
        return distill.build_distill_setup(resolved, cache, loaded, modules, requested=config), loaded
    if isinstance(config, Finetune):
        return finetune.build_finetune_setup(config, modules), []
    return train.build_train_setup(config, modules), []


@contextmanager
def prepared(setup: TrainSetup[Any], loaded: list[LoadedTeacher]) -> Generator[tuple[TrainSetup[Any], Objective]]:
    """Freezes the teachers that `build` loaded; yields the setup and the objective of the run."""
    if not loaded:
        yield setup, train.label_objective(setup)
        return
    with distill.prepare(setup, loaded) as distillation:
        yield distillation.setup, distillation.objective
