"""Profiles: parts of a step are named, timed and reported."""

import json
import time

import pytest
from make_images import FEW

import funmatch
from funmatch.data.prefetch import prefetch_map
from funmatch.runtime import timing
from funmatch.training import profiling

TINY = {
    "data": FEW, "teacher": "fashion-mini-teacher", "student": "fashion-mini-student", "threads": 1,
    "batch": 16,
}  # fmt: skip


def test_time_of_a_part_excludes_its_inner_parts(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    with timing.StepTimer(lambda: None) as timer, timing.timed("whole"):  # 0
        with timing.timed("one"), timing.timed("inner"):  # 1, 2 … 3, 4
            pass
        with timing.timed("two"):  # 5 … 6
            pass
    assert dict(timer.seconds) == {"inner": 1, "one": 2, "two": 1, "whole": 7 - 3 - 1}


def test_other_threads_are_timed_apart_and_only_while_profiling():
    with timing.StepTimer(lambda: None) as timer:

        def compute(number: int) -> int:
            with timing.timed("views"):
                return number + 1

        assert list(prefetch_map(compute, 0, 2, 1)) == [1, 2]
    assert set(timer.background_seconds) == {"views"}
    assert set(timer.seconds) == {"waiting for views"}
    with timing.timed("late"):
        time.sleep(0)
    assert "late" not in timer.seconds


@pytest.mark.parametrize("verb", [pytest.param("distill", marks=pytest.mark.slow), "train"])
def test_profile_reports_parts_of_the_first_steps(tmp_path, capfd, monkeypatch, verb):
    monkeypatch.setattr(profiling, "PEAK_SECONDS", 0.05)
    options = {name: value for name, value in TINY.items() if verb == "distill" or name != "teacher"}
    plain = getattr(funmatch, verb)(**options, steps=30, out=tmp_path / "plain")
    run = getattr(funmatch, verb)(**options, steps=30, profile=True, out=tmp_path / "run")
    profile = json.loads((tmp_path / "run" / "profile.json").read_text())
    parts = profile["parts_ms"]
    assert {"student", "backward", "optimizer", "waiting for views", "all else"} <= parts.keys()
    assert ("teacher" in parts) == (verb == "distill")
    assert sum(parts.values()) == pytest.approx(profile["step_ms"])
    assert parts["all else"] > 0
    assert "views" in profile["beside_ms"]
    assert profile["gflop"]["backward"] == 2 * profile["gflop"]["student"]
    assert profile["peak_gflops"] > 1
    events = json.loads((tmp_path / "run" / "trace.json").read_text())["traceEvents"]
    assert {"student", "backward"} <= {event.get("name") for event in events}
    assert "time by part, mean of 20 steps" in capfd.readouterr().out
    weights = "student/model.safetensors"
    assert (run.folder / weights).read_bytes() == (plain.folder / weights).read_bytes(), "profiling changes no bit"


@pytest.mark.slow
def test_run_too_short_for_a_profile_is_reported(tmp_path, capsys):
    funmatch.distill(**TINY, steps=3, profile=True, out=tmp_path / "run")
    assert "--profile needs more than 5 steps, but the run took only 3" in capsys.readouterr().err
    funmatch.distill(**TINY, steps=10, profile=True, out=tmp_path / "ten")
    assert json.loads((tmp_path / "ten" / "profile.json").read_text())["steps"] == 5
