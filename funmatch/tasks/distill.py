"""Function matching: a student learns to be the same function as a teacher, from pictures alone."""

import math
from dataclasses import replace
from typing import Any

from torch import Tensor

from funmatch import devices
from funmatch.config import Distill
from funmatch.data.cache import Cache
from funmatch.data.loader import Batch
from funmatch.data.pixels import CachedSplit
from funmatch.distances import kl
from funmatch.errors import InputError
from funmatch.logs import percent, say
from funmatch.models.frozen import Frozen
from funmatch.models.load import load
from funmatch.tasks import evaluate
from funmatch.tasks.lesson import open_data, prepare
from funmatch.tasks.walk import carry_out
from funmatch.views import STRATEGIES


def run(config: Distill) -> dict[str, Any]:
    """Distils a student and returns the figures of the finished run."""
    config.check()
    cache = open_data(config)
    teacher = Frozen(
        load(
            config.teacher,
            weights=config.teacher_weights,
            options=config.teacher_kwargs,
            side=config.side,
            pretrained=True,
        )
    )
    cache, config = fitting(cache, teacher, config)
    lesson = prepare("distill", config, cache, classes=teacher.classifier.num_classes, teacher=teacher)
    watched = evaluate.watched(cache)
    teacher_logits = evaluate.answers(teacher, watched, lesson.view)
    check_teacher(teacher_logits, watched, config)
    strategy = STRATEGIES[config.strategy]

    def loss_of(batch: Batch) -> Tensor:
        teacher_view, student_view = strategy(batch.crops, batch.lam)
        answers = teacher(teacher_view) if batch.answers is None else batch.answers
        return kl(lesson.student(student_view), answers, config.temperature).mean()

    def ahead(batch: Batch) -> Batch:
        teacher_view, _ = strategy(batch.crops, batch.lam)
        with devices.autocast(lesson.course.device, lesson.course.precision):
            return replace(batch, answers=teacher(teacher_view.to(lesson.course.device)))

    return carry_out(lesson, loss_of, teacher_logits, ahead if config.teacher_ahead else None)


def fitting(cache: Cache, teacher: Frozen, config: Distill) -> tuple[Cache, Distill]:
    """The pictures, and the configuration that is recorded: unlabelled, if all are to learn from and of other classes.

    Distillation needs no label, and pictures of other things teach too (section 5 of the paper); but what is judged
    on must be of the teacher's classes.
    """
    try:
        evaluate.check_classes(teacher.classifier, cache, trust_order=config.trust_class_order)
    except InputError:
        if config.eval_data or (set(cache.splits) != {"train"} and not config.val):
            raise
        say(f"{cache.name}: its folders are not the teacher's classes, so it is taken as unlabelled")
        return cache.without_labels(), config.model_copy(update={"unlabelled": True})
    return cache, config


def check_teacher(logits: Tensor, split: CachedSplit, config: Distill) -> None:
    """Refuses a teacher that is near chance, which is nearly always a wrong head or a wrong normalisation.

    Raises:
        InputError: unless `allow_weak_teacher`.
    """
    if not logits.isfinite().all():
        raise InputError(f"teacher {config.teacher} answers with values that are not finite; its weights are damaged")
    figures = evaluate.judge(logits, split)
    right = figures["balanced"]
    if right is None:
        return
    say(f"teacher {config.teacher}: top-1 {percent(figures['top1'])} on {len(split)} pictures of {split.name}")
    present = len(split.labels(slice(None)).unique())
    needed = above_chance(present if present > 1 else logits.shape[-1], len(split))
    if right < needed and not config.allow_weak_teacher:
        raise InputError(
            f"teacher {config.teacher} is near chance: {percent(right)} a class on {split.name}, wanted at least "
            f"{percent(needed)}. "
            "Nearly always its head is not for these classes, or its normalisation or its side is another "
            "(--side). To go on all the same: --allow-weak-teacher"
        )


def above_chance(classes: int, pictures: int) -> float:
    """The mean accuracy a class below which a classifier is taken to guess.

    Two standard deviations of a guess, or a tenth of the way to being right (a chance's worth of it, where that is
    less), whichever is more; but never beyond the middle between guessing and being right.
    """
    chance = 1 / classes
    deviation = math.sqrt(chance * (1 - chance) / pictures)
    return min(chance + max(2 * deviation, min(chance, 0.1) * (1 - chance)), (1 + chance) / 2)
