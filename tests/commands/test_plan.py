"""The estimate of a run is measured before it starts, and leaves no files behind."""

import json

import pytest

from funmatch.commands import plan
from funmatch.commands.plan import Parts
from funmatch.commands.verbs import run_verb
from funmatch.config import Distill, Finetune, Train
from funmatch.errors import InputError

TINY = {"data": ("fashion-mini",), "student": "fashion-mini-student", "threads": 1, "batch": 16}
TEACHER = {"teacher": ("fashion-mini-teacher",)}


def test_the_parts_of_a_whole_run():
    config = Train(**TINY, steps=1050, eval_every=500, save_every=100, out="x")
    whole = Parts(begin=10, step=0.5, evaluation=4, save=2, end=7).of_run(config)
    # Evaluated at 500, 1,000 and the end; saved at 100, …, 1,000 and the end.
    assert whole == {"begin": 10, "steps": 525, "evaluations": 12, "checkpoints": 22, "end": 7}


@pytest.mark.parametrize(
    ("table", "more"),
    [
        (Distill, TEACHER),
        (Distill, TEACHER | {"strategy": "fix/rs"}),
        (Distill, TEACHER | {"ema": 0.99, "teacher_ahead": True}),
        (Train, {}),
        (Finetune, {"student": "fashion-mini-teacher"}),
    ],
)
def test_a_plan_leaves_nothing_and_says_what_is_needed(tmp_path, table, more):
    config = table(**TINY | more, steps=50, out=tmp_path / "deep" / "run")
    figures = plan.measure(config)
    assert not any(tmp_path.iterdir()), "no folder, no checkpoint"
    assert figures["steps"] == 50
    assert figures["seconds"] == pytest.approx(sum(figures["parts"].values()))
    assert figures["parts"]["steps"] == pytest.approx(50 * figures["step_ms"] / 1e3)
    assert figures["images_per_second"] == pytest.approx(16e3 / figures["step_ms"])
    assert figures["gflop"] > 0
    assert 0 < figures["of_peak"] < 1
    assert figures["memory_bytes"] > 10**8
    taped = table is Distill and "strategy" not in more
    assert figures["disk_bytes"]["tape"] == (50 * 16 * (10 * 2 + 4) if taped else None)


def test_the_size_of_a_run_on_the_disk_is_what_it_takes(tmp_path):
    config = Distill(**TINY, **TEACHER, steps=20, save_every=5, out=tmp_path / "run")
    planned = plan.measure(config)["disk_bytes"]["run"]
    from funmatch.training import distill

    distill.run(config)
    taken = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*.safetensors"))
    assert 0.9 * taken < planned < 1.3 * taken


def test_the_command(tmp_path, funmatch):
    words = ["plan", "distill", "--data", "fashion-mini", "--teacher", "fashion-mini-teacher", "--student"]
    words += ["fashion-mini-student", "--steps", "30", "--batch", "16", "--out", str(tmp_path / "run")]
    assert json.loads(funmatch(*words, "--json").stdout)["steps"] == 30
    assert "estimate for" in funmatch(*words).stdout
    assert "unknown verb or recipe 'evaluate'" in funmatch("plan", "evaluate", check=2).stderr


def test_invalid_options_are_reported(tmp_path):
    with pytest.raises(InputError, match="temperature must be above 0"):
        run_verb("plan", Distill(**TINY, **TEACHER, steps=5, temperature=0, out=tmp_path / "run"))
