"""The schedule and the optimizer against the equations, in float64 by hand."""

import math

import numpy as np
import pytest
import timm
import torch
from torch import nn

from funmatch.ops.optim.factory import create_optimizer
from funmatch.ops.optim.schedules import cosine, factor
from funmatch.ops.optim.updates import decayed_parameters
from funmatch.training.loop import set_lr


def test_cosine_schedule_rises_then_falls_to_zero():
    assert [cosine(step, 100, 10) for step in (0, 100)] == [0, 0]
    assert cosine(5, 100, 10) == pytest.approx(0.5)
    assert cosine(10, 100, 10) == 1
    assert cosine(55, 100, 10) == pytest.approx(0.5), "half of the cosine"
    assert cosine(32, 100, 10) == pytest.approx((1 + math.cos(math.pi * 22 / 90)) / 2)
    assert cosine(0, 10, 0) == 1, "without warm-up it starts at its maximum"
    assert cosine(0, 1, 0) == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("linear", {0: 0, 5: 0.5, 10: 1, 55: 0.5, 100: 0}),
        ("quadratic", {0: 0, 5: 0.5, 10: 1, 55: 0.25, 82: 0.04, 100: 0}),
        ("wsd", {0: 0, 5: 0.5, 10: 1, 80: 1, 85: 0.5, 100: 0}),
        ("constant", {0: 0, 5: 0.5, 10: 1, 100: 1}),
    ],
)
def test_other_schedules_equal_their_definition(name, expected):
    assert {step: factor(name, step, 100, 10) for step in expected} == pytest.approx(expected)


def test_cooldown_has_the_given_length_and_shape():
    def wsd_factor(step, **cooldown):
        return factor("wsd", step, 100, 0, **cooldown)

    assert [wsd_factor(step, cooldown_steps=4) for step in (95, 96, 97, 100)] == pytest.approx([1, 1, 0.5, 0])
    linear = [wsd_factor(step, cooldown_steps=4, cooldown_shape="linear") for step in (96, 97, 98, 99, 100)]
    assert linear == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    assert wsd_factor(100, cooldown_steps=0) == 1


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 1)
        self.norm = nn.BatchNorm2d(3)
        self.embedding = nn.Embedding(4, 3)
        self.head = nn.Linear(3, 2)
        self.position = nn.Parameter(torch.randn(1, 3))


def test_only_kernels_of_a_mixed_module_decay():
    assert decayed_parameters(Tiny()) == {"conv.weight", "head.weight"}


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224", "convnext_atto", "mobilenetv3_small_050"])
def test_only_convolution_and_linear_kernels_of_real_networks_decay(name):
    model = timm.create_model(name)
    found = decayed_parameters(model)
    modules = dict(model.named_modules())
    for parameter, _ in model.named_parameters():
        owner = modules[parameter.rpartition(".")[0]]
        is_kernel = parameter.endswith("weight") and isinstance(owner, nn.Conv2d | nn.Linear)
        assert (parameter in found) == is_kernel, parameter


@pytest.mark.parametrize("lr", [1e-3, 0.05])
def test_update_equals_the_papers_equation(lr):
    """Δw = −s·(lr·adam + wd·w): the decay does not depend on the learning rate, and follows the schedule."""
    torch.manual_seed(0)
    model = Tiny().double()
    weight_decay = 0.01
    optimizer = create_optimizer("adamw", model, lr, weight_decay)
    w = {name: parameter.detach().numpy().copy() for name, parameter in model.named_parameters()}
    first = {name: np.zeros_like(value) for name, value in w.items()}
    second = {name: np.zeros_like(value) for name, value in w.items()}
    rng = np.random.default_rng(0)
    for t, s in enumerate((0.3, 1.0, 0.6), 1):
        set_lr(optimizer, lr, s)
        for name, parameter in model.named_parameters():
            g = rng.normal(size=w[name].shape)
            parameter.grad = torch.tensor(g)
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.999 * second[name] + 0.001 * g * g
            update = (first[name] / (1 - 0.9**t)) / (np.sqrt(second[name] / (1 - 0.999**t)) + 1e-8)
            decay = weight_decay * w[name] if name in ("conv.weight", "head.weight") else 0
            w[name] = w[name] - s * (lr * update + decay)
        optimizer.step()
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(parameter.detach().numpy(), w[name], rtol=1e-9, atol=1e-12, err_msg=name)
