"""A run that was still improving says so, and names commands that train for longer and work as they stand."""

import shlex
from pathlib import Path

import pytest
from make_images import FEW

from funmatch.training.run import folder as run_folder
from funmatch.training.run import longer

RUN = ["--data", FEW, "--batch", "32", "--threads", "1", "--steps", "10", "--lr", "0.02"]


def evaluations(*scores: float, name: str = "top1") -> list[dict]:
    other = {"agreement": None} if name == "top1" else {"top1": None}
    return [{"step": 10 * (i + 1), name: score, **other} for i, score in enumerate(scores)]


@pytest.mark.parametrize(("scores", "images", "expected"), [
    # The last fifth of ten evaluations is the last two; ±2 points is the error of a share of 500 images near 0.7.
    ((0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.62, 0.65, 0.70, 0.72), 500, (0.65, 0.72)),
    ((0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.70, 0.72, 0.73, 0.72), 500, None),
    # The same gain counts where it is of more images.
    ((0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.70, 0.72, 0.73, 0.72), 50_000, (0.72, 0.73)),
    # It had been better before.
    ((0.1, 0.8, 0.3, 0.4, 0.5, 0.6, 0.62, 0.65, 0.70, 0.72), 500, None),
    # Nothing before the last fifth, no evaluation, no image.
    ((0.9,), 500, None),
    ((), 500, None),
    ((0.1, 0.9), 0, None),
    # No image right, and then one of a hundred.
    ((0.0, 0.0, 0.0, 0.0, 0.01), 100, None),
])  # fmt: skip
@pytest.mark.parametrize("name", ["top1", "agreement"])
def test_improvement_is_more_than_the_error_of_so_many_images(scores, images, expected, name):
    found = longer.improvement(evaluations(*scores, name=name), images)
    assert found == (expected if expected is None else (name, *expected))


def test_cool_down_alone_is_no_improvement(tmp_path):
    config = {"verb": "train", "knobs": {"steps": 50, "schedule": "wsd"}, "facts": {"pictures": {"val": 500}}}
    found = [each | {"split": "val"} for each in evaluations(0.5, 0.5, 0.5, 0.5, 0.9)]
    assert not longer.note(tmp_path, config, found, 40)
    assert longer.note(tmp_path, config, found, None)
    # Nor are images that the student is trained on.
    assert not longer.note(tmp_path, config, [each | {"split": "training images"} for each in found], None)


def commands(text: str) -> list[list[str]]:
    return [shlex.split(line)[1:] for line in text.splitlines() if line.strip().startswith("funmatch ")]


@pytest.fixture(name="improving")
def always_improving(monkeypatch):
    monkeypatch.setattr(longer, "improvement", lambda found, _images: ("top1", 0.1, 0.2) if found else None)


@pytest.mark.usefixtures("improving")
def test_a_run_that_diverged_is_not_told_to_go_on(funmatch):
    words = ["distill", *RUN[:-1], "1000", "--teacher", "fashion-mini-teacher", "--student", "fashion-mini-student"]
    done = funmatch(*words, "--clip-norm", "none", "--out", "run").stderr
    assert "the run has diverged" in done
    assert "still improving" not in done


@pytest.mark.usefixtures("improving")
@pytest.mark.parametrize("words", [
    ["train", "--student", "fashion-mini-student"],
    pytest.param(["finetune", "--model", "fashion-mini-student"], marks=pytest.mark.slow),
    pytest.param(
        ["distill", "--teacher", "fashion-mini-teacher", "--student", "fashion-mini-student"], marks=pytest.mark.slow
    ),
], ids=lambda words: words[0])  # fmt: skip
def test_commands_work_when_pasted(tmp_path, funmatch, words):
    said = funmatch(*words, *RUN, "--out", "my runs/one").stderr
    assert "my runs/one: top1 was still improving (20.0 % in its last fifth, 10.0 % until then); to train it" in said
    found = commands(said)
    assert len(found) == 2
    for each in found:
        funmatch(*each)
        result = run_folder.Run(tmp_path / each[-1]).result
        assert result
        assert result["step"] == int(each[each.index("--steps") + 1])
    # The first one's schedule can be extended, by the command that it names in turn.
    assert "--schedule wsd" in shlex.join(found[0])
    refused = funmatch(*words, *RUN, "--steps", "30", "--out", "my runs/one", check=2).stderr
    assert [each[-1] for each in commands(refused)] == ["my runs/one-longer-2", "my runs/one-30-steps"]


@pytest.mark.usefixtures("improving")
def test_a_wsd_run_is_extended_by_the_command_that_it_names(tmp_path, funmatch):
    said = funmatch("train", "--student", "fashion-mini-student", *RUN, "--schedule", "wsd", "--out", "run").stderr
    (command,) = commands(said)
    assert "10.0 % until then" in said
    assert "the last fifth before its cool-down" in said
    longer_run = funmatch(*command).stderr
    assert "extended from 10 to 20 steps" in longer_run
    assert (run_folder.Run(tmp_path / "run").result or {})["step"] == 20
    assert commands(longer_run)[0][-3:] == ["40", "--out", "run"]


@pytest.mark.usefixtures("improving")
def test_each_of_several_students_says_so(funmatch):
    said = funmatch(
        "distill", "--teacher", "fashion-mini-teacher", "--student", "fashion-mini-student", "--student", "test_resnet",
        "--side", "32", *RUN, "--steps", "4", "--out", "two",
    ).stderr  # fmt: skip
    for name in ("fashion-mini-student", "test_resnet"):
        assert f"two/{name}: top1 was still improving" in said
        assert f"--config two/{name}/config.json --student two/{name} --schedule wsd" in said


def test_networks_from_python_have_no_command():
    assert not longer.ways(Path("run"), "train", {"steps": 4, "student": "python:Net"}, 8)
