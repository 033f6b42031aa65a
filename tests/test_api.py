"""The Python functions: docstrings, accepted names and types, errors, and results."""

import inspect
import re
from pathlib import Path

import numpy as np
import pytest
from make_images import FEW
from torch import nn

import funmatch
from funmatch.commands.verbs import DRY_RUN, VERBS, load_function
from funmatch.config import Distill, Evaluate, Train
from funmatch.errors import InputError
from funmatch.reports.result import Outcome, Result, Tuned

TINY = {"student": "resnet10t", "student_kwargs": {"channels": [8, 8, 8, 8], "stem_width": 8}, "side": 32, "batch": 16}


@pytest.mark.parametrize("name", ["distill", "train", "finetune", "evaluate", "prepare", "study"])
def test_docstrings_list_the_essential_options(name):
    text = inspect.getdoc(getattr(funmatch, name))
    assert text
    table = VERBS[name].table
    essential = table.where(lambda opt: opt.essential)
    named = {*getattr(funmatch, name).__code__.co_varnames} & {*inspect.signature(getattr(funmatch, name)).parameters}
    for option in essential - named - {table.field_of(each) for each in named}:
        assert re.search(rf"^ +{option}: ", text, re.M), option
    assert f"funmatch {name} --help-all" in text


def test_functions_of_every_verb_can_be_imported():
    for verb in [*VERBS.values(), DRY_RUN]:
        for function in filter(None, (verb.run, verb.show, verb.page)):
            assert callable(load_function(function)), function


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": True}, "lr: wanted a number, got True"),
        ({"steps": "4"}, "steps: wanted a whole number, got '4' (a string)"),
        ({"steps": 4.5}, "steps: wanted a whole number, got 4.5"),
        ({"precision": "fp8"}, "precision: wanted one of auto, fp32, bf16, fp16, got 'fp8'"),
        ({"unlabelled": "yes"}, "unlabelled: wanted true or false, got 'yes' (a string)"),
        ({"teacher_side": [32, "48"]}, "teacher_side: wanted a list of whole numbers, got [32, '48']"),
        ({"randaugment": 9}, "randaugment: wanted 2 whole numbers, got 9"),
        ({"temprature": 2.0}, "unknown option 'temprature'; did you mean 'temperature'"),
        ({"batchsize": 2}, "'batch_size'"),
        ({"callback": print, "max_hours": 2}, "on_event=FUNCTION is called with each record"),
        ({"warmup_epochs": 2}, "unknown option 'warmup_epochs'; use warmup_steps=…"),
        ({"learning_rate": 1.0, "arch": "s"}, "unknown option 'arch'; use student=…"),
        ({"batch": 2, "batch_size": 2}, "batch is set twice, once as batch_size"),
        ({"lr": "0.003"}, "lr: wanted a number, got '0.003' (a string)"),
        ({"mixup": "yes"}, "mixup: wanted a number, got 'yes' (a string)"),
        ({"val": True}, "val: wanted a number or a string, got True"),
        ({"out": ""}, "out: wanted a path, got '' (a string)"),
        ({"out": None}, "out is missing; pass out=…"),
        ({"augment": "mine"}, "augment 'mine' is not the name of a function; expected package.module:function"),
        ({"student": object()}, "student: a model is a name or a torch.nn.Module, got object"),
        ({"student": nn.Linear}, "student: a model is a name or a torch.nn.Module, got type"),
    ],
)
def test_wrong_types_and_names_are_rejected(options, message, tmp_path):
    arguments = {"data": "fashion-mini", "teacher": "t", "student": "s", "out": tmp_path / "o", **options}
    with pytest.raises(InputError) as error:
        funmatch.distill(**arguments)
    assert message in str(error.value)
    assert not (tmp_path / "o").exists()


def test_wrong_arguments_that_are_no_options_are_rejected():
    for call, message in (
        (lambda: funmatch.load(3), "a model is a name or a torch.nn.Module, got int"),
        (
            lambda: funmatch.load("resnet10t", options=3),
            'options: wanted a dictionary such as {"drop_rate": 0.1}, got 3',
        ),
        (lambda: funmatch.tune("train", space=3), "space: wanted a dictionary"),
        (
            lambda: funmatch.distill_several("d", "t", "resnet10t", "o"),
            "students: wanted a list of names, got 'resnet10t'",
        ),
        (lambda: funmatch.evaluate(), "model is missing; pass model=…"),
    ):
        with pytest.raises(InputError) as error:
            call()
        assert message in str(error.value)


