"""The losses of a run between two records, fetched without waiting for the device."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from funmatch.errors import InputError
from funmatch.runtime import transfers

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
