"""Extended runs equal runs that were long from the start, and keep the result of the shorter run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from make_images import FEW
from safetensors.torch import load_file

import funmatch
from funmatch.config import Report
from funmatch.errors import InputError
from funmatch.reports import run_page
from funmatch.runtime.disk import records as run_records
from funmatch.training.run import checkpoint, extend
from funmatch.training.run import folder as run_folder

OPTIONS = {
    "data": FEW, "teacher": "fashion-mini-teacher", "student": "fashion-mini-student", "batch": 8,
    "threads": 1, "schedule": "wsd", "log_every": 3, "eval_every": 10, "save_every": 5, "ema": 0.9,
}  # fmt: skip
# No length is a multiple of log_every or eval_every, so each run ends between two regular records.
SHORT, LONG = {"steps": 20, "cooldown_steps": 6}, {"steps": 34, "cooldown_steps": 9}


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    newest = max((folder / "checkpoints").glob("step-*"))
    names = ("student", "optimizer", "average")
    return {f"{name}.{key}": t for name in names for key, t in load_file(newest / f"{name}.safetensors").items()}


def records(folder: Path) -> list[dict]:
    return [
        {name: value for name, value in each.items() if name != "images_per_second"}
        for each in run_folder.Run(folder).metrics.read()
    ]


def assert_same_runs(one: Path, other: Path) -> None:
    first, second = state_of(one), state_of(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    assert records(one) == records(other)
    results = [run_folder.Run(folder).result or {} for folder in (one, other)]
    for result in results:
        result.pop("seconds")
        result.pop("run")
    assert results[0] == results[1]


@pytest.fixture(name="long", scope="module")
def uninterrupted_long_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUNMATCH_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        return funmatch.distill(out=folder, **OPTIONS, **LONG, warmup_steps=2).folder


def test_extended_run_equals_uninterrupted_long_run(tmp_path, long, finished_run):
    short = finished_run(tmp_path / "run", **OPTIONS, **SHORT)
    folder, metrics = short.folder, short.figures
    assert json.loads((folder / "config.json").read_text())["knobs"]["warmup_steps"] == 2
    student = load_file(folder / "student" / "model.safetensors")
    tail = [each for each in records(folder) if each["step"] > 14]
    longer = funmatch.distill(out=folder, **OPTIONS, **LONG)
    assert longer.figures["step"] == 34
    assert_same_runs(folder, long)
    end = folder / "ends" / "step-000000020"
    kept_result = json.loads((end / "result.json").read_text())
    assert {**kept_result, "run": metrics["run"], "checksum": None} == {**metrics, "checksum": None}
    for name, tensor in load_file(end / "student" / "model.safetensors").items():
        assert torch.equal(tensor, student[name])
    assert (end / "student-ema" / "model.safetensors").is_file()
    assert records(end) == tail
    assert timm.create_model(f"local-dir:{end / 'student'}", pretrained=True)

    page = run_page.write_page(Report(runs=(folder,))).read_text()
    assert "run, end at step 20" in page
    assert "run, end at step 20, EMA weights" in page
    assert "run, EMA weights" in page
    assert run_folder.Run(folder).result == longer.figures
    # A third length with the default cool-down, a fifth of the run; repeating it has nothing to do.
    more = funmatch.distill(out=folder, **OPTIONS, steps=50)
    assert more.figures["step"] == 50
    assert [path.folder.name for path in extend.earlier_ends(run_folder.Run(folder))] == [
        "step-000000020",
        "step-000000034",
    ]
    assert [path.name for path in (folder / "checkpoints").glob("stable-*")] == ["stable-000000040"]
    stamp = (folder / "result.json").stat().st_mtime_ns
    funmatch.distill(out=folder, **OPTIONS, steps=50)
    assert (folder / "result.json").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    "stop", [pytest.param(8, marks=pytest.mark.slow), 17], ids=["before its cool-down", "in its cool-down"]
)
def test_unfinished_run_can_be_extended(tmp_path, long, monkeypatch, stop):
    folder, original = tmp_path / "stopped", checkpoint.save

    def save_and_stop(target, tensors, state):
        original(target, tensors, state)
        if state.step >= stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        funmatch.distill(out=folder, **OPTIONS, **SHORT)
    monkeypatch.setattr(checkpoint, "save", original)
    assert funmatch.distill(out=folder, **OPTIONS, **LONG).figures["step"] == 34
    assert_same_runs(folder, long)
    assert not (folder / "ends").exists(), "the shorter run had not finished"


@pytest.mark.slow
def test_interrupted_extension_loses_nothing(tmp_path, long, monkeypatch, finished_run):
    first = finished_run(tmp_path / "short", **OPTIONS, **SHORT).folder
    before = state_of(first)
    for number in range(5):
        folder = tmp_path / f"cut-{number}"
        shutil.copytree(first, folder)
        calls = []

        def interrupt(*args, calls=calls, number=number, original, **more):
            calls.append(1)
            if len(calls) > number:
                raise KeyboardInterrupt
            return original(*args, **more)

        patches = [
            (extend, "write_folder_atomically"),
            (run_records, "write_atomically"),
            (checkpoint, "go_back"),
            (shutil, "rmtree"),
        ]
        with monkeypatch.context() as patch:
            for module, name in patches:
                original = getattr(module, name)
                patch.setattr(module, name, lambda *a, original=original, **k: interrupt(*a, original=original, **k))
            with pytest.raises(KeyboardInterrupt):
                extend.extend(folder, *_longer_config(folder, LONG))
        if number % 2:  # the old command still gives the old result
            funmatch.distill(out=folder, **OPTIONS, **SHORT)
            for name, tensor in state_of(folder).items():
                assert torch.equal(tensor, before[name])
        assert funmatch.distill(out=folder, **OPTIONS, **LONG).figures["step"] == 34
        assert_same_runs(folder, long)
        assert (folder / "ends" / "step-000000020" / "student" / "model.safetensors").is_file()


def _longer_config(folder: Path, length: dict) -> tuple[str, dict, dict]:
    config = run_folder.Run(folder).config
    return config["verb"], config["knobs"] | length, config["facts"]


@pytest.mark.parametrize(
    ("length", "message"),
    [
        ({"steps": 10}, "can be made longer, not 10"),
        ({"steps": 22, "cooldown_steps": 12}, "would cool down from step 10, before the 14 .* pass cooldown_steps=8"),
        ({"steps": 30, "lr": 1e-2}, "steps: 20 in the run, 30 now"),
        ({"steps": 30, "warmup_steps": 5}, "warmup_steps: 2 in the run, 5 now"),
    ],
)
def test_impossible_extensions_are_refused(tmp_path, length, message, finished_run):
    folder = finished_run(tmp_path / "run", **OPTIONS, **SHORT).folder
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(InputError, match=message):
        funmatch.distill(out=folder, **OPTIONS | length)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.slow
def test_all_ends_after_early_stopping_are_kept(tmp_path):
    options = OPTIONS | {"patience": 1, "eval_every": 2, "lr": 1e-9, "cooldown_steps": 4}
    for steps in (20, 30, 40):
        metrics = funmatch.distill(out=tmp_path / "run", **options, steps=steps).figures
        assert metrics["step"] == 4, "with so small a learning rate, validation never improves"
    names = [each.folder.name for each in extend.earlier_ends(run_folder.Run(tmp_path / "run"))]
    assert names == ["step-000000004-of-000000020", "step-000000004-of-000000030"]


def test_run_without_a_stable_phase_starts_over(tmp_path):
    first = funmatch.distill(out=tmp_path / "run", **OPTIONS, steps=6, cooldown_steps=6)
    longer = funmatch.distill(out=tmp_path / "run", **OPTIONS, steps=9, cooldown_steps=9)
    assert (first.figures["step"], longer.figures["step"]) == (6, 9)


def test_error_names_the_kept_end_of_a_shorter_run(tmp_path, finished_run):
    folder = finished_run(tmp_path / "run", **OPTIONS, **SHORT).folder
    funmatch.distill(out=folder, **OPTIONS, **LONG)
    with pytest.raises(InputError, match=r"its end at step 20 is kept in .*step-000000020"):
        funmatch.distill(out=folder, **OPTIONS, **SHORT)


def test_other_schedules_cannot_be_extended(tmp_path):
    options = OPTIONS | {"schedule": "cosine"}
    folder = funmatch.distill(out=tmp_path / "run", **options, steps=6).folder
    with pytest.raises(InputError, match='only runs of schedule="wsd" can be extended'):
        funmatch.distill(out=folder, **options, steps=8)


@pytest.mark.slow
def test_training_on_labels_with_keep_best_can_be_extended(tmp_path):
    options = {name: value for name, value in OPTIONS.items() if name not in ("teacher", "ema")}
    options |= {"keep": "best", "eval_every": 2}
    long = funmatch.train(out=tmp_path / "long", **options, **LONG, warmup_steps=2).folder
    folder = funmatch.train(out=tmp_path / "run", **options, **SHORT).folder
    assert funmatch.train(out=folder, **options, **LONG).figures["step"] == 34
    assert records(folder) == records(long)
    for name, tensor in load_file(folder / "student" / "model.safetensors").items():
        assert torch.equal(tensor, load_file(long / "student" / "model.safetensors")[name])


@pytest.mark.slow
def test_kills_at_random_times_change_no_bit(tmp_path, long):
    argv = [sys.executable, "-m", "funmatch", "distill", "--out", str(tmp_path / "run"), "--warmup-steps", "2"]
    options = [word for name, value in OPTIONS.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    for length, kills in ((SHORT, 2), (LONG, 8)):
        more = [word for name, value in length.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        for number in range(kills):
            process = subprocess.Popen([*argv, *options, *more], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            time.sleep(3 + 0.7 * number)
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
            process.wait()
        subprocess.run([*argv, *options, *more], check=True, capture_output=True)
    assert_same_runs(tmp_path / "run", long)
    assert (tmp_path / "run" / "ends" / "step-000000020" / "result.json").is_file()
