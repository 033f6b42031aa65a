"""Holds where a run stands besides its tensors, and the losses of the steps since its last record."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from funmatch.errors import InputError
from funmatch.runtime import transfers
from funmatch.runtime.json_files import read_record

FORMAT = 1
"""Of checkpoints: the number in their `state.json`. Version 0.1.0 wrote none, which is read as 1."""


@dataclass
class TrainState:
    """Where a run stands besides its tensors: what `state.json` of a checkpoint holds.

    Attributes:
        step: updates done.
        seconds: duration of the training so far, in all processes of the run's history.
        best_step: the step whose student scored best on validation, None before the first evaluation.
        best_score: its score.
        since_best: evaluations since then.
        window: the losses of the steps since the last record.
        window_parts: the parts of these losses, by name.
        scaler: of the gradient scaler, where there is one.
    """

    step: int = 0
    seconds: float = 0.0
    best_step: int | None = None
    best_score: float = -1.0
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
    return TrainState(**{name: value for name, value in found.items() if f"{name}?" in STATE_SHAPE})


Losses = Mapping[str, Tensor]
"""Scalars by name, `loss` among them; every step has the same names."""


@dataclass(frozen=True)
class LossRecord:
    """The losses of some steps.

    Attributes:
        step: updates done.
        losses: the mean of each since the record before, by name.
        steps: that were taken since, in this process.
    """

    step: int
    losses: dict[str, float]
    steps: int


class LossMeter:
    """Collects the losses of each step; fetches them at one step and gives their record when they have arrived."""

    def __init__(self, window: Mapping[str, list[float]], device: torch.device) -> None:
        """Continues from the losses that a checkpoint kept, by name."""
        self.new = {name: [torch.tensor(loss, device=device) for loss in losses] for name, losses in window.items()}
        self.from_before = self.count
        self.fetching: tuple[int, int, list[str], transfers.HostCopy] | None = None

    @property
    def count(self) -> int:
        """Steps that no record holds yet."""
        return len(next(iter(self.new.values()), []))

    def add(self, losses: Losses) -> None:
        for name, loss in losses.items():
            self.new.setdefault(name, []).append(loss)

    def start_fetch(self, step: int) -> None:
        """Begins to fetch the losses until this step; none must be on their way."""
        assert self.fetching is None
        copy = transfers.copy_to_host(*(torch.stack(losses) for losses in self.new.values()))
        self.fetching = step, self.count - self.from_before, list(self.new), copy
        self.new, self.from_before = {}, 0

    def take_record(self, *, wait: bool) -> LossRecord | None:
        """The record that was fetched, if it has arrived or is waited for; `InputError` where a loss is not finite."""
        if self.fetching is None or not (wait or self.fetching[-1].arrived):
            return None
        (step, steps, names, copy), self.fetching = self.fetching, None
        arrived = {name: _finite(losses.tolist(), step) for name, losses in zip(names, copy.wait(), strict=True)}
        return LossRecord(step, {name: math.fsum(each) / len(each) for name, each in arrived.items()}, steps)

    def window(self, step: int) -> dict[str, list[float]]:
        """The losses that no record holds yet, by name; waits for the device."""
        return {name: _finite(torch.stack(losses).tolist(), step) for name, losses in self.new.items()}


def _finite(losses: list[float], step: int) -> list[float]:
    if not all(map(math.isfinite, losses)):
        raise not_finite("the loss is", step)
    return losses


def not_finite(what: str, step: int) -> InputError:
    """Says of a run that it cannot recover, before anything of it is saved."""
    return InputError(
        f"{what} no longer finite at step {step}; the checkpoints are from before. Try a lower --lr, a longer "
        "--warmup-steps, or --precision fp32, with another --out"
    )
