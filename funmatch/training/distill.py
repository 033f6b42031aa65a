"""Function matching: a student learns to be the same function as a teacher, from images alone."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from funmatch.config import Distill
from funmatch.config.choices import STRATEGIES
from funmatch.data.batch import Batch
from funmatch.data.cache.open_cache import Cache
from funmatch.errors import InputError
from funmatch.models.ensemble import TeacherEnsemble
from funmatch.ops.distances import cross_entropy, distance, mix_labels, standardize_logits
from funmatch.ops.mixing import mix_views
from funmatch.runtime import distributed, env
from funmatch.runtime.log import info
from funmatch.runtime.prefetch import SharedCache
from funmatch.runtime.timing import timed
from funmatch.training import scoring, trainer
from funmatch.training.run.state import TeacherLogits
from funmatch.training.setup import TrainSetup, Trial, build_setup, finished_result, open_data, recorded_modes
from funmatch.training.teachers import fixed, loading, recording
from funmatch.training.teachers.tape import fold_dropped_classes

FACTS = {"teacher": "digest", "teacher_function": "function"}
"""What is recorded of the teachers, and compared when the run goes on."""


def run(config: Distill, given: loading.Modules | None = None, trial: Trial | None = None) -> dict[str, Any]:
    """Distils a student and returns the figures of the finished run.

    Args:
        given: modules from Python, by the names that stand for them.
        trial: what a search asks of the run, if it is part of one.
    """
    config.check()
    if config.distance == "dist" and env.world_size() > 1:
        raise InputError("distance dist compares the images of a batch with each other, so one process must see all")
    with distributed.process_group(config.device):
        return _run(config, given, trial)


def _run(config: Distill, given: loading.Modules | None, trial: Trial | None) -> dict[str, Any]:
    lesson, called = begun(config, given, trial)
    if result := finished_result(lesson):
        return result
    with taught(lesson, called) as made:
        return trainer.run_training(made.lesson, made.loss_of, made.judged, made.ahead, made.both)


@dataclass(frozen=True)
class Taught:
    """A distillation that is ready to begin, its teachers in place.

    Attributes:
        lesson: with them.
        loss_of: a batch to its mean loss.
        both: a batch to what student and teachers say of it.
        ahead: what is done to a batch beforehand, in the threads that make views; None for nothing.
        judged: what the teachers say of the watched split; None on all processes but the first.
    """

    lesson: TrainSetup
    loss_of: Callable[[Batch], Tensor]
    both: Callable[[Batch], tuple[Tensor, Tensor]]
    ahead: Callable[[Batch], Batch] | None
    judged: TeacherLogits | None


@contextmanager
def taught(
    lesson: TrainSetup,
    called: list[loading.LoadedTeacher],
    beside: Taught | None = None,
    said: SharedCache | None = None,
) -> Generator[Taught]:
    """The lesson with its teachers frozen, judged, and, where there is one, with its tape open.

    Args:
        called: its teachers; this list is emptied when they are frozen.
        beside: another student's, whose teachers and views are the same.
        said: where what the teachers say is kept for students that are taught beside each other.
    """
    if beside:
        lesson, judged = with_teachers_of(beside, lesson)
    else:
        lesson, judged = with_teachers(lesson, called)
    called.clear()  # the plain teachers need not be kept beside the frozen ones
    config, matched = lesson.config, lesson.teachers
    assert isinstance(config, Distill)
    assert matched
    seen = partial(views_by_side, sides=lesson.teacher_sides)
    with recording.open_tape(lesson, matched) as recorder:
        lesson = recording.reuse_recorded(lesson, recorder)

        def answered(batch: Batch, views: dict[int, Tensor], *, record: bool) -> Tensor:
            """What the teachers say of a batch, (n, classes): known before, or computed now."""
            if batch.teacher_logits is not None:
                return batch.teacher_logits
            with timed("teacher"):
                ask = partial(matched, views, config.temperature)
                # Kept answers are copies: what a graph of launches gives is overwritten when it is replayed.
                told = said((batch.step, batch.first_row, len(batch.labels)), lambda: ask().clone()) if said else ask()
            return recorder(batch, told, record=record) if recorder else told

        def ahead(batch: Batch) -> Batch:
            if batch.teacher_logits is not None:
                return batch
            views, _ = seen(batch.to(lesson.loop.device))
            return replace(batch, teacher_logits=answered(batch, views, record=True))

        def both(batch: Batch, *, record: bool = False) -> tuple[Tensor, Tensor]:
            """What student and teachers say of a batch."""
            views, student_view = seen(batch)
            with timed("student"):
                own = lesson.student(student_view)
            return own, answered(batch, views, record=record)

        def loss_of(batch: Batch) -> Tensor:
            return loss(*both(batch, record=True), batch, config)

        yield Taught(lesson, loss_of, both, ahead if config.teacher_ahead else None, judged)


def with_teachers(lesson: TrainSetup, called: list[loading.LoadedTeacher]) -> tuple[TrainSetup, TeacherLogits | None]:
    """The lesson with its teachers frozen, and what they say of the watched split, on the first process."""
    config = lesson.config
    assert isinstance(config, Distill)
    with recording.lock_beginning(config):
        remembered = recorded_modes(lesson) or recording.recorded_modes(config, lesson.loop.device)
        lesson, matched, first = matched_in(lesson, called, remembered)
        if config.tape:
            recording.begin_tape(lesson, matched)
    if config.tape_top is not None and env.is_main_process():
        recording.report_dropped_mass(matched(first, config.temperature), config)
    judged = judged_by(matched, lesson) if env.is_main_process() else None
    if STRATEGIES[config.strategy].fixed:
        lesson = fixed.compute_fixed_logits(lesson, matched)
    return lesson, judged


def with_teachers_of(other: Taught, lesson: TrainSetup) -> tuple[TrainSetup, TeacherLogits | None]:
    """The lesson with the teachers of another student, and what they say of the watched split.

    Raises:
        InputError: the run was begun with its teachers computed otherwise.
    """
    forms, remembered = other.lesson.provenance["teacher_forms"], recorded_modes(lesson)
    if remembered and [each["form"] for each in remembered] != [each["form"] for each in forms]:
        raise InputError(f"{lesson.config.out} was begun with its teacher in another form; go on with it alone")
    facts = lesson.provenance | {"teacher_forms": forms}
    lesson = replace(lesson, teachers=other.lesson.teachers, provenance=facts, known=other.lesson.known)
    if other.lesson.view == lesson.view or other.judged is None or lesson.teachers is None:
        return lesson, other.judged
    return lesson, judged_by(lesson.teachers, lesson)  # images to judge on are cut as the student wants


def begun(
    config: Distill, given: loading.Modules | None = None, trial: Trial | None = None
) -> tuple[TrainSetup, list[loading.LoadedTeacher]]:
    """A distillation made ready but for its teachers, and these as they were called."""
    cache = open_data(config, trial)
    called = distributed.main_process_first(lambda: loading.load_teachers(config, cache, config.side, given or {}))
    cache, config = fitting(cache, called, config)
    if config.label_weight and not cache.splits["train"].labelled:
        raise InputError(f"label_weight ({config.label_weight}) needs labels, and {cache.name} has no labels for all")
    lesson = build_setup("distill", config, cache, classes=called[0].num_classes, given=given, trial=trial)
    called = [replace(one, side=one.side or lesson.view.side) for one in called]
    return taught_by(lesson, called), called


def matched_in(
    lesson: TrainSetup, called: list[loading.LoadedTeacher], remembered: list[Any] | None
) -> tuple[TrainSetup, TeacherEnsemble, dict[int, Tensor]]:
    """The lesson with its teachers frozen in their best (or remembered) forms, these, and the views that decided."""
    config = lesson.config
    assert isinstance(config, Distill)
    if STRATEGIES[config.strategy].fixed:
        first = fixed.first_views(lesson, called)
    else:
        first, _ = views_by_side(lesson.loader.batch_at(0), lesson.teacher_sides)
    first = {side: views.to(lesson.loop.device) for side, views in first.items()}
    matched, forms = in_one_form(called, first, config, remembered)
    return replace(lesson, teachers=matched, provenance=lesson.provenance | {"teacher_forms": forms}), matched, first


def views_by_side(batch: Batch, sides: Sequence[int]) -> tuple[dict[int, Tensor], Tensor]:
    """The teachers' views, (n, 3, side, side) by their side, and the student's."""
    shown, student = mix_views(batch.crops, batch.teacher_crops, batch.lam, batch.cutmix_boxes)
    return dict(zip(sides, shown, strict=True)) if shown else {}, student


def loss(student: Tensor, told: Tensor, batch: Batch, config: Distill) -> Tensor:
    """(1 − w) · distance + w · cross-entropy on labels, the mean over a batch; w is the label weight, by default 0.

    Args:
        student, told: logits, (n, classes), of the student and of the teachers together.
    """
    logits, target = student, told
    if config.tape_top is not None:
        logits, target = fold_dropped_classes(student, told, config.tape_top, config.temperature)
    if config.standardise:
        logits, target = standardize_logits(student), standardize_logits(told)
    found = distance(
        config.distance, logits, target, config.temperature, squared=config.t_squared, smoothing=config.label_smoothing
    )
    if config.label_weight:
        labels = mix_labels(batch.labels, batch.own_weight, student.shape[-1], config.label_smoothing)
        found = (1 - config.label_weight) * found + config.label_weight * cross_entropy(student, labels)
    return found.mean()


def in_one_form(
    called: Sequence[loading.LoadedTeacher], views: dict[int, Tensor], config: Distill, remembered: list[Any] | None
) -> tuple[TeacherEnsemble, list[dict[str, Any]]]:
    """`teachers.in_best_form` as the first process finds it: all compute the teachers alike."""
    if env.is_main_process():
        matched, remembered = loading.freeze_fastest(called, views, config, remembered)
        distributed.broadcast_from_main(lambda: remembered)
        return matched, remembered
    return loading.freeze_fastest(called, views, config, distributed.broadcast_from_main(lambda: remembered))


def judged_by(matched: TeacherEnsemble, lesson: TrainSetup) -> TeacherLogits:
    """What the teachers say of the watched split; an `InputError` where that is no better than chance."""
    watched, config = scoring.validation_split(lesson.cache), lesson.config
    assert isinstance(config, Distill)
    together, each = loading.predict(matched, watched, lesson.view)
    loading.check_teachers(matched, together, each, watched, config)
    return TeacherLogits(together, each)


def taught_by(lesson: TrainSetup, called: Sequence[loading.LoadedTeacher]) -> TrainSetup:
    """The lesson with what its teachers decide: the sides that they see, and what is recorded of them."""
    config = lesson.config
    assert isinstance(config, Distill)
    return replace(
        lesson,
        config=config.model_copy(update={"teacher_side": tuple(one.side for one in called)}),
        class_names=loading.wanted_classes(config, lesson.cache),
        provenance=lesson.provenance
        | {name: "+".join(getattr(one, part) for one in called) for name, part in FACTS.items()}
        | {"rounded": recording.rounding(config)},
        teacher_sides=() if STRATEGIES[config.strategy].fixed else tuple(sorted({one.side for one in called})),
    )


def fitting(cache: Cache, called: Sequence[loading.LoadedTeacher], config: Distill) -> tuple[Cache, Distill]:
    """The images, and the configuration that is recorded: unlabelled, if all are to learn from and of other classes.

    Distillation needs no label, and images of other things teach too (section 5 of the paper); but what is judged
    on must be of the teacher's classes.
    """
    try:
        for one in called:
            if one.class_map is None:
                scoring.check_classes(one.classifier, cache, trust_order=config.trust_class_order)
    except InputError:
        if config.eval_data or (set(cache.splits) != {"train"} and not config.val):
            raise
        info(f"{cache.name}: its folders are not the teacher's classes, so it is taken as unlabelled")
        return cache.without_labels(), config.model_copy(update={"unlabelled": True})
    return cache, config
