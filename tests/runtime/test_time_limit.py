"""Time limits: how they are written, where they come from, and that a run saves, stops and resumes before them."""

import time

import pytest
import torch
from make_images import FEW
from safetensors.torch import load_file

import funmatch
from funmatch import cli
from funmatch.config import Distill
from funmatch.errors import InputError
from funmatch.runtime import env, time_limit
from funmatch.runtime.text import parse_seconds
from funmatch.runtime.time_limit import find_limit
from funmatch.training.run import folder as run_folder

MINI = {
    "data": FEW, "student": "fashion-mini-student", "batch": 8, "threads": 1, "compile": "off", "workers": 1,
    "device": "cpu", "val": "none",
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("8h30m", 30600), ("510m", 30600), ("30600", 30600), ("30600.0", 30600), ("1-06:00:00", 108000),
        ("1-06", 108000), ("1-06:30", 109800), ("08:30:00", 30600), ("2d", 172800), ("90s", 90), ("1.5h", 5400),
        (" 8H30M ", 30600),
    ],
)  # fmt: skip
def test_durations(text, seconds):
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["8:30", "", "h", "8x", "-5", "1e3", "nan", "8h30", "30m8h", "1-"])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(InputError, match="time_limit"):
        Distill.checked(data="d", teacher="t", student="s", out="o", steps=1, time_limit=text)


@pytest.mark.parametrize("wrong", ["0", 0, "0h"])
def test_a_limit_is_longer_than_nothing(wrong):
    with pytest.raises(InputError, match="time_limit must be longer than 0 seconds"):
        Distill.checked(data="d", teacher="t", student="s", out="o", steps=1, time_limit=wrong)


def test_the_limit_counts_from_the_start_of_the_program_or_of_the_call():
    assert find_limit(None).left == float("inf")
    assert find_limit("1h").end == env.STARTED + 3600
    with time_limit.counted_from_here():
        assert find_limit("1h").end == pytest.approx(time.monotonic() + 3600, abs=1)
    assert find_limit("1h").end == env.STARTED + 3600


def test_the_end_of_a_slurm_job_is_a_limit(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 600))
    assert find_limit(None).end == pytest.approx(time.monotonic() + 600, abs=2)
    with time_limit.counted_from_here():
        assert find_limit("1h").name == "the end of the Slurm job"
        assert find_limit("5m").name == "the time limit of 5:00"
    # Of a job that is over, in a shell that outlived it.
    for old in (str(int(time.time()) - 86400), "soon", ""):
        monkeypatch.setenv("SLURM_JOB_END_TIME", old)
        assert find_limit(None).left == float("inf")


def test_a_run_saves_before_the_limit_and_resumes_to_the_same_bits(tmp_path, capsys):
    whole = funmatch.train(out=tmp_path / "whole", steps=30, **MINI).folder
    with pytest.raises(
        funmatch.TimeLimitReached, match=r"saved step 1 of 30 in .*; run the same command again"
    ) as error:
        funmatch.train(out=tmp_path / "run", steps=30, time_limit=0.5, **MINI)
    assert isinstance(error.value, KeyboardInterrupt | funmatch.Interrupted)
    assert "the time limit of 0:00 is reached in" in capsys.readouterr().err
    assert run_folder.saved_step(tmp_path / "run" / "checkpoints") == 1
    # Another limit, or none, is not another run.
    resumed = funmatch.train(out=tmp_path / "run", steps=30, **MINI).folder
    first, second = (load_file(each / "student" / "model.safetensors") for each in (whole, resumed))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_the_command_line_exits_with_0(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(time_limit, "_began", time.monotonic())
    words = [f"--{name.replace('_', '-')}={value}" for name, value in MINI.items()]
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", *words, "--steps", "100000", "--time-limit", "1s", "--out", str(tmp_path / "run")])
    assert ended.value.code == 0
    assert 1 <= run_folder.saved_step(tmp_path / "run" / "checkpoints") < 100_000
    assert capsys.readouterr().err.splitlines()[-1].startswith("the time limit of 0:01 is nearly reached: saved step ")


def test_a_search_begins_no_trial_that_cannot_take_a_step(tmp_path):
    pytest.importorskip("optuna")
    options = {name: value for name, value in MINI.items() if name != "val"} | {"steps": 4}
    with pytest.raises(funmatch.TimeLimitReached, match="0 of 2 trials are over"):
        funmatch.tune("train", space={"lr": [1e-3, 1e-2]}, out=tmp_path / "s", trials=2, time_limit=0.1, **options)
    assert not list((tmp_path / "s").glob("trials/*/*"))
    found = funmatch.tune("train", space={"lr": [1e-3, 1e-2]}, out=tmp_path / "s", trials=2, **options)
    assert len(found.metrics["trials"]) == 2
