"""Functions of the user as distance, augmentation and optimizer: what they are given, how runs with them resume."""

import functools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from make_images import FEW
from safetensors.torch import load_file

import funmatch
from funmatch.config import Distill
from funmatch.data.loader import Loader
from funmatch.errors import InputError
from funmatch.ops import distances
from funmatch.ops.view_spec import ViewSpec
from funmatch.runtime import functions
from funmatch.training import datasets

CALL = {
    "data": FEW, "teacher": "fashion-mini-teacher", "student": "fashion-mini-student", "batch": 32,
    "threads": 1, "eval_every": 100, "log_every": 1, "save_every": 100, "compile": "off", "steps": 4,
}  # fmt: skip


def same_as_kl(student, teacher):
    assert student.dtype == teacher.dtype == torch.float32
    return distances.kl(student, teacher)


def darker(crops, generator):
    """Makes each image darker by a share that is drawn for the batch as a whole."""
    return crops * torch.rand(len(crops), 1, 1, 1, generator=generator)


def momentum_sgd(parameters):
    return torch.optim.SGD([{"params": parameters[:2], "momentum": 0.5}, {"params": parameters[2:]}], momentum=0.9)


def student_of(run):
    return load_file(run.student / "model.safetensors")


def assert_same(one, two):
    first, second = student_of(one), student_of(two)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_a_distance_gets_logits_and_trains_as_the_built_in_one(tmp_path):
    own = funmatch.distill(**CALL, out=tmp_path / "own", distance=same_as_kl)
    assert_same(own, funmatch.distill(**CALL, out=tmp_path / "kl"))
    recorded = json.loads((own.folder / "config.json").read_text())["knobs"]
    assert recorded["distance"] == f"{__name__}:same_as_kl"
    # The finished run is found again by the function and by its name, and is another run without it.
    assert funmatch.distill(**CALL, out=own.folder, distance=same_as_kl).metrics == own.metrics
    assert funmatch.distill(**CALL, out=own.folder, distance=recorded["distance"]).metrics == own.metrics
    with pytest.raises(InputError, match=r"distance: .*:same_as_kl in the run, kl now"):
        funmatch.distill(**CALL, out=own.folder)


@pytest.mark.slow
def test_a_run_with_functions_resumes_bitwise(tmp_path):
    own = {"augment": darker, "optimizer": momentum_sgd, "distance": same_as_kl, "lr": 0.01}
    whole = funmatch.distill(**CALL, **own, out=tmp_path / "whole")

    def stop(event, step, _values):
        if (event, step) == ("step", 1):
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        funmatch.distill(**CALL, **own, out=tmp_path / "cut", on_event=stop)
    assert (tmp_path / "cut" / "checkpoints" / "step-000000002").is_dir()
    assert_same(whole, funmatch.distill(**CALL, **own, out=tmp_path / "cut"))
    plain = funmatch.distill(**CALL, **(own | {"augment": None}), out=tmp_path / "plain")
    assert not torch.equal(student_of(whole)["conv1.0.weight"], student_of(plain)["conv1.0.weight"])
    knobs = json.loads((whole.folder / "config.json").read_text())["knobs"]
    assert (knobs["weight_decay"], knobs["momentum"]) == (0.0, None)


@pytest.mark.parametrize("own_view", [False, True])
def test_an_augmentation_is_the_same_with_any_number_of_processes(tmp_path, own_view):
    table = Distill.checked(**{**CALL, "out": tmp_path})
    split = datasets.open_run_data(table).splits["train"]
    spec = ViewSpec(0, 16, 32, augment=functions.register(darker), own_teacher_view=own_view)
    one = Loader(split, spec, teacher_sides=(32, 40)).batch_at(3)
    plain = Loader(split, replace(spec, augment=None), teacher_sides=(32, 40)).batch_at(3)
    assert one.crops.shape == (17, 3, 32, 32)
    factors = one.crops.sum((1, 2, 3)) / plain.crops.sum((1, 2, 3)).clamp(min=1e-9)
    assert torch.allclose(one.crops, plain.crops * factors[:, None, None, None], atol=1e-4)
    # The teacher's larger crops get equal draws where both see the same view, and draws of their own elsewhere.
    others = one.teacher_crops[1].sum((1, 2, 3)) / plain.teacher_crops[1].sum((1, 2, 3)).clamp(min=1e-9)
    assert torch.allclose(others, factors, atol=1e-3) != own_view
    assert (one.teacher_crops[0] is None) != own_view
    for rank in range(4):
        part = Loader(split, spec, rank, 4, teacher_sides=(32, 40)).batch_at(3)
        assert torch.equal(part.crops, one.crops[4 * rank : 4 * rank + 5])
        assert torch.equal(part.teacher_crops[1], one.teacher_crops[1][4 * rank : 4 * rank + 5])
        assert np.array_equal(part.labels, one.labels[4 * rank : 4 * rank + 5])


