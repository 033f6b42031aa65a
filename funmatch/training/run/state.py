"""Holds the progress of a run besides its tensors, and the losses of the steps since its last record."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from funmatch.errors import InputError
from funmatch.runtime import transfers
from funmatch.runtime.disk.json_files import read_record
from funmatch.training.loop import Losses

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


@dataclass(frozen=True)
class LossRecord:
    """The mean losses of the steps since the record before.

    Attributes:
        step: updates done.
        losses: the mean of each, by name.
        steps: number of these steps that this process took.
    """

    step: int
    losses: dict[str, float]
    steps: int


class LossMeter:
    """Collects the losses of each step, fetches them at one step, and returns their record when they have arrived."""

    def __init__(self, window: Mapping[str, list[float]], device: torch.device) -> None:
        """Continues from the losses of a checkpoint, by name."""
        self.new = {name: [torch.tensor(loss, device=device) for loss in losses] for name, losses in window.items()}
        # They count in the mean but not in the rate, since this process did not take their steps.
        self.from_before = self.count
        self.fetching: tuple[int, int, list[str], transfers.HostCopy] | None = None

    @property
    def count(self) -> int:
        """Number of steps that are in no record yet."""
        return len(next(iter(self.new.values()), []))

    def add(self, losses: Losses) -> None:
        # As tensors: `item` would make the host wait for the device in every step.
        for name, loss in losses.items():
            self.new.setdefault(name, []).append(loss)

    def start_fetch(self, step: int) -> None:
        """Starts to fetch the losses up to this step; no other fetch may be under way."""
        assert self.fetching is None
        # Stacked on the device: one copy for each name, not one for each step.
        copy = transfers.copy_to_host(*(torch.stack(losses) for losses in self.new.values()))
        self.fetching = step, self.count - self.from_before, list(self.new), copy
        self.new, self.from_before = {}, 0

    def take_record(self, *, wait: bool) -> LossRecord | None:
        """Returns the record that was fetched, or None if it has not arrived and `wait` is off.

        Raises:
            InputError: a loss is not finite.
        """
        if self.fetching is None or not (wait or self.fetching[-1].arrived):
            return None
        (step, steps, names, copy), self.fetching = self.fetching, None
        arrived = {name: _finite(losses.tolist(), step) for name, losses in zip(names, copy.wait(), strict=True)}
        # `fsum` rounds once, however many steps a record covers.
        return LossRecord(step, {name: math.fsum(each) / len(each) for name, each in arrived.items()}, steps)

    def window(self, step: int) -> dict[str, list[float]]:
        """Returns the losses that are in no record yet, by name; waits for the device."""
        # Checked here too: they go into a checkpoint, and a run that resumes from a NaN stays at NaN.
        return {name: _finite(torch.stack(losses).tolist(), step) for name, losses in self.new.items()}


def _finite(losses: list[float], step: int) -> list[float]:
    if not all(map(math.isfinite, losses)):
        raise not_finite("the loss is", step)
    return losses


def check_weights(student: nn.Module, step: int) -> None:
    """Raises `InputError` if a weight of the student is not finite after a step."""
    # The loss alone does not show it: an update can overflow after a finite loss. Stacked, so that the host waits for
    # the device once, not for each tensor.
    if not torch.stack([tensor.isfinite().all() for tensor in student.parameters()]).all():
        raise not_finite("the student's weights are", step)


def not_finite(what: str, step: int) -> InputError:
    """Returns the error of a run that cannot recover; it is raised before anything of it is saved."""
    return InputError(
        f"{what} no longer finite at step {step}; the checkpoints are from before. Try a lower --lr, a longer "
        "--warmup-steps, or --precision fp32, with another --out"
    )
