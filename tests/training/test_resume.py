"""Stopped anywhere and started again, a run ends with the very same bits."""

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
from funmatch.training.run import checkpoint

WORDS = [
    "--data", "fashion-mini", "--teacher", "fashion-mini-teacher", "--batch", "16",
    "--student", "resnet10t", "--student-kwargs", "channels=8,16,16,24", "stem_width=8", "drop_rate=0.2",
    "drop_path_rate=0.1", "--side", "28", "--steps", "60", "--save-every", "7", "--eval-every", "20",
    "--log-every", "5",
]  # fmt: skip


def start(out: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "funmatch", "distill", *WORDS, "--out", str(out)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ,
    )  # fmt: skip


def finish(out: Path) -> None:
    process = start(out)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err.decode()


def reached(out: Path) -> int:
    """The newest checkpoint's step."""
    return max((int(path.name[5:]) for path in (out / "checkpoints").glob("step-*")), default=0)


def assert_same(a: Path, b: Path) -> None:
    first, second = (load_file(run / "student" / "model.safetensors") for run in (a, b))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name

    def told(run: Path) -> list:
        lines = funmatch.training.run.folder.Run(run).metrics.read()
        return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]

    assert told(a) == told(b), "the records are those of a run that was never stopped"


@pytest.mark.slow
def test_kills_at_random_instants_change_no_bit(tmp_path):
    finish(tmp_path / "whole")
    rng = random.Random(0)
    for _ in range(4):
        process = start(tmp_path / "killed")
        time.sleep(rng.uniform(4, 9))
        process.kill()
        process.communicate()
    finish(tmp_path / "killed")
    assert_same(tmp_path / "whole", tmp_path / "killed")
    assert not list((tmp_path / "killed").rglob("*partial*"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_first(tmp_path, number):
    finish(tmp_path / "whole")
    process = start(tmp_path / "stopped")
    while not reached(tmp_path / "stopped") and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number, err.decode()
    assert "saved step" in err.decode()
    assert "Traceback" not in err.decode()
    step = reached(tmp_path / "stopped")
    assert f"saved step {step} of 60" in err.decode()
    finish(tmp_path / "stopped")
    assert_same(tmp_path / "whole", tmp_path / "stopped")


class Power(Exception):
    """The lights go out."""


def dies_at_once(*_args, **_kwargs):
    raise Power


@pytest.mark.parametrize("moment", ["save", "save_best", "finish"])
def test_a_stop_in_the_middle_of_writing(tmp_path, monkeypatch, finished_run, moment):
    """Nothing that was whole is lost, and the run ends as if nothing had happened."""
    knobs = {"data": FEW, "teacher": "fashion-mini-teacher", "student": "fashion-mini-student"}
    knobs |= {"batch": 8, "steps": 12, "save_every": 4, "eval_every": 6, "log_every": 3}
    finished_run(tmp_path / "whole", **knobs)
    written = []
    if moment == "finish":
        monkeypatch.setattr("timm.models.save_for_hf", dies_at_once)
    else:
        real = checkpoint.save_file

        def dies(tensors, path):
            written.append(path)
            real(tensors, path)
            if len(written) == {"save": 4, "save_best": 3}[moment]:
                with open(path, "r+b") as file:
                    file.truncate(100)
                raise Power

        monkeypatch.setattr(checkpoint, "save_file", dies)
    with pytest.raises(Power):
        funmatch.distill(out=tmp_path / "run", **knobs)
    monkeypatch.undo()
    monkeypatch.setenv("FUNMATCH_CACHE", str(tmp_path / "cache"))
    assert not (tmp_path / "run" / "result.json").exists()
    funmatch.distill(out=tmp_path / "run", **knobs)
    assert_same(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize(
    "knobs",
    [
        {"optimizer": "shampoo", "optimizer_kwargs": {"block_size": 16, "start_preconditioning_step": 3}},
        {"optimizer": "lamb", "schedule": "wsd", "cooldown_steps": 3},
        {"momentum_dtype": "bf16", "schedule": "quadratic"},
    ],
    ids=["shampoo", "lamb", "bf16"],
)
def test_a_stop_changes_no_bit_with_another_optimizer(tmp_path, monkeypatch, knobs):
    knobs = {"data": FEW, "student": "fashion-mini-student", "batch": 8, "steps": 8, **knobs}
    knobs |= {"save_every": 3, "eval_every": 4, "log_every": 2}
    funmatch.train(out=tmp_path / "whole", **knobs)
    monkeypatch.setattr("timm.models.save_for_hf", dies_at_once)
    with pytest.raises(Power):
        funmatch.train(out=tmp_path / "run", **knobs)
    monkeypatch.undo()
    monkeypatch.setenv("FUNMATCH_CACHE", str(tmp_path / "cache"))
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.rmtree(max(checkpoints.glob("step-*")))
    assert reached(tmp_path / "run") == 6
    funmatch.train(out=tmp_path / "run", **knobs)
    assert_same(tmp_path / "whole", tmp_path / "run")


def test_two_processes_do_not_share_a_run(tmp_path):
    with funmatch.training.run.folder.open_run(tmp_path / "run", "train", {}, {}):
        second = funmatch.training.run.folder.open_run(tmp_path / "run", "train", {}, {})
        with pytest.raises(InputError, match="is using"):
            second.__enter__()


def test_an_existing_folder_that_is_no_run_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="exists and is not a run"):
        funmatch.train("fashion-mini", "fashion-mini-student", tmp_path / "mine", steps=1)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_a_last_line_that_was_cut_short_is_dropped(tmp_path):
    metrics = funmatch.training.run.folder.Run(tmp_path).metrics
    for step in (1, 2, 3):
        metrics.write("step", step, loss=0.5)
    with open(metrics.path, "a") as file:
        file.write('{"event": "step", "st')
    metrics.truncate(2)
    assert [record["step"] for record in metrics.read()] == [1, 2]


@pytest.fixture(name="stopped")
def run_with_two_checkpoints(tmp_path, finished_run):
    """A run that has all but its end, and the knobs that go on with it."""
    knobs = {"data": FEW, "student": "fashion-mini-student", "batch": 8, "steps": 6, "save_every": 2}
    run = finished_run(tmp_path / "run", "train", **knobs)
    (run.folder / "result.json").unlink()
    before = load_file(run.folder / "student" / "model.safetensors")

    def again():
        funmatch.train(out=tmp_path / "run", **knobs)
        after = load_file(run.folder / "student" / "model.safetensors")
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())

    return run.folder, again


@pytest.mark.parametrize(
    "spoil",
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
def test_a_run_survives_what_a_disk_may_do_to_it(stopped, spoil):
    folder, again = stopped
    spoil(folder / "checkpoints" / "step-000000006")
    again()
    assert not list(folder.glob(".*.partial"))


def test_checkpoints_that_are_all_damaged_are_told(stopped):
    folder, again = stopped
    for checkpoint_folder in (folder / "checkpoints").glob("step-*"):
        (checkpoint_folder / "state.json").write_text("{")
    with pytest.raises(InputError, match=r"no checkpoint .* can be read"):
        again()


@pytest.mark.parametrize("content", ["{bad", '{"verb": "train"}', "[]"])
def test_a_damaged_configuration_is_told(stopped, content):
    folder, again = stopped
    (folder / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"config\.json is damaged"):
        again()


def test_what_a_kill_left_before_the_first_file_is_no_obstacle(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.json.abc.partial").write_text("{")
    funmatch.train("fashion-mini", "fashion-mini-student", tmp_path / "run", steps=1, batch=8)


def test_an_update_that_ruins_the_student_is_never_saved(tmp_path):
    with pytest.raises(InputError, match="weights are no longer finite at step 1"):
        funmatch.train("fashion-mini", "fashion-mini-student", tmp_path / "run", steps=1, warmup_steps=0, lr=1e38)
    assert not (tmp_path / "run" / "result.json").exists()
    assert not list((tmp_path / "run").rglob("*.safetensors"))
