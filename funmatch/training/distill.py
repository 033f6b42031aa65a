"""Function matching: trains a student to be the same function as its teachers, from images alone."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from funmatch.config import Distill
from funmatch.config.choices import STRATEGIES
from funmatch.data.cache.open_cache import Cache
from funmatch.data.loader import Batch
from funmatch.errors import InputError
from funmatch.models.ensemble import TeacherEnsemble
from funmatch.ops.distances import standardize_logits
from funmatch.ops.tasks.task import task_of
from funmatch.runtime import distributed, env
from funmatch.runtime.timing import timed
from funmatch.training import trainer
from funmatch.training.loop import Losses
from funmatch.training.matching import wiring
from funmatch.training.matching.losses import FeatureMatching
from funmatch.training.objective import Objective, TeacherLogits
from funmatch.training.setup import Trial, build_setup, finished_result, open_data
from funmatch.training.student.build import Modules
from funmatch.training.teachers import checks, loading, prepared, readings, recording
from funmatch.training.teachers.prepared import DistillSetup, Prepared
from funmatch.training.teachers.source import (
    DistillLoader,
    Fixed,
    Live,
    Shared,
    SharedCache,
    Taped,
    TeacherSource,
    views_by_side,
)
from funmatch.training.teachers.tape import fold_dropped_classes


def run(config: Distill, given: Modules | None = None, trial: Trial | None = None) -> dict[str, Any]:
    """Distils a student and returns the metrics of the finished run.

    Args:
        given: modules from Python, by the names that stand for them.
        trial: the search that the run is part of, if any.
    """
    check_processes(config)
    with distributed.process_group(config.device, config.hang_timeout):
        cache, resolved, loaded = open_inputs(config, given, trial)
        setup = build_distill_setup(resolved, cache, loaded, given, trial, requested=config)
        if result := finished_result(setup):
            return result
        with prepare(setup, loaded) as distillation:
            return trainer.run_training(distillation.setup, distillation.objective)


def check_processes(config: Distill) -> None:
    """Raises `InputError` where several processes would each compare a part of a batch with itself."""
    if env.world_size() > 1 and config.coupled:
        raise InputError(
            f"{config.coupled[0]} compares the images of a batch with each other, so one process must see all"
        )


@dataclass(frozen=True)
class Distillation:
    """A distillation that is ready to begin.

    Attributes:
        setup: the run.
        teachers: the frozen teachers.
        table: a fixed teacher's logits of each training image, (images, classes); None for other teachers.
        source: where the teachers' logits of a batch come from.
        batches: the training batches, with these logits where a tape or the table holds them.
        teacher_logits: the teachers' on the validation split; None on all processes but the main one.
        matching: what is matched besides logits, or None. All logits of teachers are then rows of answers.
    """

    setup: DistillSetup
    teachers: TeacherEnsemble
    table: Tensor | None
    source: TeacherSource
    batches: DistillLoader
    teacher_logits: TeacherLogits | None
    matching: FeatureMatching | None = None

    @property
    def prepared(self) -> Prepared:
        """The run with its teachers, as another student's distillation takes them."""
        return Prepared(self.setup, self.teachers, self.table, self.teacher_logits)

    def loss(self, batch: Batch) -> Losses:
        """Computes the losses of a batch: teacher and student see the same views, and the student matches the teacher.

        Returns:
            scalars: `loss`, and its parts `distance`, and `label_loss` where labels have a weight; `features` and
            `tokens` where these are matched.
        """
        student, teacher = self.logits(batch, record=True)
        if self.matching is None:
            return distillation_loss(student, teacher, batch, self.setup.config)
        return self.matching.losses(
            student, teacher, batch, lambda own, target: distillation_loss(own, target, batch, self.setup.config)
        )

    def logits(self, batch: Batch, *, record: bool = False) -> tuple[Tensor, Tensor]:
        """Computes the student's and the teachers' logits of a batch, (n, classes) each, or rows of their answers."""
        # Recorded for training only: the views scored at the end are those of steps beyond the run's tape.
        teacher_views, student_view = views_by_side(batch, self.setup.loader.teacher_sides)
        with timed("student"):
            student_logits = self.setup.student.classifier.answers(student_view)
        if batch.teacher_logits is not None:
            return student_logits, batch.teacher_logits
        return student_logits, self.source.logits(batch, teacher_views, record=record)

    def add_teacher_logits(self, batch: Batch) -> Batch:
        """Returns the batch with the teachers' logits, computed ahead in the threads that prepare batches."""
        if batch.teacher_logits is not None:
            return batch
        device = self.setup.loop.device
        # Pinned once for both copies: this one, and that of the loop, which would wait for pageable memory.
        batch = batch.pin_memory(device)
        teacher_views, _ = views_by_side(batch.to(device), self.setup.loader.teacher_sides)
        return replace(batch, teacher_logits=self.source.logits(batch, teacher_views))

    def teacher_answers(self, step: int) -> Tensor:
        """Returns the teachers' logits of the whole batch of a step, or rows of their answers; records nothing."""
        batch = self.batches.unsharded().batch_at(step).to(self.setup.loop.device)
        if batch.teacher_logits is not None:
            return batch.teacher_logits
        return self.source.logits(batch, views_by_side(batch, self.setup.loader.teacher_sides)[0], record=False)

    @property
    def objective(self) -> Objective:
        """The losses, batches and teachers, as the trainer takes them."""
        ahead = self.add_teacher_logits if self.setup.config.teacher_ahead else None
        return Objective(self.loss, self.batches, ahead, self.logits, self.teachers, self.teacher_logits, self.matching)


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


