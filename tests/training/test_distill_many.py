"""Several students share one teacher pass, and each equals the student trained alone."""

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
from funmatch.runtime.disk.json_files import seal
from funmatch.training import distill_many
from funmatch.training.teachers import loading
from funmatch.training.teachers.source import SharedCache
from funmatch.training.trainer import Trainer

# Without compilation and on one thread, so that each student is bitwise comparable.
OPTIONS = {
    "data": FEW, "teacher": "fashion-mini-teacher", "side": 32, "batch": 8, "eval_every": 4,
    "save_every": 3, "log_every": 2, "steps": 10, "threads": 1, "compile": "off",
}  # fmt: skip
STUDENTS = ["fashion-mini-student", "test_resnet"]


def weights(folder: Path) -> bytes:
    return (folder / "student" / "model.safetensors").read_bytes()


def records_of(folder: Path) -> list[dict]:
    """Records of a run without throughput."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    lines_of_the_run = [line for line in lines if line["event"] != "teacher"]  # its modes are chosen on the first batch
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in lines_of_the_run]


@pytest.mark.parametrize(
    "more",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"teacher_ahead": True, "mixup_mode": "image"},
        pytest.param({"strategy": "ind/rc"}, marks=pytest.mark.slow),
    ],
)
def test_students_together_equal_students_alone_with_one_teacher_pass(tmp_path, monkeypatch, more):
    teacher_calls: list[int] = []
    forward = TeacherEnsemble.forward
    monkeypatch.setattr(
        TeacherEnsemble, "forward", lambda self, *args: (teacher_calls.append(1), forward(self, *args))[1]
    )
    both = funmatch.distill_several(**OPTIONS, **more, students=STUDENTS, out=tmp_path / "both")
    calls_together = len(teacher_calls)
    assert [run.folder.name for run in both] == STUDENTS
    teacher_calls.clear()
    for student, run in zip(STUDENTS, both, strict=True):
        alone = funmatch.distill(**OPTIONS, **more, student=student, out=tmp_path / "alone" / student)
        assert weights(alone.folder) == weights(run.folder)
        assert records_of(alone.folder) == records_of(run.folder)
        assert alone.top1 == run.top1
        assert run.report.is_file()
    assert calls_together < 0.6 * len(teacher_calls)


@pytest.mark.slow
def test_student_that_is_behind_catches_up(tmp_path):
    funmatch.distill(**OPTIONS | {"steps": 10}, student=STUDENTS[0], out=tmp_path / "both" / STUDENTS[0])
    both = funmatch.distill_several(**OPTIONS, students=STUDENTS, out=tmp_path / "both")
    alone = funmatch.distill(**OPTIONS, student=STUDENTS[1], out=tmp_path / "alone")
    assert weights(alone.folder) == weights(both[1].folder)


@pytest.mark.slow
def test_killed_and_stopped_students_resume_equally(tmp_path):
    argv = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items() if name != "steps"]
    argv += ["--student", STUDENTS[0], f"--student={STUDENTS[1]}", "--steps", "60", "--out", str(tmp_path / "both")]
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = subprocess.Popen(
            [sys.executable, "-m", "funmatch", "distill", *argv], stderr=subprocess.PIPE, text=True, env=os.environ
        )
        metrics = tmp_path / "both" / STUDENTS[1] / "metrics.jsonl"
        lines_before, until = metrics.read_text().count("\n") if metrics.is_file() else 0, time.monotonic() + 120
        while time.monotonic() < until and process.poll() is None:
            if metrics.is_file() and metrics.read_text().count("\n") > lines_before + 6:
                break
            time.sleep(0.02)
        process.send_signal(number)
        _, output = process.communicate(timeout=120)
        assert process.returncode in (0, -9 if number == signal.SIGKILL else 128 + number), output
        if process.returncode == 128 + number:
            assert "all students are saved; run the same command again to resume" in output
    done = subprocess.run(
        [sys.executable, "-m", "funmatch", "distill", *argv, "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [Path(run["run"]).name for run in json.loads(done.stdout)["runs"]] == STUDENTS
    for student in STUDENTS:
        alone = funmatch.distill(**OPTIONS | {"steps": 60}, student=student, out=tmp_path / "alone" / student)
        assert weights(alone.folder) == weights(tmp_path / "both" / student)


def test_failed_student_does_not_stop_the_others(tmp_path, monkeypatch):
    after_step = Trainer.after_step

    def broken(self, *arguments, **options):
        if self.setup.config.student == "test_resnet":
            with torch.no_grad():
                next(self.student.classifier.parameters()).fill_(torch.nan)
        return after_step(self, *arguments, **options)

    monkeypatch.setattr(Trainer, "after_step", broken)
    with pytest.raises(InputError, match=r"1 of 2 students failed:\n.*test_resnet: .*no longer finite"):
        funmatch.distill_several(**OPTIONS, students=["test_resnet", STUDENTS[0]], out=tmp_path / "x")
    assert (tmp_path / "x" / STUDENTS[0] / "result.json").is_file()


def test_students_with_other_crop_kernels_are_refused(tmp_path):
    """A run resumes with the crop kernel it started with, so it cannot share crops of the other kernel."""
    funmatch.distill(**OPTIONS | {"steps": 4}, student=STUDENTS[0], out=tmp_path / "both" / STUDENTS[0])
    record = tmp_path / "both" / STUDENTS[0] / "config.json"
    config = json.loads(record.read_text())
    kernel = config["facts"]["views"]
    config["facts"]["views"] = "native" if kernel == "torch" else "torch"
    config["knobs"]["steps"] = OPTIONS["steps"]
    record.write_text(json.dumps(seal(config)))
    (record.parent / "result.json").unlink()
    with pytest.raises(InputError, match=r"would see different views: native (True and False|False and True)"):
        funmatch.distill_several(**OPTIONS, students=STUDENTS, out=tmp_path / "both")


def test_teachers_are_loaded_once_for_all_students(tmp_path, monkeypatch):
    loads: list[str] = []
    original_load = loading.load

    def counting_load(name, **options):
        loads.append(name)
        return original_load(name, **options)

    monkeypatch.setattr(loading, "load", counting_load)
    funmatch.distill(**OPTIONS | {"steps": 2}, student=STUDENTS[0], out=tmp_path / "alone")
    alone = len(loads)
    loads.clear()
    funmatch.distill_several(**OPTIONS | {"steps": 2}, students=STUDENTS, out=tmp_path / "both")
    assert len(loads) == alone


def test_students_that_cannot_share_views_are_rejected(tmp_path):
    def distill_both(**more):
        options = OPTIONS | {"students": STUDENTS, "out": tmp_path / "x"} | more
        return funmatch.distill_several(**options)

    (tmp_path / "a" / "test_resnet").mkdir(parents=True)
    with pytest.raises(InputError, match="two students have the name test_resnet"):
        distill_both(students=["test_resnet", str(tmp_path / "a" / "test_resnet")])
    with pytest.raises(InputError, match="would see different views: side 32 and 160"):
        distill_both(side=None)
    with pytest.raises(InputError, match="profile works with one student only"):
        distill_both(profile=True)
    assert not (tmp_path / "x").exists()


def test_students_are_split_off_the_arguments():
    argv = ["--data", "x", "--student", "a", "--lr", "1", "--student=b"]
    assert split_students(argv) == (["--data", "x", "--student", "a", "--lr", "1"], ("a", "b"))
    assert distill_many.folder_name("runs/one/") == "one"
    assert distill_many.folder_name("hf-hub:me/net") == "net"
    assert timm.is_model("test_resnet")


def test_shared_cache_computes_once_and_drops_the_oldest():
    computed, cache = [], SharedCache(2)
    for name in "aabaca":
        assert cache(name, lambda name=name: computed.append(name) or name.upper()) == name.upper()
    assert computed == ["a", "b", "c", "a"], "the oldest entry, a, was dropped when c came"
    with pytest.raises(ZeroDivisionError):
        cache("bad", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cache("bad", lambda: 1)
