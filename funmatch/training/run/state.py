"""Holds the progress of a run besides its tensors."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import nn

from funmatch.errors import InputError
from funmatch.runtime.disk.json_files import read_record
from funmatch.training.loop import all_finite

FORMAT = 1
"""Format number of checkpoints, in their `state.json`. Version 0.1.0 wrote none, which is read as 1."""


@dataclass
class TrainState:
    """The progress of a run besides its tensors: what `state.json` of a checkpoint holds.

    Attributes:
        step: updates done.
        seconds: duration of the training so far, summed over the times that the run was started.
        best_step: the step whose student scored best on validation, None before the first evaluation.
        best_score: its score.
        since_best: evaluations since then.
        window: the losses of the steps since the last record.
        window_parts: the parts of these losses, by name.
        scaler: of the gradient scaler, where there is one.
        left_out: updates that were left out so far, since a loss or gradient was not finite.
        log_bytes, log_crc: length and CRC-32 of `metrics.jsonl` when this was saved; None in earlier versions.
        log_damaged: whether it had been damaged or changed before that.
    """

    # Each field needs a default: the state that an earlier version wrote lacks the newer fields.
    step: int = 0
    seconds: float = 0.0
    best_step: int | None = None
    best_score: float = -1.0  # below an accuracy of 0; JSON has no −∞
    since_best: int = 0
    window: list[float] = field(default_factory=list)
    window_parts: dict[str, list[float]] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)
    left_out: int = 0
    log_bytes: int | None = None
    log_crc: int | None = None
    log_damaged: bool = False


STATE_SHAPE = {f"{each.name}?": each.type for each in fields(TrainState)} | {"step": int}
NEWER = "choose another --out"


def read_state(path: Path) -> TrainState:
    """Reads `state.json`.

    Raises:
        OSError: it is missing.
        NewerFormat: a newer version wrote it.
        Damaged: it is not JSON, has a key that no state has, or a value of another type.
    """
    found = read_record(path, STATE_SHAPE, FORMAT, NEWER, closed=True)
    # Without the format number, which belongs to the file.
    return TrainState(**{name: value for name, value in found.items() if f"{name}?" in STATE_SHAPE})


class NotFinite(InputError):
    """A loss, or a weight of the student, is not finite after a step; raised before anything of it is saved.

    Attributes:
        step: the step.
    """

    def __init__(self, what: str, step: int) -> None:
        super().__init__(f"{what} no longer finite at step {step:,}")
        self.step = step


def check_weights(student: nn.Module, step: int) -> None:
    """Raises `NotFinite` if a weight of the student is not finite after a step."""
    # The loss alone does not show it: an update can overflow after a finite loss.
    if not all_finite(student.parameters()):
        raise NotFinite("the student's weights are", step)
