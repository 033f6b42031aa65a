"""Short runs log, evaluate and save as often as long ones; what was chosen or recorded is used as it is."""

import json
from pathlib import Path

import pytest
from make_images import FEW

import funmatch
from funmatch.config import Train
from funmatch.runtime.disk.json_files import seal
from funmatch.training.run import folder as run_folder
from funmatch.training.run.intervals import default_intervals, due_at, evaluations_until, saves_of

MINI = {"data": FEW, "student": "fashion-mini-student", "batch": 64, "threads": 1, "compile": "off"}


def config(**options) -> Train:
    return Train.checked(data="x", student="y", out="z", **options)


@pytest.mark.parametrize(("steps", "log", "evaluate", "first"), [
    (1, 1, 1, 1), (9, 1, 1, 1), (60, 1, 6, 1), (100, 2, 10, 2), (2500, 50, 250, 50), (30_000, 50, 500, 500),
])  # fmt: skip
def test_intervals_scale_down_with_the_run_and_have_a_longest(steps, log, evaluate, first):
    found = default_intervals(steps, batch=128, images=100)
    assert found == {"log_every": log, "eval_every": evaluate, "save_every": evaluate, "eval_first": first}
    run = config(steps=steps, **found)
    each = (due_at(run, step) for step in range(1, steps + 1))
    logged, evaluated, saved = zip(*((d.logged, d.evaluated, d.saved) for d in each), strict=True)
    assert sum(logged) >= min(steps, 50)
    assert sum(evaluated) >= min(steps, 10)
    assert sum(saved) == saves_of(run)
    assert evaluated[-1]
    assert logged[-1]
    assert saved[-1]


def test_evaluations_do_not_take_longer_than_training():
    # 10,000 images are evaluated in about the time in which 1,000 are trained on: 8 steps of 128.
    assert default_intervals(60, 128, 10_000)["eval_every"] == 8
    assert default_intervals(100, 128, 10_000)["eval_every"] == 10
    assert default_intervals(6000, 128, 10_000)["eval_every"] == 500
    # The longest interval holds for any number of images.
    assert default_intervals(60, 1, 10**6)["eval_every"] == 500
    assert default_intervals(60, 1, 10**6, eval_cap=100)["eval_every"] == 100


@pytest.mark.parametrize("options", [
    {"steps": 60, "eval_every": 6, "eval_first": 1}, {"steps": 10, "eval_every": 3, "eval_first": None},
    {"steps": 10, "eval_every": 4, "eval_first": 8}, {"steps": 10, "eval_every": 4, "eval_first": 10},
    {"steps": 3, "eval_every": 500, "eval_first": 1}, {"steps": 3, "eval_every": 500, "eval_first": 7},
])  # fmt: skip
def test_count_of_evaluations_is_that_of_the_steps_at_which_they_are_due(options):
    run = config(log_every=1, save_every=1, **options)
    for step in range(1, options["steps"] + 1):
        assert evaluations_until(run, step) == sum(due_at(run, each).evaluated for each in range(1, step + 1))


def steps_of(folder: Path, event: str) -> list[int]:
    return [each["step"] for each in run_folder.Run(folder).metrics.read() if each["event"] == event]


def options_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["knobs"]


def test_short_run_has_a_point_for_each_step_and_is_evaluated_early(tmp_path):
    folder = funmatch.train(out=tmp_path / "run", steps=30, **MINI).folder
    assert steps_of(folder, "step") == [*range(1, 31)]
    assert steps_of(folder, "eval") == [1, *range(3, 31, 3)]
    assert {"log_every": 1, "eval_every": 3, "save_every": 3, "eval_first": 1}.items() <= options_of(folder).items()


def test_chosen_interval_has_no_early_evaluation(tmp_path):
    folder = funmatch.train(out=tmp_path / "run", steps=6, eval_every=4, **MINI).folder
    assert steps_of(folder, "eval") == [4, 6]
    assert options_of(folder)["eval_first"] is None


def test_run_of_an_earlier_version_goes_on_as_it_began(tmp_path):
    call = {"out": tmp_path / "run", "steps": 8, "schedule": "wsd", **MINI}
    # The defaults of that time, for a run whose record does not know of an early evaluation.
    folder = funmatch.train(**call, eval_every=500, log_every=50, save_every=500).folder
    record = json.loads((folder / "config.json").read_text())
    del record["knobs"]["eval_first"]
    (folder / "config.json").write_text(json.dumps(seal(record)))
    # Extended, with none of them given.
    funmatch.train(**call | {"steps": 16})
    assert steps_of(folder, "eval") == [16]
    assert options_of(folder)["eval_every"] == 500


def test_finetune_evaluates_at_least_every_hundred_steps():
    from funmatch.training import defaults

    found = defaults._intervals(funmatch.config.Finetune.checked(data="x", model="y", out="z"), 5000, 10, {})
    assert found["eval_every"] == 100
    assert found["save_every"] == 500
