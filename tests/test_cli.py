"""The command line: arguments, output and exit codes."""

import errno
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from make_images import FEW, paint

from funmatch.training.run import tensor_files

TEACHER = "fashion-mini-teacher"
MINI = ("--data", FEW, "--student", "fashion-mini-student", "--batch", "16")


def test_help_explains_every_option(funmatch):
    overview = funmatch("--help").stdout
    for verb in ("demo", "distill", "train", "evaluate", "report"):
        assert verb in overview
        assert "Usage: funmatch" in funmatch(verb, "--help").stdout
    text = funmatch("distill", "--help-all").stdout
    from funmatch.config import Distill

    for name in Distill.model_fields:
        assert Distill.description(name), f"{name} has no help"
        assert f"--{'json' if name == 'as_json' else name.replace('_', '-')}" in text
    assert "-b, --batch, --batch-size N" in text
    assert "-j, --workers N" in text


def test_version_is_printed(funmatch):
    assert re.fullmatch(r"funmatch \d+\.\d+\.\d+\n", funmatch("--version").stdout)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("distil",), "here it is `funmatch distill`"),
        (("distilll",), "did you mean 'distill'"),
        (("distill", *MINI, "--tacher", "x", "--out", "o"), "--teacher"),
        (("distill", *MINI, "--teacher", "x", "--steps", "5", "--out", "o", "--precision", "fp8"), "value 'fp8'"),
        (("distill", *MINI, "--teacher", "x", "--out", "o"), "either --steps or --epochs"),
        (("distill", *MINI, "--teacher", "fashion-mini-teecher", "--steps", "5", "--out", "o"), TEACHER),
        (("distill", *MINI, "--teacher", TEACHER, "--steps", "5", "--out", "o", "--device", "tpu"), "available: cpu"),
        (("train", *MINI[2:], "--data", "nowhere/at/all", "--steps", "5", "--out", "o"), "no folder nowhere/at/all"),
        (("train", *MINI, "--lr", "0", "--steps", "0", "--out", "o"), "at least 1, got 0 lr must be above 0"),
        (("train", *MINI, "--steps", "1", "--out", "o", "--student-kwargs", "chanels=3"), "chanels"),
        (("evaluate", "fashion-mini-teacher"), "pass --data"),
        (("report", "nowhere"), "no run folder nowhere"),
        (("report",), "report needs RUN …"),
    ],
)  # fmt: skip
def test_invalid_arguments_get_one_message_and_leave_nothing(funmatch, tmp_path, argv, message):
    result = funmatch(*argv, check=2)
    assert message in re.sub(r"[│╭╰╮╯─]|\s+", " ", result.stderr).replace("  ", " ")
    assert "Traceback" not in result.stderr
    assert not result.stdout
    assert not list(tmp_path.iterdir())


def test_json_output_is_one_object(funmatch, tmp_path):
    argv = ("distill", *MINI, "--teacher", "fashion-mini-teacher", "--steps", "3", "--out", tmp_path / "run", "--json")
    result = funmatch(*argv)
    metrics = json.loads(result.stdout)
    assert {"top1", "agreement", "kl", "step", "run"} <= metrics.keys()
    assert metrics["step"] == 3
    assert metrics["run"] == str(tmp_path / "run")
    again = funmatch(*argv)
    assert json.loads(again.stdout) == metrics
    assert "finished" in again.stderr
    evaluated = json.loads(funmatch("evaluate", tmp_path / "run", "--json").stdout)
    assert evaluated["top1"] == pytest.approx(metrics["top1"])
    assert evaluated["teacher_top1"] == pytest.approx(metrics["teacher"]["top1"])
    assert "teacher's top-1" in funmatch("evaluate", tmp_path / "run").stdout
    assert "teacher's top-1" not in funmatch("evaluate", "fashion-mini-teacher", "--data", "fashion-mini").stdout
    reported = json.loads(funmatch("report", tmp_path / "run", "--json").stdout)
    assert reported["report"] == str(tmp_path / "run" / "report.html")


def test_tables_are_printed_without_json(funmatch, tmp_path):
    result = funmatch("train", *MINI, "--steps", "3", "--out", tmp_path / "run")
    assert "top-1" in result.stdout
    assert "report.html" in result.stdout


def test_demo_compares_labels_and_distillation(funmatch, tmp_path):
    result = funmatch("demo", "--steps", "2", "--json", "--out", tmp_path / "demo")
    metrics = json.loads(result.stdout)
    assert {"teacher", "labels", "student", "run", "report"} <= metrics.keys()
    assert metrics["teacher"]["top1"] > 0.87
    assert all(0 <= metrics[name]["top1"] <= 1 for name in ("labels", "student"))
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "labels" in page
    table = funmatch("demo", "--steps", "2", "--out", tmp_path / "demo").stdout
    assert "function matching" in table
    assert "report:" in table


def test_full_disk_is_reported_and_leaves_no_partial_checkpoint(funmatch, tmp_path, monkeypatch):
    """The disk is full in the middle of the second checkpoint."""
    save = tensor_files.save_file

    def disk_full(tensors, path):
        if "step-000000004" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save(tensors, path)

    argv = ["train", *MINI, "--steps", "6", "--save-every", "2", "--eval-every", "6", "--out", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(tensor_files, "save_file", disk_full)
        result = funmatch(*argv, check=2)
    assert "disk is full" in result.stderr
    assert "Traceback" not in result.stderr
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000000002"]
    funmatch(*argv)


def test_unreadable_images_are_reported(funmatch, tmp_path):
    for name in ("a", "b"):
        for split in ("train", "val"):
            paint(tmp_path / "p" / split / name / "1.png", 1)
    (tmp_path / "p" / "train" / "a" / "1.png").write_bytes(b"PNG?")
    result = funmatch("train", "--data", tmp_path / "p", *MINI[2:], "--steps", "1", "--out", "o", check=2)
    assert "1 unreadable image in p (" in result.stderr
    assert "train/a/1.png: not an image" in result.stderr
    assert not (tmp_path / "o").exists()


def test_progress_goes_to_stderr_without_escape_codes(funmatch, tmp_path):
    result = funmatch("train", *MINI, "--steps", "3", "--out", tmp_path / "run", "--json")
    assert "\x1b[" not in result.stderr + result.stdout
    assert len(result.stdout.splitlines()) == 1


def test_importing_the_package_does_not_import_torch():
    code = "import sys, funmatch, funmatch.cli; assert 'torch' not in sys.modules and 'timm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)  # a fresh interpreter: this one has torch loaded


def test_non_finite_numbers_are_reported_with_other_problems(tmp_path, funmatch):
    argv = ["--data", "fashion-mini", "--teacher", "fashion-mini-teacher", "--student", "fashion-mini-student"]
    argv += ["--steps", "5", "--lr", "nan", "--label-weight", "inf", "--temperature", "-3", "--out", tmp_path / "run"]
    result = funmatch("distill", *argv, check=2)
    for message in (
        "lr must be a finite number, got nan",
        "label_weight must be a finite",
        "temperature must be above 0",
    ):
        assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert "pydantic" not in result.stderr
    assert not (tmp_path / "run").exists()
