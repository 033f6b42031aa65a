"""Writes a finished student for use elsewhere, in timm's layout."""

import copy
from dataclasses import replace
from pathlib import Path

from funmatch.models.classifier import Classifier, crop_fraction, strip_training_only
from funmatch.models.save import save
from funmatch.runtime.disk.checksums import write_manifest
from funmatch.runtime.disk.files import write_folder_atomically
from funmatch.training.evaluation.scoring import EvalView
from funmatch.training.student.quantization import strip_quantization


def export_student(
    student: Classifier, folder: Path, view: EvalView, class_names: tuple[str, ...] | None, about: dict[str, object]
) -> None:
    """Writes a student with the view that it was evaluated with and the names of its classes.

    Args:
        about: facts that are saved with it, such as `top1` in [0, 1] on the split that the run was evaluated on.
    """
    # The view of evaluation goes into the card, so that whoever loads the student sees images as the run did.
    fraction = crop_fraction(view.side, view.short_side)
    seen = {"squash": view.squash, "resample": view.resample, "floor": view.floor}
    card = replace(student.card, side=view.side, crop_fraction=fraction, classes=class_names, **seen)
    with write_folder_atomically(folder) as partial:
        # A copy: the caller's student stays on its device.
        portable = copy.deepcopy(student).cpu()
        # A plain network, which anyone can load; the ranges are for the export to INT8.
        ranges = strip_quantization(portable.net)
        strip_training_only(portable)
        save(portable, partial, card=card, about=about | ({"ranges": ranges} if ranges else {}))
        write_manifest(partial)
