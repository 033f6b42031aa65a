"""Memory layouts of a network's inputs in training: convolutions whose backward pass torch gets wrong."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from funmatch.models.classifier import Card, Classifier

CARD = Card("small", 32, 1.0, (0.0,) * 3, (1.0,) * 3)

TRAINING = """
import torch
from funmatch.models.classifier import Card, Classifier

if {name!r}:
    from funmatch.models.load import load

    student = load({name!r}, classes=2).train()
else:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 48, 1, stride=2), torch.nn.ReLU(), torch.nn.Flatten())
    student = Classifier(net, Card("small", {side}, 1.0, (0.0,) * 3, (1.0,) * 3), num_classes=48)
for step in range({steps}):
    views = torch.rand({batch}, 3, {side}, {side}).contiguous(memory_format=torch.channels_last)
    student(views).sum().backward()
    [torch.randn(1000) for _ in range(50)]
"""


class Small(nn.Module):
    """A network with one convolution whose input, in channels-last, comes from another."""

    def __init__(self, channels, kernel, stride):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, channels, 3), nn.Conv2d(channels, 6, kernel, stride)
        self.num_classes = 6

    def forward(self, views):
        return self.second(self.first(views)).square().mean((2, 3))


def run(channels, kernel, stride):
    """Trains and evaluates; returns whether the second convolution got its input in the plain layout, in each."""
    torch.manual_seed(0)
    classifier = Classifier(Small(channels, kernel, stride), CARD)
    exact = Classifier(Small(channels, kernel, stride), CARD).double()
    exact.load_state_dict(classifier.state_dict())
    layouts = []
    classifier.net.second.register_forward_pre_hook(lambda _, inputs: layouts.append(inputs[0].is_contiguous()))
    views = torch.rand(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    logits, expected = classifier(views), exact(views.double())
    torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-5)
    logits.sum().backward()
    expected.sum().backward()
    for one, other in zip(classifier.net.parameters(), exact.net.parameters(), strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(classifier(views), logits)
    return tuple(layouts)


@pytest.mark.parametrize("channels", [3, 8])
def test_input_is_plain_where_the_backward_pass_would_write_outside_its_memory(channels):
    assert run(channels, kernel=1, stride=2) == (True, False)


@pytest.mark.parametrize(("channels", "kernel", "stride"), [(16, 1, 2), (3, 3, 2), (3, 1, 1), (2, 1, 2)])
def test_other_convolutions_keep_channels_last(channels, kernel, stride):
    assert run(channels, kernel, stride) == (False, False)


def test_networks_that_are_wrapped_again_are_changed_once():
    net = Small(3, 1, 2)
    for _ in range(3):
        Classifier(net, CARD)
    assert len(net.second._forward_pre_hooks) == 1


@pytest.mark.parametrize(
    ("name", "steps", "side", "batch"),
    [("", 15, 128, 2), pytest.param("repvgg_a0", 6, 224, 4, marks=pytest.mark.slow)],
    ids=["one layer", "repvgg"],
)
def test_large_views_do_not_end_the_process(name, steps, side, batch):
    # In a process of its own, which damaged memory would end.
    script = TRAINING.format(name=name, steps=steps, side=side, batch=batch)
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
