"""The estimate of a run is measured before it starts, and leaves no files behind."""

import json

import pytest
from make_images import FEW

from funmatch.commands import plan
from funmatch.commands.plan import Parts
from funmatch.commands.verbs import run_verb
from funmatch.config import Distill, Finetune, Train
from funmatch.errors import InputError

TINY = {"data": (FEW,), "student": "fashion-mini-student", "threads": 1, "batch": 16}
TEACHER = {"teacher": ("fashion-mini-teacher",)}


@pytest.fixture(autouse=True)
def few_steps(monkeypatch) -> None:
    """Measures few steps: no test here is of how long they take."""
    monkeypatch.setattr(plan, "TIMED", 5)


def test_parts_of_a_run_add_up_to_its_evaluations_and_checkpoints():
    config = Train(**TINY, steps=1050, eval_every=500, save_every=100, out="x")
    total = Parts(begin=10, step=0.5, evaluation=4, save=2, end=7).of_run(config)
    # Evaluated at 500, 1,000 and the end; saved at 100, …, 1,000 and the end.
    assert total == {"begin": 10, "steps": 525, "evaluations": 12, "checkpoints": 22, "end": 7}


@pytest.mark.parametrize(
    ("table", "more"),
    [
        pytest.param(Distill, TEACHER, marks=pytest.mark.slow),
        (Distill, TEACHER | {"strategy": "fix/rs"}),
        (Distill, TEACHER | {"ema": 0.99, "teacher_ahead": True}),
        (Train, {}),
        (Finetune, {"student": "fashion-mini-teacher"}),
    ],
)
def test_plan_reports_time_memory_and_disk_and_writes_nothing(tmp_path, table, more):
    config = table(**TINY | more, steps=50, out=tmp_path / "deep" / "run")
    metrics = plan.measure(config)
    assert not any(tmp_path.iterdir()), "no folder, no checkpoint"
    assert metrics["steps"] == 50
    assert metrics["seconds"] == pytest.approx(sum(metrics["parts"].values()))
    assert metrics["parts"]["steps"] == pytest.approx(50 * metrics["step_ms"] / 1e3)
    assert metrics["images_per_second"] == pytest.approx(16e3 / metrics["step_ms"])
    assert metrics["gflop"] > 0
    assert 0 < metrics["of_peak"] < 1
    assert metrics["memory_bytes"] > 10**8
    taped = table is Distill and "strategy" not in more
    assert metrics["disk_bytes"]["tape"] == (50 * 16 * (10 * 2 + 4) if taped else None)


def test_estimated_size_on_disk_matches_the_run(tmp_path):
    config = Distill(**TINY, **TEACHER, steps=20, save_every=5, out=tmp_path / "run")
    planned = plan.measure(config)["disk_bytes"]["run"]
    from funmatch.training import distill

    distill.run(config)
    used = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*.safetensors"))
    assert 0.9 * used < planned < 1.3 * used


@pytest.mark.slow
def test_plan_command_prints_json_and_a_table(tmp_path, funmatch):
    argv = ["plan", "distill", "--data", FEW, "--teacher", "fashion-mini-teacher", "--student"]
    argv += ["fashion-mini-student", "--steps", "30", "--batch", "16", "--out", str(tmp_path / "run")]
    assert json.loads(funmatch(*argv, "--json").stdout)["steps"] == 30
    assert "estimate for" in funmatch(*argv).stdout
    assert "unknown command or recipe 'evaluate'" in funmatch("plan", "evaluate", check=2).stderr


def test_invalid_options_are_reported(tmp_path):
    with pytest.raises(InputError, match="temperature must be above 0"):
        run_verb("plan", Distill(**TINY, **TEACHER, steps=5, temperature=0, out=tmp_path / "run"))