def test_a_function_that_is_not_at_hand_is_refused_with_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(functions, "_FOUND", {})
    for name in ("__main__:loss", "mine:make.<locals>.loss", "functools:partial(a:b)"):
        with pytest.raises(InputError) as error:
            funmatch.distill(**CALL, out=tmp_path / "o", distance=name)
        assert f"distance {name} is a function of the Python program that began the run" in str(error.value)
        assert "pass the function itself from there: distance=…" in str(error.value)
    with pytest.raises(InputError, match="cannot import nowhere for the augment nowhere:f"):
        funmatch.distill(**CALL, out=tmp_path / "o", augment="nowhere:f")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_losses.py").write_text("def one(student, teacher):\n    return (student - teacher).abs().sum(-1)\n")
    functions.allow("my_losses:one")
    assert functions.find_function("my_losses:one", "distance")(torch.ones(2, 3), torch.zeros(2, 3)).tolist() == [3, 3]


def test_names_hold_nothing_but_code():
    assert functions.name_of(same_as_kl) == f"{__name__}:same_as_kl"
    assert functions.name_of(torch.optim.SGD) == "torch.optim.sgd:SGD"
    assert (
        functions.name_of(functools.partial(torch.optim.SGD, momentum=0.9)) == "functools:partial(torch.optim.sgd:SGD)"
    )
    assert functions.name_of(torch.nn.Linear(1, 1).forward).endswith(":Linear.forward()")
    assert functions.name_of(torch.nn.Identity()).endswith(":Identity()")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distance": lambda student, _: student.sum()}, r"returned \(\), expected one number an image, \(32,\)"),
        ({"distance": lambda *_: 3}, "returned int, expected one number an image"),
        ({"augment": lambda crops, _: crops[1:]}, r"returned \(32, 3, 32, 32\), expected crops of the same shape"),
        ({"augment": lambda *_: None}, "returned NoneType, expected crops of the same shape"),
        ({"optimizer": lambda parameters: parameters, "lr": 0.1}, "returned list, expected a torch.optim.Optimizer"),
        ({"optimizer": lambda _: torch.optim.SGD([torch.ones(1)]), "lr": 0.1}, "holds other parameters"),
        ({"optimizer": lambda _: 1 / 0, "lr": 0.1}, "fails: division by zero"),
        ({"optimizer": momentum_sgd}, "needs lr, which the schedule sets"),
        ({"optimizer": momentum_sgd, "lr": 1, "weight_decay": 0.1}, "weight_decay belongs to optimizers by name"),
        ({"distance": same_as_kl, "temperature": 2.0}, "temperature belongs to distances of probabilities"),
        ({"distance": same_as_kl, "tape": "t", "tape_top": 2}, "needs all of the teacher's logits"),
        ({"augment": darker, "strategy": "fix/cc"}, "the teacher of fix/cc gets a fixed one"),
        ({"distance": 3}, "distance: wanted a string or a function, got 3"),
    ],
)  # fmt: skip
def test_wrong_functions_are_refused(options, message, tmp_path):
    with pytest.raises(InputError, match=message):
        funmatch.distill(**CALL, **options, out=tmp_path / "o")


def test_a_state_that_cannot_be_saved_is_named(tmp_path):
    class Odd(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter]["odd"] = {"set"}
            return super().step(closure)

    with pytest.raises(InputError, match=r"the optimizer's .*:odd cannot be saved"):
        funmatch.distill(**CALL, out=tmp_path / "o", optimizer=Odd, lr=0.1)