def test_all_problems_are_reported_at_once_in_python_terms():
    with pytest.raises(InputError) as error:
        funmatch.train(data="d", lr="x", stepz=1)
    for message in ("4 problems", "lr: wanted", "unknown option 'stepz'", "student is missing", "out is missing"):
        assert message in str(error.value)
    with pytest.raises(InputError) as error:
        funmatch.train(data="fashion-mini", student="resnet10t", out="o")
    assert "steps=… or epochs=…" in str(error.value)
    assert "--" not in str(error.value)


def test_command_line_names_and_numpy_types_are_accepted(tmp_path):
    dry_run = funmatch.finetune(
        "fashion-mini", model="resnet10t", out=tmp_path / "o", batch_size=np.int64(16), img_size=32, lr=np.float64(0.1),
        model_kwargs=TINY["student_kwargs"], steps=2, dry_run=True, clip_norm=None,
    )  # fmt: skip
    options = dry_run.metrics["options"]
    assert (options["batch"]["value"], options["side"]["value"], options["lr"]["value"]) == (16, 32, 0.1)
    assert options["student"] == {"value": "resnet10t", "source": "Python"}
    assert options["clip_norm"] == {"value": None, "source": "Python"}
    assert Train.checked(data="d", student="s", out="o", steps=1, unlabelled=np.True_, lr=1).unlabelled is True
    assert dry_run.folder is None
    assert dry_run.top1 is None
    assert not (tmp_path / "o").exists()


def test_recipe_can_be_given_in_three_ways():
    by_option = {}
    for call in (
        lambda: funmatch.recipe("pet37-fast", batch_size=True),
        lambda: funmatch.distill(recipe="pet37-fast", batch_size=True),
        lambda: funmatch.tune("pet37-fast", batch_size=True),
    ):
        with pytest.raises(InputError) as error:
            call()
        by_option[str(error.value)] = True
    assert list(by_option) == ["batch: wanted a whole number, got True"]
    with pytest.raises(InputError, match="recipe of"):
        funmatch.train(recipe="pet37-fast")


def test_outcome_gives_metrics_files_and_repr(tmp_path):
    run = funmatch.train(FEW, "fashion-mini-student", tmp_path / "run", steps=2, batch=16, threads=1)
    assert isinstance(run, Outcome)
    assert (run.figures, run.report) == (run.metrics, run.page)
    assert run.page == tmp_path / "run" / "report.html"
    assert run.page.is_file()
    assert run.student == tmp_path / "run" / "student"
    assert (run.student / "model.safetensors").is_file()
    student = run.student()
    assert not student.training
    assert repr(student).replace("/student", "") == repr(funmatch.load(run))
    assert "\n" not in repr(student)
    assert f"{run.metrics['parameters']:,} parameters, 32 × 32 pixels, 10 classes" in repr(student)
    assert (run.top1, run.agreement, run.kl) == tuple(run.metrics[name] for name in ("top1", "agreement", "kl"))
    assert repr(run).startswith(f"Outcome('{tmp_path}/run', top1=0.")
    assert "step=2" in repr(run)
    assert "\n" not in repr(run)
    for text in ("top1", "report.html", "<table>"):
        assert text in run._repr_html_()
    assert run._repr_html_().count("<tr>") <= 10
    assert "color" not in run._repr_html_()
    assert funmatch.evaluate(run)["top1"] == pytest.approx(run.top1)


def test_results_without_a_run():
    assert repr(Result(None, {"models": []})) == "Result()"
    assert Result(Path("a"), {"b": 1}, Path("c")).to_json() == {"b": 1, "report": "c"}
    assert Result(Path("a"), {"b": 1}).to_json() == {"b": 1}
    metrics = {"trials": [1], "best": 3, "value": 0.91234, "knobs": {"lr": 1}, "best_run": "t/3"}
    tuned = Tuned(Path("t"), metrics, Path("p"))
    assert repr(tuned) == "Tuned('t', value=0.9123, best=3)"
    assert (tuned.knobs, tuned.best_run) == ({"lr": 1}, Path("t/3"))
    assert (tuned.figures, tuned.report) == (metrics, Path("p"))
    assert "<script>" not in Result(None, {"name": "<script>"})._repr_html_()


def test_python_values_become_command_line_values():
    table = Train.checked(data="d", student="s", out="o", steps=1, student_kwargs={"channels": [1, 2]})
    assert table.student_kwargs == ("channels=[1, 2]",)
    own = Train.checked(
        data="d", student="s", out="o", steps=1, student_kwargs={"channels": [np.int64(1), np.str_("a")]}
    )
    assert own.student_kwargs == ("channels=[1, 'a']",)
    assert Distill.checked(data=["a", Path("b")], teacher="t", student=Path("s"), out="o", steps=1).data == ("a", "b")
    assert Evaluate.checked(model="m", teacher=None).teacher == ()
