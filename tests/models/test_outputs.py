"""Outputs of networks: logits are found in tuples, dictionaries and dataclasses; what is not understood is listed."""

from collections import namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import funmatch
from funmatch.errors import InputError
from funmatch.models.inference.frozen import Frozen
from funmatch.models.inference.outputs import logits_of
from funmatch.models.load import load

LOGITS, TOKENS = torch.randn(2, 4), torch.randn(2, 9, 4)


@dataclass
class Answer:
    logits: Tensor
    states: tuple[Tensor, ...] = ()


@dataclass
class Features:
    pooled: Tensor
    tokens: Tensor


Named = namedtuple("Named", "features logits")


@pytest.mark.parametrize(
    "output",
    [
        LOGITS, Answer(LOGITS), {"logits": LOGITS, "features": LOGITS + 1}, Named(LOGITS + 1, LOGITS), (LOGITS,),
        (TOKENS, LOGITS), [LOGITS, None, TOKENS], SimpleNamespace(logits=LOGITS, loss=None),
    ],
)  # fmt: skip
def test_logits_are_found(output):
    assert logits_of(output, "net") is LOGITS


@pytest.mark.parametrize(
    ("output", "listed"),
    [
        ((LOGITS, LOGITS), r"tuple with \[0\] \(2, 4\), \[1\] \(2, 4\)"),
        ({"out": LOGITS, "loss": None}, r"dict with out \(2, 4\), loss NoneType"),
        (Features(LOGITS, TOKENS), r"Features with pooled \(2, 4\), tokens \(2, 9, 4\)"),
        ((TOKENS,), r"tuple with \[0\] \(2, 9, 4\)"),
        ("text", "net returned str"),
    ],
)
def test_what_is_not_understood_is_listed(output, listed):
    with pytest.raises(InputError, match=listed):
        logits_of(output, "net")


class Wrapped(nn.Module):
    """Returns logits inside something."""

    def __init__(self, wrap):
        super().__init__()
        self.linear, self.wrap = nn.Linear(3, 4), wrap

    def forward(self, x):
        return self.wrap(self.linear(x.mean((2, 3))))


@pytest.mark.parametrize("wrap", [lambda x: {"logits": x}, lambda x: (x, None), Answer], ids=["dict", "tuple", "data"])
def test_modules_from_python_may_wrap_their_logits(wrap):
    model, views = load(Wrapped(wrap), side=8).eval(), torch.rand(2, 3, 8, 8)
    assert model.num_classes == 4
    with torch.no_grad():
        expected = model.net.linear(views.mean((2, 3)))
    assert torch.equal(model(views), expected)
    torch.testing.assert_close(Frozen(model)(views), expected)
    with pytest.raises(InputError, match=r"Wrapped returned tuple with \[0\] \(1, 4\), \[1\] \(1, 4\)"):
        funmatch.load(Wrapped(lambda x: (x, x)), side=8)
