"""Many students, one teacher pass: each as it would be alone, whatever stops them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from make_images import FEW

import funmatch
from funmatch.argv import split_students
from funmatch.errors import InputError
from funmatch.models.ensemble import TeacherEnsemble
from funmatch.training import distill_many
from funmatch.training.teachers import loading
from funmatch.training.teachers.source import SharedCache
from funmatch.training.trainer import Trainer

TOLD = {
    "data": FEW, "teacher": "fashion-mini-teacher", "side": 32, "batch": 16, "eval_every": 4,
    "save_every": 3, "log_every": 2, "steps": 10, "threads": 1, "compile": "off",
}  # fmt: skip
STUDENTS = ["fashion-mini-student", "test_resnet"]


def weights(folder: Path) -> bytes:
    return (folder / "student" / "model.safetensors").read_bytes()


def figures_of(folder: Path) -> list[dict]:
    """What a run records, but for times."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    own = [line for line in lines if line["event"] != "teacher"]  # which tells of the first batch's forms, too
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in own]


@pytest.mark.parametrize("more", [{}, {"teacher_ahead": True, "mixup_mode": "image"}, {"strategy": "ind/rc"}])
def test_each_is_as_it_would_be_alone_and_the_teacher_is_asked_once(tmp_path, monkeypatch, more):
    asked: list[int] = []
    forward = TeacherEnsemble.forward
    monkeypatch.setattr(TeacherEnsemble, "forward", lambda self, *given: (asked.append(1), forward(self, *given))[1])
    both = funmatch.distill_several(**TOLD, **more, students=STUDENTS, out=tmp_path / "both")
    together = len(asked)
    assert [run.folder.name for run in both] == STUDENTS
    asked.clear()
    for student, run in zip(STUDENTS, both, strict=True):
        alone = funmatch.distill(**TOLD, **more, student=student, out=tmp_path / "alone" / student)
        assert weights(alone.folder) == weights(run.folder)
        assert figures_of(alone.folder) == figures_of(run.folder)
        assert alone.top1 == run.top1
        assert run.report.is_file()
    assert together < 0.6 * len(asked)


def test_one_that_is_behind_catches_up(tmp_path):
    funmatch.distill(**TOLD | {"steps": 10}, student=STUDENTS[0], out=tmp_path / "both" / STUDENTS[0])
    both = funmatch.distill_several(**TOLD, students=STUDENTS, out=tmp_path / "both")
    alone = funmatch.distill(**TOLD, student=STUDENTS[1], out=tmp_path / "alone")
    assert weights(alone.folder) == weights(both[1].folder)


@pytest.mark.slow
def test_a_kill_and_a_signal_change_nothing(tmp_path):
    words = [f"--{name.replace('_', '-')}={value}" for name, value in TOLD.items() if name != "steps"]
    words += ["--student", STUDENTS[0], f"--student={STUDENTS[1]}", "--steps", "60", "--out", str(tmp_path / "both")]
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = subprocess.Popen(
            [sys.executable, "-m", "funmatch", "distill", *words], stderr=subprocess.PIPE, text=True, env=os.environ
        )
        metrics = tmp_path / "both" / STUDENTS[1] / "metrics.jsonl"
        seen, until = metrics.read_text().count("\n") if metrics.is_file() else 0, time.monotonic() + 120
        while time.monotonic() < until and process.poll() is None:
            if metrics.is_file() and metrics.read_text().count("\n") > seen + 6:
                break
            time.sleep(0.02)
        process.send_signal(number)
        _, told = process.communicate(timeout=120)
        assert process.returncode in (0, -9 if number == signal.SIGKILL else 128 + number), told
        if process.returncode == 128 + number:
            assert "all students are saved; run the same command again to resume" in told
    done = subprocess.run(
        [sys.executable, "-m", "funmatch", "distill", *words, "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [Path(run["run"]).name for run in json.loads(done.stdout)["runs"]] == STUDENTS
    for student in STUDENTS:
        alone = funmatch.distill(**TOLD | {"steps": 60}, student=student, out=tmp_path / "alone" / student)
        assert weights(alone.folder) == weights(tmp_path / "both" / student)


def test_one_that_fails_stops_no_other(tmp_path, monkeypatch):
    check = Trainer.check_weights

    def broken(self):
        if self.setup.config.student == "test_resnet":
            with torch.no_grad():
                next(self.student.classifier.parameters()).fill_(torch.nan)
        check(self)

    monkeypatch.setattr(Trainer, "check_weights", broken)
    with pytest.raises(InputError, match=r"1 of 2 students failed:\n.*test_resnet: .*no longer finite"):
        funmatch.distill_several(**TOLD, students=["test_resnet", STUDENTS[0]], out=tmp_path / "x")
    assert (tmp_path / "x" / STUDENTS[0] / "result.json").is_file()


def test_crops_of_another_kernel_are_not_shared(tmp_path):
    """A run that was begun with torch's crops goes on with them, so it cannot take those of the native kernel."""
    funmatch.distill(**TOLD | {"steps": 4}, student=STUDENTS[0], out=tmp_path / "both" / STUDENTS[0])
    record = tmp_path / "both" / STUDENTS[0] / "config.json"
    config = json.loads(record.read_text())
    was = config["facts"]["views"]
    config["facts"]["views"] = "native" if was == "torch" else "torch"
    config["knobs"]["steps"] = TOLD["steps"]
    record.write_text(json.dumps(config))
    (record.parent / "result.json").unlink()
    with pytest.raises(InputError, match=r"would see different views: native (True and False|False and True)"):
        funmatch.distill_several(**TOLD, students=STUDENTS, out=tmp_path / "both")


def test_teachers_are_loaded_once_for_all_students(tmp_path, monkeypatch):
    loads: list[str] = []
    real = loading.load

    def counted(name, **options):
        loads.append(name)
        return real(name, **options)

    monkeypatch.setattr(loading, "load", counted)
    funmatch.distill(**TOLD | {"steps": 2}, student=STUDENTS[0], out=tmp_path / "alone")
    alone = len(loads)
    loads.clear()
    funmatch.distill_several(**TOLD | {"steps": 2}, students=STUDENTS, out=tmp_path / "both")
    assert len(loads) == alone


def test_bad_words(tmp_path):
    def tried(**more):
        told = TOLD | {"students": STUDENTS, "out": tmp_path / "x"} | more
        return funmatch.distill_several(**told)

    with pytest.raises(InputError, match="two students have the name test_resnet"):
        tried(students=["test_resnet", "a/test_resnet"])
    with pytest.raises(InputError, match="would see different views: side 32 and 160"):
        tried(side=None)
    with pytest.raises(InputError, match="profile works with one student only"):
        tried(profile=True)
    assert not (tmp_path / "x").exists()


def test_students_among_the_words():
    words = ["--data", "x", "--student", "a", "--lr", "1", "--student=b"]
    assert split_students(words) == (["--data", "x", "--student", "a", "--lr", "1"], ("a", "b"))
    assert distill_many.folder_name("runs/one/") == "one"
    assert distill_many.folder_name("hf-hub:me/net") == "net"
    assert timm.is_model("test_resnet")


def test_the_latest_is_made_once_and_forgotten_in_turn():
    made, latest = [], SharedCache(2)
    for name in "aabaca":
        assert latest(name, lambda name=name: made.append(name) or name.upper()) == name.upper()
    assert made == ["a", "b", "c", "a"], "a was the first to come, so it went when c came"
    with pytest.raises(ZeroDivisionError):
        latest("bad", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        latest("bad", lambda: 1)