def open_inputs(
    config: Distill, given: Modules | None = None, trial: Trial | None = None
) -> tuple[Cache, Distill, list[loading.LoadedTeacher]]:
    """Opens the images of a run, with the options that say what was held out of them, and loads its teachers."""
    cache, config = open_data(config, trial)
    # One process first: it downloads the weights, and the others find them on the disk.
    loaded = distributed.main_process_first(lambda: loading.load_teachers(config, cache, config.side, given or {}))
    return cache, config, loaded


def build_distill_setup(
    config: Distill,
    cache: Cache,
    loaded: list[loading.LoadedTeacher],
    given: Modules | None = None,
    trial: Trial | None = None,
    requested: Distill | None = None,
) -> DistillSetup:
    """Builds the run, except for its teachers, which `prepare` freezes.

    Args:
        loaded: the teachers; replaced where their file can be read in two ways, and the other one is clearly better.
    """
    requested = requested or config
    cache, config = checks.fit_to_teachers(cache, loaded, config)
    if config.label_weight and not cache.splits["train"].labelled:
        raise InputError(
            f"label_weight ({config.label_weight}) needs labels, but some training images of {cache.name} have none"
        )
    setup = build_setup(
        "distill", config, cache, num_classes=loaded[0].num_classes if config.matches_logits else 0, given=given,
        requested=requested, trial=trial, prepare=wiring.Preparation(loaded) if config.matches_features else None,
    )  # fmt: skip
    sides = tuple(teacher.side or setup.evaluation.view.side for teacher in loaded)
    # Recorded, so that whatever reads the run's options reads the same teacher.
    kwargs = readings.settle(loaded, setup)
    config = setup.config.model_copy(update={"teacher_side": sides, "teacher_kwargs": kwargs})
    # Fixed teachers see their own views, once for all, so batches bring none.
    shown = () if STRATEGIES[config.strategy].fixed else tuple(sorted(set(sides)))
    setup = replace(
        setup,
        inputs=replace(setup.inputs, config=config),
        loader=replace(setup.loader, teacher_sides=shown),
        class_names=loading.wanted_classes(config, setup.cache),
    )
    return setup.with_provenance(**loading.provenance(loaded), rounded=recording.rounding(config))


@contextmanager
def prepare(
    setup: DistillSetup,
    loaded: list[loading.LoadedTeacher],
    other: Distillation | None = None,
    shared: tuple[SharedCache, SharedCache] | None = None,
) -> Generator[Distillation]:
    """Freezes and checks the teachers, and opens the tape where there is one.

    Args:
        loaded: the teachers; the list is emptied once they are frozen, since the plain ones need not be kept.
        other: the distillation of another student, whose teachers and views are used again.
        shared: caches of batches and of logits for students that are trained side by side.
    """
    ready = prepared.reuse_teachers(other.prepared, setup) if other else prepared.freeze_teachers(setup, loaded)
    setup, teachers, table = ready.setup, ready.teachers, ready.table
    loaded.clear()
    batches, logits_cache = shared or (None, None)
    source: TeacherSource = Live(teachers, setup.config.temperature) if table is None else Fixed(table)
    if logits_cache and table is None:
        source = Shared(source, logits_cache)
    # The tape outermost: what it replays need not be computed for any of the students.
    with recording.open_tape(setup, teachers) as tape:
        if tape:
            source = Taped(tape, source, setup.config.tape_full)
        loader = DistillLoader(setup.loader, source, batches)
        matching = wiring.matching_of(setup, teachers)
        distillation = Distillation(setup, teachers, table, source, loader, ready.teacher_logits, matching)
        if matching:
            wiring.fit_statistics(matching, setup.config.batch, distillation.teacher_answers)
        yield distillation
        source.flush()
