"""`on_event`: which records it receives, in resumed runs too, and what happens when it fails."""

import json

import pytest
from make_images import FEW
from test_processes import assert_near, start, wait_for_all

import funmatch
from funmatch.errors import InputError

CALL = {
    "data": FEW, "teacher": "fashion-mini-teacher", "student": "fashion-mini-student",
    "batch": 8, "threads": 1, "eval_every": 2, "log_every": 1, "save_every": 100, "compile": "off",
}  # fmt: skip


def records_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_every_record_is_passed_on_also_after_a_failure_that_ends_the_run(tmp_path):
    received = []

    def keep(event, step, values):
        received.append({"event": event, "step": step, **values})
        values.clear()  # what it does with its copy changes no record

    whole = funmatch.distill(**CALL, out=tmp_path / "whole", steps=4, on_event=keep)
    assert received == records_of(whole.folder)
    assert [(each["event"], each["step"]) for each in received][:2] == [("teacher", 0), ("step", 1)]

    def fail(event, step, _values):
        if (event, step) == ("step", 2):
            raise RuntimeError("no more disk")

    with pytest.raises(RuntimeError, match="no more disk") as error:
        funmatch.distill(**CALL, out=tmp_path / "cut", steps=4, on_event=fail)
    assert "saved step 3 of 4" in error.value.__notes__[0]
    received.clear()
    resumed = funmatch.distill(**CALL, out=tmp_path / "cut", steps=4, on_event=keep)
    assert received == [each for each in records_of(resumed.folder) if each["step"] > 3]
    assert [each["step"] for each in received if each["event"] == "step"] == [4]
    student = [(each / "student" / "model.safetensors").read_bytes() for each in (whole.folder, resumed.folder)]
    assert student[0] == student[1]


def test_a_failure_at_the_last_step_leaves_a_run_that_only_has_to_be_finished(tmp_path):
    def fail(event, _step, _values):
        if event == "views":
            raise ValueError("at the end")

    call = {**CALL, "eval_every": 100}
    with pytest.raises(ValueError, match="at the end") as error:
        funmatch.distill(**call, out=tmp_path / "run", steps=2, on_event=fail)
    assert "saved all 2 steps" in error.value.__notes__[0]
    assert not (tmp_path / "run" / "result.json").exists()
    assert funmatch.distill(**call, out=tmp_path / "run", steps=2).metrics["step"] == 2


def test_what_is_not_a_function_is_refused(tmp_path):
    with pytest.raises(InputError, match="on_event: wanted a function"):
        funmatch.train("fashion-mini", "fashion-mini-student", tmp_path / "o", steps=1, on_event="print")


SCRIPT = """
import sys
import torch
import funmatch

def distance(student, teacher):
    return (student - teacher).square().sum(-1)

def darker(crops, generator):
    return crops * torch.rand(len(crops), 1, 1, 1, generator=generator)

def optimizer(parameters):
    return torch.optim.SGD(parameters, momentum=0.9)

def event(event, step, _values):
    print("event", event, step)
    if (event, str(step)) == tuple(sys.argv[2:]):
        raise RuntimeError("enough")

network = {"channels": [8, 16, 16, 24], "stem_width": 8, "norm_layer": "groupnorm1"}
funmatch.distill(
    "fashion-mini", "fashion-mini-teacher", "resnet10t", sys.argv[1], student_kwargs=network, side=28, steps=6,
    batch=16, lr=0.001, teacher_precision="fp32", device="cpu", log_every=1, distance=distance, augment=darker,
    optimizer=optimizer, on_event=event,
)
"""


@pytest.mark.slow
def test_two_processes_end_together_and_call_it_once(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    one, two = tmp_path / "one", tmp_path / "two"
    wait_for_all(start(tmp_path / "script.py", one))
    # After a step, and after the last one.
    for failing, saved in ((("step", "2"), "saved step 3 of 6"), (("views", "6"), "saved all 6 steps")):
        outputs = wait_for_all(start(tmp_path / "script.py", two, *failing, world=2), code=1)
        assert all(saved in output for output in outputs)
    main, other = wait_for_all(start(tmp_path / "script.py", two, world=2))
    assert "event" not in main + other, "the run only had to be finished"
    # The user's functions gave the student of one process, too.
    assert_near(one, two)
