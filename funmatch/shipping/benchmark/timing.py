"""Times several functions in turn, round by round, until the medians of their rounds repeat."""

import gc
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

LEAST_ROUNDS = 5
"""Rounds of each function, at least: quartiles of fewer say little."""
CALLS_ABOVE = 2
"""Calls that lie above a percentile, at least, where it is stated: a p99 takes 200 calls."""
SLICE_SECONDS = 0.2
"""Time for the calls of one function in one round: short, so that all functions meet the same state of the machine."""
PROBE_CALLS, PROBE_SECONDS = 5, 0.5
"""Calls and seconds, at most, in which a batch size is tried."""


@dataclass(eq=False)
class Series:
    """The timed calls of one function.

    Attributes:
        call: what is timed; it returns when its work is done, also on an accelerator.
        images: that each call computes.
        least_calls: so many calls are timed, however soon the medians repeat.
        rounds: seconds of each call, by round.
        spent: seconds that its rounds took, with their warm-up.
        error: what a call raised; it is not called again then.
    """

    call: Callable[[], object]
    images: int = 1
    least_calls: int = 0
    rounds: list[list[float]] = field(default_factory=list)
    spent: float = 0.0
    error: Exception | None = None

    @property
    def calls(self) -> int:
        """Number of calls that were timed."""
        return sum(map(len, self.rounds))

    @property
    def median(self) -> float:
        """Seconds of a call: the median of the rounds' medians, which a single disturbed round does not move."""
        return float(np.median([np.median(each) for each in self.rounds]))

    @property
    def spread(self) -> float:
        """Interquartile range of the rounds' medians as a share of their median; infinite before `LEAST_ROUNDS`."""
        if len(self.rounds) < LEAST_ROUNDS:
            return float("inf")
        low, high = np.percentile([np.median(each) for each in self.rounds], (25, 75))
        return float(high - low) / self.median

    def percentile(self, share: float) -> float | None:
        """Seconds within which a share of all calls returned; None where there were too few to tell."""
        everything = np.concatenate([np.array(each) for each in self.rounds])
        # The p99 of a hundred calls would be the slowest of them. Rounded, since 20 × (1 - 0.9) is a little below 2.
        if round(len(everything) * (1 - share), 6) < CALLS_ABOVE:
            return None
        return float(np.percentile(everything, 100 * share))

    def is_settled(self, spread: float) -> bool:
        """Whether the rounds' medians vary by no more than `spread`, and there are enough calls."""
        return self.error is not None or (self.calls >= self.least_calls and self.spread <= spread)


def time_rounds(
    series: Sequence[Series],
    spread: float,
    max_seconds: float,
    *,
    clock: Callable[[], float] = time.perf_counter,
    after_round: Callable[[int], object] = lambda _: None,
) -> None:
    """Times all functions in turn, a slice of each in every round, until all are settled or out of time.

    Those that are settled early stay in the rounds until the others are: a machine that gets slower meanwhile then
    slows all of them.

    Args:
        series: gets the times.
        spread: to which the medians of a function's rounds have to settle, as a share.
        max_seconds: for each function; it leaves the rounds after that.
        clock: returns seconds.
        after_round: called with the number of rounds done.
    """
    number = 0
    with _without_garbage_collection():
        while any(each.spent < max_seconds and not each.is_settled(spread) for each in series):
            running = [each for each in series if each.error is None and each.spent < max_seconds]
            # Another one begins each round: what comes after a large network always finds cold caches.
            first = number % len(running)
            for each in running[first:] + running[:first]:
                _time_slice(each, clock)
            number += 1
            after_round(number)


def _time_slice(series: Series, clock: Callable[[], float]) -> None:
    """Adds a round: one call to warm up, then calls for `SLICE_SECONDS`, one at least."""
    began, seconds = clock(), []
    try:
        # Not timed: the function before this one has filled the caches, and its threads may still be spinning.
        series.call()
        last = warm = clock()
        while not seconds or last - warm < SLICE_SECONDS:
            series.call()
            now = clock()
            seconds.append(now - last)
            last = now
    except Exception as error:  # runtimes raise whatever they like; the other formats are still measured
        series.error = error
    series.rounds += [seconds] if seconds and not series.error else []
    series.spent += clock() - began


@dataclass(frozen=True)
class Probe:
    """A batch size that was tried.

    Attributes:
        images: of the batch.
        seconds: the fastest call.
        error: why it could not be computed, or None.
    """

    images: int
    seconds: float = float("inf")
    error: Exception | None = None

    @property
    def rate(self) -> float:
        """Images per second."""
        return self.images / self.seconds


def probe_batches(
    call_of: Callable[[int], Callable[[], object]],
    batches: Sequence[int],
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Probe]:
    """Tries batch sizes; a size that cannot be computed, as in a file with a fixed one, has an error.

    Args:
        call_of: returns the function that computes a batch of so many images.
        batches: the sizes, in images.
        clock: returns seconds.
    """
    return [_probe(call_of, images, clock) for images in batches]


def _probe(call_of: Callable[[int], Callable[[], object]], images: int, clock: Callable[[], float]) -> Probe:
    try:
        call = call_of(images)
        call()  # compiles, chooses kernels and allocates
        began, fastest, calls = clock(), float("inf"), 0
        while calls < PROBE_CALLS and (not calls or clock() - began < PROBE_SECONDS):
            start = clock()
            call()
            fastest, calls = min(fastest, clock() - start), calls + 1
    except Exception as error:  # out of memory, a fixed batch size, or anything a runtime raises
        return Probe(images, error=error)
    return Probe(images, fastest)


@contextmanager
def _without_garbage_collection() -> Generator[None]:
    """Keeps Python from collecting garbage in the middle of a call, which would be in that call's time."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
