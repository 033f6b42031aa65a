"""The losses of a run between two records, fetched without waiting for the device."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from funmatch.errors import InputError
from funmatch.runtime import transfers


@dataclass(frozen=True)
class LossRecord:
    """What a record says.

    Attributes:
        step: updates done.
        loss: the mean since the record before.
        steps: that were taken since, in this process.
    """

    step: int
    loss: float
    steps: int


class LossMeter:
    """Of each step since the last record; a record is asked for at one step and told when it has arrived."""

    def __init__(self, window: list[float], device: torch.device) -> None:
        """Goes on from those that a checkpoint kept."""
        self.new = [torch.tensor(loss, device=device) for loss in window]
        self.from_before = len(window)
        self.asked: tuple[int, int, transfers.HostCopy] | None = None

    def add(self, loss: Tensor) -> None:
        self.new.append(loss)

    def start_fetch(self, step: int) -> None:
        """Begins to fetch those until this step; none must be on its way."""
        assert self.asked is None
        self.asked = step, len(self.new) - self.from_before, transfers.copy_to_host(torch.stack(self.new))
        self.new, self.from_before = [], 0

    def take_record(self, *, wait: bool) -> LossRecord | None:
        """What was asked for, if it has arrived or is waited for; an `InputError` where a loss is not finite."""
        if self.asked is None or not (wait or self.asked[-1].arrived):
            return None
        (step, steps, fetched), self.asked = self.asked, None
        losses = _finite(fetched.wait()[0].tolist(), step)
        return LossRecord(step, math.fsum(losses) / len(losses), steps)

    def window(self, step: int) -> list[float]:
        """Those that no record holds yet: waits for the device."""
        return _finite(torch.stack(self.new).tolist(), step) if self.new else []


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
