"""Function matching: trains a student to be the same function as its teachers, from images alone."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from funmatch.config import Distill
from funmatch.config.choices import STRATEGIES, find_distance
from funmatch.data.cache.open_cache import Cache
from funmatch.data.loader import Batch
from funmatch.errors import InputError
from funmatch.models.ensemble import TeacherEnsemble
from funmatch.ops.mixing import mix_views
from funmatch.runtime import distributed, env
from funmatch.runtime.timing import timed
from funmatch.training import trainer
from funmatch.training.loop import Losses
from funmatch.training.matching import wiring
from funmatch.training.matching.logits import distillation_loss
from funmatch.training.matching.losses import FeatureMatching
from funmatch.training.objective import Objective, TeacherLogits
from funmatch.training.setup import TrainSetup, Trial, build_setup, finished_result, open_data, recorded_modes
from funmatch.training.student.build import Modules
from funmatch.training.teachers import checks, fixed, freezing, loading, readings, recording
from funmatch.training.teachers.source import DistillLoader, Fixed, Live, Shared, SharedCache, Taped, TeacherSource

DistillSetup = TrainSetup[Distill]


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
    row = find_distance(config.distance)
    coupled = {f"distance {config.distance}": row and row.couples_batch, **config.coupled_features}
    if env.world_size() > 1 and (names := [name for name, couples in coupled.items() if couples]):
        raise InputError(f"{names[0]} compares the images of a batch with each other, so one process must see all")


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
        teacher_views, _ = views_by_side(batch.to(self.setup.loop.device), self.setup.loader.teacher_sides)
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


def views_by_side(batch: Batch, sides: Sequence[int]) -> tuple[dict[int, Tensor], Tensor]:
    """Mixes a batch; returns the teachers' views, (n, 3, side, side) by side, and the student's."""
    teacher_views, student_view = mix_views(batch.crops, batch.teacher_crops, batch.lam, batch.cutmix_boxes)
    # A batch that brings its teacher's logits has no teacher crops.
    return dict(zip(sides, teacher_views, strict=True)) if teacher_views else {}, student_view


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
    if other:
        setup, teachers, table, logits = _teachers_of(other, setup)
    else:
        setup, teachers, table, logits = _freeze_teachers(setup, loaded)
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
        distillation = Distillation(setup, teachers, table, source, loader, logits, matching)
        if matching:
            wiring.fit_statistics(matching, setup.config.batch, distillation.teacher_answers)
        yield distillation
        source.flush()


Prepared = tuple[DistillSetup, TeacherEnsemble, Tensor | None, TeacherLogits | None]
"""A setup, its frozen teachers, the table of fixed teachers' logits, and the logits on the validation split."""


def _freeze_teachers(setup: DistillSetup, loaded: Sequence[loading.LoadedTeacher]) -> Prepared:
    """Freezes the teachers in the fastest mode that keeps their outputs, or in the mode that a run or tape recorded."""
    config = setup.config
    with recording.lock_beginning(config):
        # The run's own modes before the tape's: its first steps were trained in them.
        modes = recorded_modes(setup) or recording.recorded_modes(config, setup.loop.device)
        setup, teachers, first = freeze_for_run(setup, loaded, modes)
        if config.tape:
            answers = teachers(first, config.temperature) if config.matches_features else None
            recording.begin_tape(setup, teachers, answers)  # under the lock: the next run finds these modes on the tape
    if config.tape_top is not None and env.is_main_process():
        recording.report_dropped_mass(teachers(first, config.temperature), config)
    checks.note_sizes(setup.student.classifier, teachers)
    logits = checks.check_on_validation(teachers, setup) if env.is_main_process() else None
    if not STRATEGIES[config.strategy].fixed:
        return setup, teachers, None, logits
    name, table = fixed.compute_fixed_logits(setup, teachers)
    return setup.with_provenance(answers=name), teachers, table, logits


def _teachers_of(other: Distillation, setup: DistillSetup) -> Prepared:
    """Returns the teachers of another student's distillation, for this setup.

    Raises:
        InputError: the run was started with its teachers in another inference mode, or tokens have another grid.
    """
    if (layout := wiring.layout_of(setup)) != other.teachers.layout:
        assert layout
        raise InputError(
            f"{setup.config.student} would match tokens on a grid of {layout.grid[0]} × {layout.grid[1]}, and the "
            "others on another; train them one after the other"
        )
    modes, recorded = other.setup.provenance["teacher_forms"], recorded_modes(setup)
    if recorded and [each["form"] for each in recorded] != [each["form"] for each in modes]:
        raise InputError(
            f"{setup.config.out} was started with its teacher in another inference mode; resume it without the others"
        )
    same = {
        name: other.setup.provenance[name] for name in ("teacher_forms", "answers") if name in other.setup.provenance
    }
    setup, logits = setup.with_provenance(**same), other.teacher_logits
    if other.setup.evaluation.view != setup.evaluation.view and logits is not None:
        logits = checks.check_on_validation(other.teachers, setup)  # each student's view decides how images are cut
    return setup, other.teachers, other.table, logits


def freeze_for_run(
    setup: DistillSetup, loaded: Sequence[loading.LoadedTeacher], modes: list[dict[str, Any]] | None
) -> tuple[DistillSetup, TeacherEnsemble, dict[int, Tensor]]:
    """Freezes the teachers; returns the setup that records their modes, the teachers, and the first views by side.

    Args:
        modes: recorded inference modes to use again, or None to choose the fastest.
    """
    placed = [
        wiring.with_readout(replace(teacher, side=side), setup)
        for teacher, side in zip(loaded, setup.config.teacher_side, strict=True)
    ]
    layout = wiring.layout_of(setup)
    if STRATEGIES[setup.config.strategy].fixed:
        first = fixed.first_views(setup, placed)
    else:
        first, _ = views_by_side(setup.loader.batch_at(0), setup.loader.teacher_sides)
    first = {side: views.to(setup.loop.device) for side, views in first.items()}
    # The main process chooses; the others must compute the teachers alike.
    if env.is_main_process():
        teachers, modes = freezing.freeze_fastest(placed, first, setup.config, modes, layout)
        distributed.broadcast_from_main(lambda: modes)
    else:
        modes = distributed.broadcast_from_main(lambda: modes)
        teachers, modes = freezing.freeze_fastest(placed, first, setup.config, modes, layout)
    return setup.with_provenance(teacher_forms=modes), teachers, first
