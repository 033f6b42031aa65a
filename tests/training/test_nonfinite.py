"""Losses and gradients that are not finite: what a run says, leaves out, and returns to."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from test_distill import MINI, TEACHER
from torch import Tensor, nn

import funmatch
from funmatch.data.loader import Batch
from funmatch.errors import InputError
from funmatch.ops.optim.updates import EMA
from funmatch.runtime import devices
from funmatch.training import distill
from funmatch.training.loop import LoopOptions, fit

CPU = torch.device("cpu")
ORIGINAL = distill.distillation_loss
BAD = 7
"""The step whose loss is not finite."""
RUN = MINI | {"teacher": TEACHER, "steps": 10, "save_every": 4, "log_every": 20, "eval_every": 20, "ema": 0.9}


@pytest.fixture
def bad_loss(monkeypatch):
    """Makes the loss of step `BAD` infinite."""

    def loss(student: Tensor, teacher: Tensor, batch: Batch, *rest: object) -> dict[str, Tensor]:
        factor = math.inf if batch.step == BAD - 1 else 1.0
        return {name: value * factor for name, value in ORIGINAL(student, teacher, batch, *rest).items()}

    monkeypatch.setattr(distill, "distillation_loss", loss)


def weights(folder):
    return {name: load_file(folder / name / "model.safetensors") for name in ("student", "student-ema")}


def without_updates(monkeypatch, left_out, out):
    """The weights of a run in which the updates of some steps do nothing: an independent reference."""
    step = iter(range(1, 1000))
    original_step, original_average = torch.optim.AdamW.step, EMA.update

    def update(self, *args, **kwargs):
        return None if next(step) in left_out else original_step(self, *args, **kwargs)

    kept = []

    def average(self, model, number):
        if number in left_out:  # its forward pass has changed the statistics of BatchNorm
            for buffer, before in zip(model.buffers(), kept or self.model.buffers(), strict=True):
                buffer.copy_(before)
        else:
            original_average(self, model, number)
            kept[:] = [buffer.clone() for buffer in model.buffers()]

    monkeypatch.setattr(torch.optim.AdamW, "step", update)
    monkeypatch.setattr(EMA, "update", average)
    return weights(funmatch.distill(out=out, **RUN).folder)


def assert_same(one, other):
    for name in one:
        for key, tensor in one[name].items():
            assert torch.equal(tensor, other[name][key]), (name, key)


@pytest.mark.usefixtures("bad_loss")
def test_a_run_that_stops_names_step_rate_images_checkpoint_and_command(tmp_path):
    with pytest.raises(InputError) as error:
        funmatch.distill(out=tmp_path / "run", **RUN)
    message = str(error.value)
    assert f"the loss is no longer finite at step {BAD} (learning rate 0.00" in message
    assert message.count("train/") == 3
    assert "and 13 others" in message
    assert "the newest checkpoint is of step 4" in message
    # The same command, told to leave such steps out, goes on from there.
    run = funmatch.distill(out=tmp_path / "run", on_nonfinite="skip", **RUN)
    assert run.figures["step"] == 10


@pytest.mark.parametrize(("action", "left_out"), [("skip", {7}), ("rewind", {5, 6, 7})])
@pytest.mark.usefixtures("bad_loss")
def test_steps_that_are_left_out_change_nothing(tmp_path, action, left_out):
    run = funmatch.distill(out=tmp_path / "run", on_nonfinite=action, **RUN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "distillation_loss", ORIGINAL)
        expected = without_updates(patch, left_out, tmp_path / "other")
    assert_same(weights(run.folder), expected)
    records = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    found = [each for each in records if each["event"] == "nonfinite"]
    assert [(each["step"], each["action"], each["first"]) for each in found] == [(BAD, action, min(left_out))]
    # The mean loss of a record is that of the steps that count.
    assert all(math.isfinite(each["loss"]) for each in records if each["event"] == "step")


@pytest.mark.usefixtures("bad_loss")
def test_a_run_returns_to_its_first_weights_where_there_is_no_checkpoint(tmp_path):
    run = funmatch.distill(out=tmp_path / "run", on_nonfinite="rewind", **RUN | {"save_every": 9})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "distillation_loss", ORIGINAL)
        expected = without_updates(patch, set(range(1, BAD + 1)), tmp_path / "other")
    assert_same(weights(run.folder), expected)


@pytest.mark.usefixtures("bad_loss")
@pytest.mark.parametrize("action", ["skip", "rewind"])
def test_more_steps_than_allowed_stop_the_run(tmp_path, action):
    with pytest.raises(InputError, match=r"left out 0 times \(max_nonfinite\), .* no longer finite at step 7"):
        funmatch.distill(out=tmp_path / "run", on_nonfinite=action, max_nonfinite=0, **RUN)
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_teacher_whose_logits_are_not_finite_is_named(tmp_path, monkeypatch):
    original = distill.Distillation.logits

    def logits(self, batch: Batch, *, record: bool = False) -> tuple[Tensor, Tensor]:
        student, teacher = original(self, batch, record=record)
        if batch.step == BAD - 1:
            teacher = teacher.clone()
            teacher[2] = math.nan
        return student, teacher

    monkeypatch.setattr(distill.Distillation, "logits", logits)
    with pytest.raises(InputError, match=r"The teacher's logits are not finite for images train/\S+: try"):
        funmatch.distill(out=tmp_path / "run", **RUN)


class Net(nn.Module):
    """A BatchNorm, and a weight whose gradient is infinite at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.weight = nn.BatchNorm2d(3), nn.Parameter(torch.ones(1))

    def forward(self, views: Tensor) -> Tensor:
        return (self.norm(views) * self.weight).mean() + self.weight.sqrt().sum()


def test_an_update_is_left_out_whole_where_a_gradient_is_not_finite():
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    options = LoopOptions(3, 0.1, lambda _step: 1.0, None, 0, CPU, "fp32")
    views = torch.rand(3, 5, 3, 4, 4)
    left_out: list[int] = []

    def loss(batch: Batch) -> dict[str, Tensor]:
        if batch.step == 1:  # the derivative of sqrt at 0 is infinite, its value is not
            return {"loss": net(batch.crops[1:]) + (net.weight - net.weight.detach()).abs().sqrt().sum()}
        return {"loss": net(batch.crops[1:])}

    batches = [Batch(views[step], torch.zeros(5, dtype=torch.int64), 1.0, step=step) for step in range(3)]
    states = []
    for step, losses in fit(options, net, optimizer, devices.loss_scaler(CPU, "fp32"), batches, loss, 0, left_out):
        assert losses["loss"].isfinite(), step
        states.append({name: tensor.clone() for name, tensor in net.state_dict().items()})
    assert left_out == [2]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[1]["norm.running_mean"], states[2]["norm.running_mean"])
    assert states[2]["norm.num_batches_tracked"] == 2
