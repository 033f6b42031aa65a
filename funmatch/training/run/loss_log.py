"""Logs the losses of a run: the mean of the steps since the last record, fetched without waiting for the device."""

import math
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from funmatch.runtime import transfers
from funmatch.training.loop import LoopOptions, Losses
from funmatch.training.run.recorder import Recorder
from funmatch.training.run.state import NotFinite, TrainState


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
            NotFinite: a loss is not finite.
        """
        if self.fetching is None or not (wait or self.fetching[-1].arrived):
            return None
        (step, steps, names, copy), self.fetching = self.fetching, None
        arrived = {name: _check_finite(each.tolist(), step) for name, each in zip(names, copy.wait(), strict=True)}
        # `fsum` rounds once, however many steps a record covers.
        return LossRecord(step, {name: math.fsum(each) / len(each) for name, each in arrived.items()}, steps)

    def window(self, step: int) -> dict[str, list[float]]:
        """Returns the losses that are in no record yet, by name; waits for the device."""
        # Checked here too: they go into a checkpoint, and a run that resumes from a NaN stays at NaN.
        return {name: _check_finite(torch.stack(losses).tolist(), step) for name, losses in self.new.items()}


def _check_finite(losses: list[float], step: int) -> list[float]:
    """Returns the losses of the steps up to this one; raises `NotFinite` with the first step whose loss is not."""
    for number, loss in enumerate(losses):
        if not math.isfinite(loss):
            raise NotFinite("the loss is", step - len(losses) + 1 + number)
    return losses


class LossLog:
    """Writes records of the event `step`: mean losses, learning rate, images per second.

    Attributes:
        latest: loss of the latest step, on its device; None before the first.
    """

    def __init__(self, state: TrainState, records: Recorder, loop: LoopOptions, batch: int) -> None:
        """Continues from the losses that the state of a checkpoint holds.

        Args:
            state: the run's progress; its losses and its duration are kept up to date.
            records: writes the records.
            loop: gives the learning rate of a step.
            batch: images per step.
        """
        self.state, self.records, self.loop, self.batch = state, records, loop, batch
        window = {"loss": state.window, **state.window_parts} if state.window else {}
        self.meter = LossMeter(window, loop.device)
        self.latest: Tensor | None = None
        self.clock, self.away = time.monotonic(), 0.0

    def start_clock(self) -> None:
        """Begins to measure the duration of training."""
        self.clock = time.monotonic()

    def stop_clock(self) -> None:
        """Adds the time since the last record to the run's duration."""
        self.state.seconds += time.monotonic() - self.clock

    @contextmanager
    def paused(self) -> Generator[None]:
        """Leaves the time of the block out of the rate of images per second, not out of the run's duration."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.away += time.monotonic() - began

    def add(self, losses: Losses) -> None:
        """Adds the losses of a step."""
        self.meter.add(losses)
        self.latest = losses["loss"]

    @property
    def note(self) -> str:
        """The loss of the latest step as text, for which the host waits for the device."""
        return "" if self.latest is None else f"loss {self.latest.item():.4f}"

    def write(self, *, due: bool, wait: bool) -> None:
        """Logs the mean losses since the last record.

        Args:
            due: start to fetch the losses from the device; they are logged when they have arrived.
            wait: wait for losses that are being fetched, and log them now.
        """
        # Fetched losses are logged at a later step, so that the device never waits for the host.
        if due and self.meter.count:
            self._write_record(wait=True)
            self.meter.start_fetch(self.state.step)
            self.state.window, self.state.window_parts = [], {}
        self._write_record(wait=wait)

    def _write_record(self, *, wait: bool) -> None:
        record = self.meter.take_record(wait=wait)
        if record is None:
            return
        # − 1: a record's step counts the updates done, and the rate is that of the last of them.
        now, lr = time.monotonic(), self.loop.lr_at(record.step - 1)
        rate = record.steps * self.batch / (now - self.clock - self.away)
        self.state.seconds += now - self.clock
        self.records.write("step", record.step, {**record.losses, "lr": lr, "images_per_second": rate})
        self.clock, self.away = now, 0.0

    def check_finite(self) -> None:
        """Raises `NotFinite` if a loss that no record holds yet is not finite; waits for the device."""
        self.meter.window(self.state.step)

    def state_to_save(self) -> TrainState:
        """Returns the run's progress with the losses that no record holds yet and the duration up to now.

        With them a resumed run logs the same means as an uninterrupted one, and one that is resumed often does not
        seem to have taken no time.
        """
        parts = self.meter.window(self.state.step)
        seconds = self.state.seconds + time.monotonic() - self.clock
        return replace(self.state, window=parts.pop("loss", []), window_parts=parts, seconds=seconds)
