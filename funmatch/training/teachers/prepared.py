"""Freezes and checks the teachers of a run, or takes those of another student's run."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from funmatch.config import Distill
from funmatch.config.choices import STRATEGIES
from funmatch.errors import InputError
from funmatch.models.ensemble import TeacherEnsemble
from funmatch.runtime import distributed, env
from funmatch.training.matching import wiring
from funmatch.training.objective import TeacherLogits
from funmatch.training.setup import TrainSetup, recorded_modes
from funmatch.training.teachers import checks, fixed, freezing, loading, predictions, recording
from funmatch.training.teachers.run_views import run_views

DistillSetup = TrainSetup[Distill]


@dataclass(frozen=True)
class Prepared:
    """A run whose teachers are frozen and checked.

    Attributes:
        setup: the run, which records the teachers' inference modes.
        teachers: the frozen teachers.
        table: a fixed teacher's logits of each training image, (images, classes); None for other teachers.
        teacher_logits: the teachers' on the validation split; None on all processes but the main one.
    """

    setup: DistillSetup
    teachers: TeacherEnsemble
    table: Tensor | None
    teacher_logits: TeacherLogits | None


def freeze_teachers(setup: DistillSetup, loaded: Sequence[loading.LoadedTeacher]) -> Prepared:
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
    logits = None
    if env.is_main_process():
        logits = checks.check_on_validation(teachers, setup, predictions.identities(setup, loaded))
    if not STRATEGIES[config.strategy].fixed:
        return Prepared(setup, teachers, None, logits)
    name, table = fixed.compute_fixed_logits(setup, teachers)
    return Prepared(setup.with_provenance(answers=name), teachers, table, logits)


def reuse_teachers(other: Prepared, setup: DistillSetup) -> Prepared:
    """Returns this run with the teachers of another student's.

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
    return Prepared(setup, other.teachers, other.table, logits)


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
    views = run_views(setup, tuple(teacher.side for teacher in placed))
    first = views.batch_at(0)
    # The main process chooses; the others must compute the teachers alike.
    if env.is_main_process():
        teachers, modes = freezing.freeze_fastest(placed, first, setup.config, modes, layout, views.further)
        distributed.broadcast_from_main(lambda: modes)
    else:
        modes = distributed.broadcast_from_main(lambda: modes)
        teachers, modes = freezing.freeze_fastest(placed, first, setup.config, modes, layout)
    return setup.with_provenance(teacher_forms=modes), teachers, first
