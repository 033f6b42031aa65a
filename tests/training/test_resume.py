"""A run stopped anywhere and resumed equals an uninterrupted run bitwise."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from make_images import FEW
from safetensors.torch import load_file

import funmatch
import funmatch.training.run.folder
from funmatch.errors import InputError
from funmatch.training.run import tensor_files

# With dropout and stochastic depth, whose masks a resumed run must draw too; no checkpoint falls on an evaluation.
ARGV = [
    "--data", "fashion-mini", "--teacher", "fashion-mini-teacher", "--batch", "16",
    "--student", "resnet10t", "--student-kwargs", "channels=8,16,16,24", "stem_width=8", "drop_rate=0.2",
    "drop_path_rate=0.1", "--side", "28", "--steps", "60", "--save-every", "7", "--eval-every", "20",
    "--log-every", "5",
]  # fmt: skip


def start_run(out: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "funmatch", "distill", *ARGV, "--out", str(out)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ,
    )  # fmt: skip


def finish_run(out: Path) -> None:
    process = start_run(out)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err.decode()


def newest_step(out: Path) -> int:
    """The newest checkpoint's step."""
    return max((int(path.name[5:]) for path in (out / "checkpoints").glob("step-*")), default=0)


def assert_same(a: Path, b: Path) -> None:
    first, second = (load_file(run / "student" / "model.safetensors") for run in (a, b))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name

    def records_of(run: Path) -> list:
        lines = funmatch.training.run.folder.Run(run).metrics.read()
        return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]

    assert records_of(a) == records_of(b), "the records equal those of the other run"


@pytest.mark.slow
def test_kills_at_random_times_change_no_bit(tmp_path):
    finish_run(tmp_path / "whole")
    rng = random.Random(0)
    for _ in range(4):
        process = start_run(tmp_path / "killed")
        time.sleep(rng.uniform(4, 9))
        process.kill()
        process.communicate()
    finish_run(tmp_path / "killed")
    assert_same(tmp_path / "whole", tmp_path / "killed")
    assert not list((tmp_path / "killed").rglob("*partial*"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["INT", "TERM", "HUP", "USR1", "USR2", "XCPU"])
def test_signals_save_a_checkpoint_before_exit(tmp_path, name):
    number = signal.Signals[f"SIG{name}"]
    finish_run(tmp_path / "whole")
    process = start_run(tmp_path / "stopped")
    while not newest_step(tmp_path / "stopped") and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number, err.decode()
    assert "saved step" in err.decode()
    assert "Traceback" not in err.decode()
    step = newest_step(tmp_path / "stopped")
    assert f"saved step {step} of 60" in err.decode()
    finish_run(tmp_path / "stopped")
    assert_same(tmp_path / "whole", tmp_path / "stopped")


class PowerLoss(Exception):
    """Stands for a power loss."""


def lose_power(*_args, **_kwargs):
    raise PowerLoss


@pytest.mark.parametrize("moment", ["save", pytest.param("save_best", marks=pytest.mark.slow), "finish"])
def test_power_loss_while_writing_changes_no_bit(tmp_path, monkeypatch, finished_run, moment):
    """No complete checkpoint is lost, and the resumed run equals an uninterrupted one."""
    options = {"data": FEW, "teacher": "fashion-mini-teacher", "student": "fashion-mini-student"}
    options |= {"batch": 8, "steps": 12, "save_every": 4, "eval_every": 6, "log_every": 3}
    finished_run(tmp_path / "whole", **options)
    saved = []
    if moment == "finish":
        monkeypatch.setattr("timm.models.save_for_hf", lose_power)
    else:
        original_save = tensor_files.save_file

        def truncate_and_lose_power(tensors, path):
            saved.append(path)
            original_save(tensors, path)
            if len(saved) == {"save": 4, "save_best": 3}[moment]:
                with open(path, "r+b") as file:
                    file.truncate(100)
                raise PowerLoss

        monkeypatch.setattr(tensor_files, "save_file", truncate_and_lose_power)
    with pytest.raises(PowerLoss):
        funmatch.distill(out=tmp_path / "run", **options)
    monkeypatch.undo()
    monkeypatch.setenv("FUNMATCH_CACHE", str(tmp_path / "cache"))
    assert not (tmp_path / "run" / "result.json").exists()
    funmatch.distill(out=tmp_path / "run", **options)
    assert_same(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "shampoo", "optimizer_kwargs": {"block_size": 16, "start_preconditioning_step": 3}},
        pytest.param({"optimizer": "lamb", "schedule": "wsd", "cooldown_steps": 3}, marks=pytest.mark.slow),
        {"momentum_dtype": "bf16", "schedule": "quadratic"},
    ],
    ids=["shampoo", "lamb", "bf16"],
)
def test_resumed_run_equals_uninterrupted_run_with_other_optimizers(tmp_path, monkeypatch, options):
    options = {"data": FEW, "student": "fashion-mini-student", "batch": 8, "steps": 8, **options}
    options |= {"save_every": 3, "eval_every": 4, "log_every": 2}
    funmatch.train(out=tmp_path / "whole", **options)
    monkeypatch.setattr("timm.models.save_for_hf", lose_power)
    with pytest.raises(PowerLoss):
        funmatch.train(out=tmp_path / "run", **options)
    monkeypatch.undo()
    monkeypatch.setenv("FUNMATCH_CACHE", str(tmp_path / "cache"))
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.rmtree(max(checkpoints.glob("step-*")))
    assert newest_step(tmp_path / "run") == 6
    funmatch.train(out=tmp_path / "run", **options)
    assert_same(tmp_path / "whole", tmp_path / "run")


