"""A finished student, written for use elsewhere."""

import copy
from dataclasses import replace
from pathlib import Path

from funmatch.models import classifier as models
from funmatch.models.classifier import Classifier
from funmatch.runtime.files import write_folder_atomically
from funmatch.training.setup import TrainSetup


def export_student(lesson: TrainSetup, student: Classifier, folder: Path, top1: float | None) -> None:
    """Writes a student in timm's layout, with the view that it was judged with and the names of its classes.

    Args:
        top1: on the split that it was judged on at the end, in [0, 1].
    """
    view = lesson.view
    card = replace(
        student.card, side=view.side, crop_fraction=view.side / view.short_side, classes=student_class_names(lesson)
    )
    with write_folder_atomically(folder) as partial:
        portable = copy.deepcopy(student).cpu()
        models.save(portable, partial, card=card, about={"verb": lesson.verb, "top1": top1})


def student_class_names(lesson: TrainSetup) -> tuple[str, ...] | None:
    """The names of what the student answers: the data's, or the teacher's where the data has numbers or none."""
    if lesson.class_names:
        return lesson.class_names
    if lesson.teachers and (lesson.cache.unnamed or not lesson.cache.classes):
        known = [member.frozen.classifier.card.classes for member in lesson.teachers.members]
        return next(filter(None, known), None)
    return lesson.cache.classes or None
