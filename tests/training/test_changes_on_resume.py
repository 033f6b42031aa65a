"""What changes no weight may change when a run resumes; what rounds otherwise asks for a flag; the rest is refused."""

import json
from pathlib import Path

import pytest
import torch
from make_images import FEW
from safetensors.torch import load_file

import funmatch
from funmatch.config import TAUGHT, Train
from funmatch.config.metadata import OnResume
from funmatch.errors import InputError
from funmatch.reports import tables
from funmatch.runtime.disk.json_files import seal
from funmatch.training.run import compare
from funmatch.training.run import folder as run_folder

MINI = {
    "data": FEW, "student": "fashion-mini-student", "batch": 8, "steps": 8, "threads": 1, "compile": "off",
    "log_every": 2, "eval_every": 4, "save_every": 2, "workers": 1, "device": "cpu",
}  # fmt: skip


class Stop(Exception):
    pass


def stop_at_4(_event: str, step: int, _values: dict) -> None:
    if step == 4:
        raise Stop


def stopped_run(folder: Path, **options) -> Path:
    """A run that was stopped, and saved, after five steps at most."""
    with pytest.raises(Stop):
        funmatch.train(out=folder, on_event=stop_at_4, **MINI | options)
    assert not (folder / "result.json").exists()
    return folder


def record_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def test_what_changes_no_weight_is_accepted_said_and_recorded(tmp_path, capsys):
    folder = stopped_run(tmp_path / "run")
    step = run_folder.saved_step(folder / "checkpoints")
    whole = funmatch.train(out=tmp_path / "whole", **MINI).folder
    capsys.readouterr()
    funmatch.train(out=folder, **MINI | {"eval_every": 1, "log_every": 1, "save_every": 3, "workers": 2})
    said = "eval_every from 4 to 1, save_every from 2 to 3, log_every from 2 to 1, workers from 1 to 2"
    assert f"{folder}: from step {step} on, {said}\n" in capsys.readouterr().err
    record = record_of(folder)
    assert {"eval_every": 1, "log_every": 1, "save_every": 3, "workers": 2}.items() <= record["knobs"].items()
    assert {"step": step, "option": "eval_every", "from": 4, "to": 1} in record["facts"]["changes"]
    assert len(record["facts"]["changes"]) == 4
    evaluated = [each["step"] for each in run_folder.Run(folder).metrics.read() if each["event"] == "eval"]
    assert evaluated == [4, *range(step + 1, 9)]
    first, second = (load_file(each / "student" / "model.safetensors") for each in (whole, folder))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_evaluations_that_choose_the_student_say_so(tmp_path, capsys):
    folder = stopped_run(tmp_path / "run", keep="best")
    funmatch.train(out=folder, **MINI | {"keep": "best", "eval_every": 2})
    assert "eval_every from 4 to 2 (--keep best and --patience go by other evaluations)" in capsys.readouterr().err


def test_rounding_asks_for_one_flag_and_is_recorded(tmp_path, capsys):
    folder = stopped_run(tmp_path / "run")
    other = MINI | {"threads": 2}
    with pytest.raises(InputError, match=r"threads: 1 in the run, 2 now \(.*rounding; pass allow_rounding=True to"):
        funmatch.train(out=folder, **other)
    assert "changes" not in record_of(folder)["facts"]
    funmatch.train(out=folder, allow_rounding=True, **other)
    assert "threads from 1 to 2 (changes results by rounding)" in capsys.readouterr().err
    record = record_of(folder)
    assert record["knobs"]["threads"] == 2
    (change,) = record["facts"]["changes"]
    assert change | {"step": 0} == {"step": 0, "option": "threads", "from": 1, "to": 2}
    # From here on the run has the new value, which asks for nothing.
    funmatch.train(out=folder, **other)