def test_run_in_use_is_refused(tmp_path):
    with funmatch.training.run.folder.open_run(tmp_path / "run", "train", {}, {}):
        second = funmatch.training.run.folder.open_run(tmp_path / "run", "train", {}, {})
        with pytest.raises(InputError, match="is using"):
            second.__enter__()


def test_folder_that_is_not_a_run_is_refused_and_kept(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="exists and is not a run"):
        funmatch.train("fashion-mini", "fashion-mini-student", tmp_path / "mine", steps=1)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_partial_last_line_of_metrics_is_dropped(tmp_path):
    metrics = funmatch.training.run.folder.Run(tmp_path).metrics
    for step in (1, 2, 3):
        metrics.write("step", step, loss=0.5)
    with open(metrics.path, "a") as file:
        file.write('{"event": "step", "st')
    metrics.truncate(2)
    assert [record["step"] for record in metrics.read()] == [1, 2]


@pytest.fixture(name="stopped")
def run_without_result(tmp_path, finished_run):
    """A run that lacks only its result, and a function that resumes it and compares the student."""
    options = {"data": FEW, "student": "fashion-mini-student", "batch": 8, "steps": 6, "save_every": 2}
    run = finished_run(tmp_path / "run", "train", **options)
    (run.folder / "result.json").unlink()
    before = load_file(run.folder / "student" / "model.safetensors")

    def resume():
        funmatch.train(out=tmp_path / "run", **options)
        after = load_file(run.folder / "student" / "model.safetensors")
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())

    return run.folder, resume


@pytest.mark.parametrize(
    "damage",
    [
        lambda newest: os.truncate(newest / "student.safetensors", 1000),
        lambda newest: (newest / "optimizer.safetensors").unlink(),
        lambda newest: (newest / "state.json").write_text("{"),
        lambda newest: (newest.parent / "best-abc").mkdir(),
        lambda newest: (newest.parent.parent / "metrics.jsonl").write_bytes(b'\xff\xfe\x00\n5\n{"a": 1}\n'),
        lambda newest: (newest.parent.parent / "result.json").write_text("{"),
        lambda newest: (newest.parent.parent / ".config.json.x1.partial").write_text("{"),
    ],
)
def test_run_resumes_with_damaged_files(stopped, damage):
    folder, resume = stopped
    damage(folder / "checkpoints" / "step-000000006")
    resume()
    assert not list(folder.glob(".*.partial"))


def test_run_without_a_readable_checkpoint_is_reported(stopped):
    folder, resume = stopped
    for checkpoint_folder in (folder / "checkpoints").glob("step-*"):
        (checkpoint_folder / "state.json").write_text("{")
    with pytest.raises(InputError, match=r"no checkpoint .* can be read"):
        resume()


@pytest.mark.parametrize("content", ["{bad", '{"verb": "train"}', "[]"])
def test_damaged_config_is_reported(stopped, content):
    folder, resume = stopped
    (folder / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"config\.json is damaged"):
        resume()


def test_partial_file_of_a_killed_start_is_ignored(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.json.abc.partial").write_text("{")
    funmatch.train(FEW, "fashion-mini-student", tmp_path / "run", steps=1, batch=8)


def test_non_finite_weights_are_never_saved(tmp_path):
    with pytest.raises(InputError, match="weights are no longer finite at step 1"):
        funmatch.train(FEW, "fashion-mini-student", tmp_path / "run", steps=1, warmup_steps=0, lr=1e38)
    assert not (tmp_path / "run" / "result.json").exists()
    assert not list((tmp_path / "run").rglob("*.safetensors"))
