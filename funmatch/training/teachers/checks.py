"""Checks that teachers fit the data and are usable: finite logits, above chance, as good as their card says."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from funmatch.config import Distill
from funmatch.config.choices import Resample
from funmatch.data.cache.open_cache import Cache
from funmatch.data.cache.stores import CachedSplit
from funmatch.data.readers.split_names import describe_images
from funmatch.errors import InputError
from funmatch.models.classifier import Classifier
from funmatch.models.ensemble import EnsembleMember, TeacherEnsemble
from funmatch.ops.metrics import alone_right, is_clearly_better
from funmatch.ops.resizing.libraries import OWN
from funmatch.ops.tasks.task import task_of
from funmatch.runtime.log import info
from funmatch.runtime.text import percent
from funmatch.training.evaluation import class_order, outcome, scoring
from funmatch.training.objective import TeacherLogits
from funmatch.training.run import folder as run_folder
from funmatch.training.setup import TrainSetup
from funmatch.training.teachers.loading import LoadedTeacher
from funmatch.training.teachers.predictions import member_view, predict

RESAMPLED_IMAGES = 500
"""Images on which teachers are evaluated with the other way of resizing, at most."""
BELOW_CARD_WARNING = 0.1
"""Accuracy below the card's from which a warning is given."""


def check_teachers(
    teachers: TeacherEnsemble,
    combined: Tensor,
    each: list[Tensor],
    split: CachedSplit,
    classes: Sequence[str],
    config: Distill,
    view: scoring.EvalView,
) -> None:
    """Reports the accuracy of the teachers, and refuses those near chance: nearly always a wrong head.

    Args:
        combined: logits of the split as `predict` returns them, (n, classes).
        each: those of each teacher.
        classes: names of the data's classes.
        view: the preprocessing of evaluation for the student.

    Raises:
        InputError: logits are not finite, fit another order of the classes better, or are near chance without
            `allow_weak_teacher`.
    """
    members, task = [*zip(teachers.members, each, strict=True)], task_of(config.task)
    for member, logits in [*members, *([(None, combined)] if len(members) > 1 else [])]:
        name = member.name if member else "ensemble"
        # Before anything else: a NaN compares false with every threshold, and would pass.
        if not logits.isfinite().all():
            raise InputError(f"teacher {name} has outputs that are not finite; its weights are damaged")
        check_not_constant(name, logits, split, config)
        metrics = scoring.score(logits, split)
        # Without labels there is no accuracy to check.
        if metrics[task.score] is None:
            continue
        shown = _shown_as(member, view) if member else ""
        score = f"{task.shown} {percent(metrics[task.score])}"
        info(f"teacher {name}: {score} on {describe_images(len(split), split.name)}{shown}")
        if metrics["top1"] is None or metrics["balanced"] is None:
            check_above_random(name, metrics["map"] or 0.0, split, config)
            continue
        on_card = member.frozen.classifier.card.top1 if member else None
        if on_card is not None and metrics["top1"] < on_card - BELOW_CARD_WARNING:
            info(
                f"WARNING: teacher {name} has top-1 {percent(metrics['top1'])} here, but its card says "
                f"{percent(on_card)}; check the images, the order of the classes and the image size (--teacher-side)"
            )
        if member and member.class_map is None:
            card = member.frozen.classifier.card
            class_order.check_number_order(card, classes, logits, split, trust_order=config.trust_class_order)
        # Balanced accuracy, since a constant prediction has a high top-1 where one class is frequent.
        check_above_chance(name, metrics["balanced"], logits, split, config)


def _shown_as(member: EnsembleMember, view: scoring.EvalView) -> str:
    """Returns, as a clause, that a teacher is shown other views than its card says: its accuracy alone may differ."""
    shown, own = member_view(member, view), member.frozen.classifier.card
    usual = scoring.default_eval_resize(shown.side, own)
    if shown.short_side == usual:
        return ""
    return f" (resized to {shown.short_side} pixels before the crop, as for the student; its own card says {usual})"


