"""Timing takes functions in turn, stops when their medians repeat, and states what NumPy computes from the times."""

import gc

import numpy as np
import pytest

from funmatch.shipping.benchmark.timing import LEAST_ROUNDS, SLICE_SECONDS, Series, probe_batches, time_rounds

pytestmark = pytest.mark.usefixtures("few_objects")


class FakeClock:
    """Seconds that pass only when a function says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def __call__(self) -> float:
        return self.now

    def function(self, name, seconds):
        """A function whose calls take these seconds, in turn and then the last of them."""
        left = list(seconds)

        def call() -> None:
            self.order.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


def test_percentiles_are_those_of_numpy():
    seconds = np.random.default_rng(0).lognormal(size=(20, 25))
    series = Series(lambda: None, rounds=seconds.tolist())
    assert series.median == pytest.approx(np.median(np.median(seconds, axis=1)))
    assert series.percentile(0.9) == pytest.approx(np.percentile(seconds, 90))
    assert series.percentile(0.99) == pytest.approx(np.percentile(seconds, 99))
    low, middle, high = np.percentile(np.median(seconds, axis=1), (25, 50, 75))
    assert series.spread == pytest.approx((high - low) / middle)


@pytest.mark.parametrize(("calls", "known"), [(19, []), (20, [0.9]), (199, [0.9]), (200, [0.9, 0.99])])
def test_percentile_needs_two_calls_above_it(calls, known):
    series = Series(lambda: None, rounds=[[1.0] * calls])
    assert [share for share in (0.9, 0.99) if series.percentile(share) is not None] == known


def test_steady_functions_stop_after_the_fewest_rounds():
    clock = FakeClock()
    series = [Series(clock.function(name, [0.05])) for name in "ab"]
    time_rounds(series, spread=0.05, max_seconds=1000, clock=clock)
    assert [len(each.rounds) for each in series] == [LEAST_ROUNDS] * 2
    assert series[0].median == pytest.approx(0.05)
    assert all(sum(seconds) >= SLICE_SECONDS - 1e-9 for seconds in series[0].rounds)


def test_functions_take_turns_and_each_begins_a_round():
    clock = FakeClock()
    time_rounds([Series(clock.function(name, [1.0])) for name in "abc"], 0.05, 1000, clock=clock)
    # A call to warm up and a timed one, each longer than the slice.
    assert "".join(clock.order) == "aabbcc" + "bbccaa" + "ccaabb" + "aabbcc" + "bbccaa"


def test_steady_function_stays_until_the_others_are_settled():
    clock = FakeClock()
    # The warm-up calls are the odd ones.
    unsteady = Series(clock.function("u", [1, 1, 1, 2, 1, 3, 1, 4, 1, 5, *[1] * 1000]))
    steady = Series(clock.function("s", [1]))
    time_rounds([steady, unsteady], 0.05, 1000, clock=clock)
    assert len(steady.rounds) == len(unsteady.rounds) > LEAST_ROUNDS
    assert unsteady.spread <= 0.05


def test_time_limit_is_each_functions_own():
    clock = FakeClock()
    quick, slow = Series(clock.function("q", [0.1, 0.5])), Series(clock.function("s", [30, 40]))
    quick.least_calls = 20
    time_rounds([quick, slow], 0.05, 100, clock=clock)
    assert len(slow.rounds) == 2
    assert quick.calls == 20


def test_failing_function_ends_alone():
    clock = FakeClock()

    def fail() -> None:
        raise RuntimeError("no such kernel")

    good, bad = Series(clock.function("g", [0.1])), Series(fail)
    time_rounds([bad, good], 0.05, 1000, clock=clock)
    assert str(bad.error) == "no such kernel"
    assert bad.rounds == []
    assert len(good.rounds) == LEAST_ROUNDS


def test_no_garbage_is_collected_while_timing():
    clock, states = FakeClock(), []

    def call() -> None:
        states.append(gc.isenabled())
        clock.now += 1

    time_rounds([Series(call)], 0.05, 1000, clock=clock)
    assert not any(states)
    assert gc.isenabled()


def test_batches_are_tried_and_those_that_fail_are_passed_over():
    clock = FakeClock()

    def call_of(images: int):
        if images > 8:
            raise MemoryError
        # Batches of 8 have half the time per image; the first call compiles.
        return clock.function(str(images), [9.0, images * (0.01 if images < 8 else 0.005)])

    probes = probe_batches(call_of, (1, 8, 32), clock=clock)
    assert [round(each.rate) for each in probes[:2]] == [100, 200]
    assert isinstance(probes[2].error, MemoryError)
    assert probes[2].rate == 0