def test_another_result_is_refused_with_the_flag_too(tmp_path):
    folder = stopped_run(tmp_path / "run")
    with pytest.raises(InputError, match=r"lr: 0.003 in the run, 0.5 now\n"):
        funmatch.train(out=folder, allow_rounding=True, lr=0.5, **MINI)


def test_rounding_is_refused_before_torch_is_imported(tmp_path):
    folder = stopped_run(tmp_path / "run")
    options = Train.checked(out=folder, **MINI | {"threads": 2})
    (line,) = compare.early_differences(folder, record_of(folder), "train", options)
    assert line.startswith("threads: 1 in the run, 2 now (")
    record = record_of(folder)
    record["knobs"]["threads"] = None  # all cores, which another number may differ from
    (line,) = compare.early_differences(folder, record, "train", options)
    assert line.startswith("threads: not set in the run, 2 now (")
    assert not compare.early_differences(
        folder, record_of(folder), "train", options.model_copy(update={"allow_rounding": True})
    )


@pytest.mark.parametrize(("before", "after", "differs"), [
    ("cuda:0", "cuda", False), ("cuda:0", "cuda:1", False), ("cuda:0", "cpu", True), ("cpu", "mps", True),
])  # fmt: skip
def test_another_number_of_gpus_rounds_and_another_kind_of_device_is_another_run(before, after, differs):
    then, now = (
        {"verb": "train", "knobs": {"device": each, "allow_rounding": True}, "facts": {}} for each in (before, after)
    )
    assert bool(compare.differences(then, now)) == differs
    assert bool(compare.differences(then, now | {"knobs": {"device": after}}))


def test_what_an_option_means_on_resume_stands_with_the_option():
    table = TAUGHT["distill"]

    def of(meaning: OnResume) -> frozenset[str]:
        return table.where(lambda opt: opt.on_resume is meaning)

    assert of(OnResume.FREE) == {
        "eval_every", "eval_first", "save_every", "log_every", "workers", "on_nonfinite", "max_nonfinite",
    }  # fmt: skip
    assert of(OnResume.ROUNDING) == {"threads", "compile", "teacher_batch", "teacher_ahead"}
    assert of(OnResume.DEVICE) == {"device"}
    assert {"lr", "steps", "precision", "teacher_precision", "teacher"} <= of(OnResume.RESULT)


@pytest.mark.slow
def test_time_adds_up_over_all_starts(tmp_path, capsys):
    more = {"log_every": 8, "save_every": 4, "steps": 24}
    folder = stopped_run(tmp_path / "run", **more)
    state = max((folder / "checkpoints").glob("step-*")) / "state.json"
    saved = json.loads(state.read_text())
    assert saved["seconds"] > 0, "no loss was recorded yet"
    state.with_name("checksums.json").unlink()
    state.write_text(json.dumps(seal(saved | {"seconds": 3600.0})))
    run = funmatch.train(out=folder, **MINI | more)
    assert 3600 < run.metrics["seconds"] < 3700
    assert json.loads((folder / "result.json").read_text())["seconds"] == run.metrics["seconds"]
    tables.show(run)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if " time " in line]
    assert "1:00:0" in line


def test_a_finished_run_has_nothing_to_round(tmp_path):
    options = {**MINI, "steps": 4, "eval_every": 4, "out": tmp_path / "run"}
    first = funmatch.train(**options | {"threads": 1}).figures
    assert funmatch.train(**options | {"threads": None}).figures == first, "nothing is computed again"
    assert funmatch.train(**options | {"threads": 2}).figures == first


def test_the_kept_student_is_named(tmp_path, capsys):
    run = funmatch.train(
        **{**MINI, "steps": 6, "eval_every": 2, "keep": "best", "out": tmp_path / "run"}, warmup_steps=4
    )
    best, text = run.figures["best_step"], capsys.readouterr().err
    assert f"kept the weights of step {best} of 6, the best on 30 images of val" in text
    assert ("WARNING: this step is in the warm-up" in text) == (best <= 4)