def check_not_constant(name: str, logits: Tensor, split: CachedSplit, config: Distill) -> None:
    """Raises `InputError` for a teacher that gives all images the same probabilities, unless it is allowed.

    It needs no labels: such a teacher is a constant function, usually one whose head was never trained.

    Args:
        logits: (n, classes).
    """
    probabilities = task_of(config.task).probabilities(logits.double())
    # Up to rounding, which differs with an image's place in its batch.
    if len(logits) > 1 and not config.allow_weak_teacher and (probabilities - probabilities[0]).abs().max() < 1e-6:
        raise InputError(
            f"teacher {name} gives all {len(split):,} images of {split.name} the same probabilities; usually its head "
            "was never trained. Pass --allow-weak-teacher to use it nevertheless"
        )


def check_above_chance(name: str, accuracy: float, logits: Tensor, split: CachedSplit, config: Distill) -> None:
    """Raises `InputError` for a teacher near chance, unless `allow_weak_teacher` is set.

    Args:
        accuracy: mean over classes, in [0, 1]: with unequal classes, a constant prediction has a high top-1.
        logits: (n, classes).
    """
    # Chance is measured over the classes that occur; of one class alone over all outputs.
    present = len(split.labels(slice(None)).unique())
    needed = chance_threshold(present if present > 1 else logits.shape[-1], len(split))
    if accuracy < needed and not config.allow_weak_teacher:
        raise InputError(
            f"teacher {name} is near chance: mean accuracy over classes {percent(accuracy)} on {split.name}, at least "
            f"{percent(needed)} required. Usually its head belongs to other classes, or its normalisation or image "
            "size differs (--teacher-side). Pass --allow-weak-teacher to use it nevertheless"
        )


def check_above_random(name: str, precision: float, split: CachedSplit, config: Distill) -> None:
    """Raises `InputError` for a teacher that ranks images as chance does, unless `allow_weak_teacher` is set.

    Args:
        precision: mean average precision, in [0, 1], of several classes an image.
    """
    needed = outcome.chance_precision(split.labels(slice(None)))
    if precision < needed and not config.allow_weak_teacher:
        raise InputError(
            f"teacher {name} is near chance: mAP {percent(precision)} on {split.name}, at least {percent(needed)} "
            "required, since random rankings have nearly as much. Usually its head belongs to other classes, or its "
            "normalisation or image size differs (--teacher-side). Pass --allow-weak-teacher to use it nevertheless"
        )


def chance_threshold(classes: int, images: int) -> float:
    """Returns the mean accuracy over classes below which a classifier is taken to guess."""
    chance = 1 / classes
    return outcome.chance_threshold(chance, math.sqrt(chance * (1 - chance) / images))


def check_on_validation(
    teachers: TeacherEnsemble, setup: TrainSetup[Distill], known_by: Sequence[str] = ()
) -> TeacherLogits:
    """Predicts the teachers' logits of the validation split; raises `InputError` if they are near chance.

    Args:
        known_by: as of `predictions.predict`.
    """
    split, view, config = setup.evaluation.validation, setup.evaluation.view, setup.config
    combined, members = predict(teachers, split, view, known_by)
    logits = [combined, *members]
    if teachers.layout:
        for member, each in zip(teachers.members, members, strict=True):
            check_features(member.name, each[:, teachers.layout.classes :], split, config)
        logits = [each[:, : teachers.layout.classes] for each in logits]
    if logits[0].shape[1]:
        check_teachers(teachers, logits[0], logits[1:], split, setup.cache.classes, config, view)
        if not run_folder.options_of(config.out):
            compare_resampling(teachers, logits[1:], split, view, config.resampled, known_by)
    return TeacherLogits(combined, members)


