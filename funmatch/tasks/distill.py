"""Function matching: a student learns to be the same function as a teacher, from pictures alone."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from funmatch import devices, launch
from funmatch.config import Distill
from funmatch.data.cache import Cache
from funmatch.data.loader import Batch
from funmatch.distances import kl
from funmatch.errors import InputError
from funmatch.logs import say
from funmatch.models.teachers import Teachers
from funmatch.tasks import judging, teachers, walk
from funmatch.tasks.lesson import Lesson, Trial, done, open_data, prepare, remembered_forms
from funmatch.views import STRATEGIES


def run(config: Distill, given: teachers.Modules | None = None, trial: Trial | None = None) -> dict[str, Any]:
    """Distils a student and returns the figures of the finished run.

    Args:
        given: modules from Python, by the names that stand for them.
        trial: what a search asks of the run, if it is part of one.
    """
    config.check()
    with devices.joined(config.device):
        return _run(config, given, trial)


def _run(config: Distill, given: teachers.Modules | None, trial: Trial | None) -> dict[str, Any]:
    cache = open_data(config, trial)
    called = devices.in_turn(lambda: teachers.call(config, cache, config.side, given or {}))
    cache, config = fitting(cache, called, config)
    lesson = prepare("distill", config, cache, classes=called[0].answered, given=given, trial=trial)
    called = [replace(one, side=one.side or lesson.view.side) for one in called]
    lesson = taught_by(lesson, called)
    if result := done(lesson):
        return result
    device, sides = lesson.course.device, (lesson.view.side, *lesson.other_sides)
    strategy = STRATEGIES[config.strategy]

    def seen(batch: Batch) -> tuple[dict[int, Tensor], Tensor]:
        """The teachers' views by side, and the student's."""
        pairs = [strategy(crops, batch.lam) for crops in (batch.crops, *batch.others)]
        return {side: pair[0] for side, pair in zip(sides, pairs, strict=True)}, pairs[0][1]

    first, _ = seen(lesson.loader.batch_at(0).to(device))
    matched, forms = in_one_form(called, first, config, remembered_forms(lesson))
    del called  # the plain teachers need not be kept beside the frozen ones
    lesson = replace(lesson, teachers=matched, facts=lesson.facts | {"teacher_forms": forms})
    taught = judged(matched, lesson) if launch.is_first() else None

    def loss_of(batch: Batch) -> Tensor:
        views, student_view = seen(batch)
        answers = matched(views, config.temperature) if batch.answers is None else batch.answers
        return kl(lesson.student(student_view), answers, config.temperature).mean()

    def ahead(batch: Batch) -> Batch:
        views, _ = seen(batch.to(device))
        return replace(batch, answers=matched(views, config.temperature))

    return walk.carry_out(lesson, loss_of, taught, ahead if config.teacher_ahead else None)


def in_one_form(
    called: Sequence[teachers.Called], views: dict[int, Tensor], config: Distill, remembered: list[Any] | None
) -> tuple[Teachers, list[dict[str, Any]]]:
    """`teachers.in_best_form` as the first process finds it: all compute the teachers alike."""
    if launch.is_first():
        matched, remembered = teachers.in_best_form(called, views, config, remembered)
        devices.from_first(lambda: remembered)
        return matched, remembered
    return teachers.in_best_form(called, views, config, devices.from_first(lambda: remembered))


def judged(matched: Teachers, lesson: Lesson) -> walk.Taught:
    """What the teachers say of the watched split; an `InputError` where that is no better than chance."""
    watched, config = judging.watched(lesson.cache), lesson.config
    assert isinstance(config, Distill)
    together, each = teachers.answers(matched, watched, lesson.view)
    teachers.gate(matched, together, each, watched, config)
    return walk.Taught(together, each)


def taught_by(lesson: Lesson, called: Sequence[teachers.Called]) -> Lesson:
    """The lesson with what its teachers decide: the sides that they see, and what is recorded of them."""
    side, config = lesson.view.side, lesson.config
    assert isinstance(config, Distill)
    return replace(
        lesson,
        config=config.model_copy(update={"teacher_side": tuple(one.side for one in called)}),
        asked=teachers.asked(config, lesson.cache),
        facts=lesson.facts | {"teacher": "+".join(one.digest for one in called)},
        other_sides=tuple(sorted({one.side for one in called} - {side})),
    )


def fitting(cache: Cache, called: Sequence[teachers.Called], config: Distill) -> tuple[Cache, Distill]:
    """The pictures, and the configuration that is recorded: unlabelled, if all are to learn from and of other classes.

    Distillation needs no label, and pictures of other things teach too (section 5 of the paper); but what is judged
    on must be of the teacher's classes.
    """
    try:
        for one in called:
            if one.picks is None:
                judging.check_classes(one.classifier, cache, trust_order=config.trust_class_order)
    except InputError:
        if config.eval_data or (set(cache.splits) != {"train"} and not config.val):
            raise
        say(f"{cache.name}: its folders are not the teacher's classes, so it is taken as unlabelled")
        return cache.without_labels(), config.model_copy(update={"unlabelled": True})
    return cache, config
