"""A step that is taken again is the step of the run, and shows where something is not finite."""

import json
import math

import pytest
import torch
from test_distill import MINI, TEACHER, TINY
from torch import Tensor

import funmatch
from funmatch.cli import main
from funmatch.commands.replay import replay
from funmatch.errors import InputError
from funmatch.training import distill

RUN = MINI | {"steps": 10, "save_every": 4, "log_every": 1, "eval_every": 20}


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("step", [1, 4, 7, 10])
def test_losses_are_those_of_the_run(tmp_path, finished_run, step):
    run = finished_run(tmp_path / "run", teacher=TEACHER, **RUN)
    before = contents(run.folder)
    found = replay(run.folder, step)
    records = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    recorded = next(each for each in records if each["event"] == "step" and each["step"] == step)
    assert found.losses["loss"] == recorded["loss"]
    assert found.lr == recorded["lr"]
    assert (found.step, found.forward, found.backward, found.weights) == (step, None, [], [])
    assert math.isfinite(found.gradient_norm)
    assert len(found.images) == 16
    # The newest checkpoint before it: those of steps 8 and 10 are kept.
    assert found.start == (8 if step == 10 else 0)
    assert contents(run.folder) == before


@pytest.mark.parametrize("verb", ["train", "finetune"])
def test_runs_on_labels_are_replayed_too(tmp_path, verb):
    if verb == "train":
        run = funmatch.train(out=tmp_path / "run", **RUN | TINY)
    else:
        options = {name: value for name, value in RUN.items() if name not in ("student", "data")}
        run = funmatch.finetune(MINI["data"], TEACHER, tmp_path / "run", **options)
    found = replay(run.folder, 10)
    last = json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[-2])
    records = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    last = [each for each in records if each["event"] == "step"][-1]
    assert found.losses["loss"] == last["loss"]
    assert "teacher_finite" not in found.images[0]


def test_what_is_not_finite_is_named(tmp_path, monkeypatch, capsys):
    original = distill.Distillation.logits

    def logits(self, batch, *, record: bool = False) -> tuple[Tensor, Tensor]:
        student, teacher = original(self, batch, record=record)
        if batch.step == 6:
            teacher = torch.where(torch.arange(len(teacher))[:, None] == 2, math.nan, teacher)
        return student, teacher

    monkeypatch.setattr(distill.Distillation, "logits", logits)
    with pytest.raises(InputError, match=r"replay .*run --step 7 shows where it begins"):
        funmatch.distill(teacher=TEACHER, out=tmp_path / "run", **RUN)
    found = replay(tmp_path / "run", 7)
    assert found.start == 4
    assert math.isnan(found.losses["loss"])
    assert found.forward is None
    assert found.backward
    assert [number for number, row in enumerate(found.images) if not row["teacher_finite"]] == [2]
    assert all(row["student_finite"] for row in found.images)
    with pytest.raises(SystemExit) as ended:
        main(["replay", str(tmp_path / "run"), "--step", "7"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert found.images[2]["image"] in shown
    assert "the checkpoint of step 4" in shown


def test_bad_steps_and_changed_images_are_refused(tmp_path, finished_run):
    run = finished_run(tmp_path / "run", teacher=TEACHER, **RUN)
    with pytest.raises(InputError, match="has 10 steps, and no step 11"):
        replay(run.folder, 11)
    with pytest.raises(InputError, match="no run folder"):
        replay(tmp_path / "none", 1)