def check_features(name: str, features: Tensor, split: CachedSplit, config: Distill) -> None:
    """Raises `InputError` for a teacher whose features are not finite, or, unless it is allowed, those of all images.

    Args:
        features: of a split, (n, d).
    """
    if not features.isfinite().all():
        raise InputError(f"teacher {name} has features that are not finite; its weights are damaged")
    spread = (features - features[0]).abs().max() / features.abs().max().clamp(min=1e-12)
    # Up to rounding, which differs with an image's place in its batch.
    if len(features) > 1 and not config.allow_weak_teacher and spread < 1e-6:
        raise InputError(
            f"teacher {name} gives all {len(split):,} images of {split.name} the same features; pass "
            "--allow-weak-teacher to use it nevertheless"
        )


def compare_resampling(
    teachers: TeacherEnsemble,
    logits: list[Tensor],
    split: CachedSplit,
    view: scoring.EvalView,
    training: Resample,
    known_by: Sequence[str] = (),
) -> None:
    """Reports teachers that are clearly better with or without antialias, where views are not resized so.

    Networks are sensitive to how their images were resized: some lose points without antialias, some with it.

    Args:
        logits: of the split, one for each teacher, as the view shows the images.
        training: how training views are resized.
        known_by: as of `predictions.predict`.
    """
    heights, widths = split.sizes(np.arange(len(split)))
    # Smaller images are enlarged, and there antialias changes nothing.
    larger = np.flatnonzero(np.minimum(heights, widths) > view.short_side)
    some = larger[scoring.evenly_spread(len(larger), RESAMPLED_IMAGES)]
    # Of several classes an image, no test tells whether one of two rankings is clearly better.
    if not split.labelled or not len(some) or split.task == "multilabel":
        return
    other: Resample = "antialias" if view.resample == "tf" else "tf"
    subset = split.subset(some)
    _, others = predict(teachers, subset, replace(view, resample=other), known_by)  # their logits come first
    others = [each[:, : logits[0].shape[1]] for each in others]
    labels = subset.labels(slice(None))
    for member, here, there in zip(teachers.members, logits, others, strict=True):
        right = {view.resample: here[some].argmax(-1) == labels, other: there.argmax(-1) == labels}
        better, worse = sorted(right, key=lambda method: int(right[method].sum()), reverse=True)
        flags = {"--resample": training, "--eval-resample": view.resample}
        # A filter of a library's own is for evaluation alone.
        flags = flags if better in OWN else {}
        change = " ".join(f"{flag} {better}" for flag, method in flags.items() if method == worse)
        if change and is_clearly_better(*alone_right(right[better], right[worse])):
            top1 = {method: percent(found.double().mean().item()) for method, found in right.items()}
            info(
                f"note: teacher {member.name} has top-1 {top1[better]} on images resized by {better}, {top1[worse]} by "
                f"{worse} ({len(some)} images of {split.name}); {change} shows them as it knows them"
            )


def fit_to_teachers(cache: Cache, loaded: Sequence[LoadedTeacher], config: Distill) -> tuple[Cache, Distill]:
    """Returns the images and options, unlabelled if all images are for training and not of the teachers' classes.

    Distillation needs no labels, and works with images of other classes (section 5 of the paper); but the images that
    the student is evaluated on must be of the teachers' classes.
    """
    try:
        for teacher in loaded:
            if teacher.class_map is None and config.matches_logits:
                class_order.check_classes(teacher.classifier, cache, trust_order=config.trust_class_order)
    except InputError:
        # A validation split that was held out has the same classes as the training images.
        published = cache.splits.keys() - {"train"} - ({"val"} if config.val else set())
        if config.eval_data or published:
            raise
        info(f"{cache.name}: its classes are not the teacher's; using its images without labels")
        return cache.without_labels(), config.model_copy(update={"unlabelled": True})
    return cache, config


def note_sizes(student: Classifier, teachers: TeacherEnsemble) -> None:
    """Prints a note if the student is no smaller than its teachers: it works, but is rarely what was meant."""
    own, other = student.count_parameters(), teachers.count_parameters()
    if own >= other:
        info(f"note: the student ({own:,} parameters) is not smaller than its teacher ({other:,})")
