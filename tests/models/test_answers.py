"""Answers: what is read of networks is what timm computes, and rows are taken apart as they were joined."""

import pytest
import timm
import torch
from torch import nn

from funmatch.errors import InputError
from funmatch.models.classifier import Card, Classifier
from funmatch.models.inference import answers
from funmatch.models.inference.answers import Layout, Readout
from funmatch.models.inference.features import Features
from funmatch.models.inference.modes import InferenceMode
from funmatch.models.inference.parity import check_parity

SMALL = {"resnet10t": {"channels": (8, 8, 16, 16), "stem_width": 8}}


def images(count: int = 2, side: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("name", "side", "grid"),
    [
        ("resnet10t", 64, (2, 2)),
        ("test_vit", 160, (10, 10)),
        ("test_convnext", 160, (5, 5)),
        pytest.param("swin_tiny_patch4_window7_224", 224, (7, 7), marks=pytest.mark.slow),
        pytest.param("deit_tiny_distilled_patch16_224", 224, (14, 14), marks=pytest.mark.slow),
        pytest.param("mobilenetv4_conv_small", 224, (7, 7), marks=pytest.mark.slow),
        pytest.param("resnetv2_50x1_bit", 224, (7, 7), marks=pytest.mark.slow),
        pytest.param("vit_small_patch14_dinov2", 518, (37, 37), marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_parts_are_those_of_timm(name, side, grid):
    """The pooled features are what timm's own network without a head gives for the same weights."""
    net = timm.create_model(name, num_classes=5, **SMALL.get(name, {})).eval()
    logits, pooled, maps = answers.read(net, images(side=side), logits=True, tokens=True)
    assert torch.equal(logits, net(images(side=side)))
    assert maps.shape == (2, *grid, net.num_features)
    net.reset_classifier(0)
    torch.testing.assert_close(pooled, net(images(side=side)))
    headless = answers.read(net, images(side=side), logits=False, tokens=False)
    assert torch.equal(headless[1], net(images(side=side)))


@torch.no_grad()
def test_patches_come_without_class_token_and_row_by_row():
    net = timm.create_model("test_vit", num_classes=0).eval()
    found = answers.spatial_map(net, net.forward_features(images(side=160)))
    tokens = net.forward_features(images(side=160))
    assert torch.equal(found[:, 3, 7], tokens[:, net.num_prefix_tokens + 3 * 10 + 7])


class Own(nn.Module):
    """A network of a user: two layers, the last of which is the head."""

    num_classes = 3

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x.mean((2, 3))).relu())


@torch.no_grad()
def test_another_network_gives_what_its_last_layer_gets():
    net = Own()
    logits, pooled, _ = answers.read(net, images(), logits=True, tokens=False)
    assert torch.equal(logits, net(images()))
    assert torch.equal(pooled, net.body(images().mean((2, 3))).relu())
    assert answers.read(net, images(), logits=False, tokens=False)[0] is None
    with pytest.raises(InputError, match="no tokens"):
        answers.read(net, images(), logits=True, tokens=True)


class TwoHeads(Own):
    """As distilled transformers, whose logits are the mean of two heads'."""

    def __init__(self) -> None:
        super().__init__()
        self.other, self.num_classes = nn.Linear(4, 3), 3

    def get_classifier(self) -> tuple[nn.Module, nn.Module]:
        return self.head, self.other

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.body(x.mean((2, 3)))
        return (self.head(found.relu()) + self.other(found.tanh())) / 2


@torch.no_grad()
def test_two_heads_have_the_mean_of_what_they_get():
    net = TwoHeads()
    _, pooled, _ = answers.read(net, images(), logits=True, tokens=False)
    given = net.body(images().mean((2, 3)))
    torch.testing.assert_close(pooled, (given.relu() + given.tanh()) / 2)
    classifier = Classifier(net, Card("two", 32, 1.0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)))
    torch.testing.assert_close(Features(classifier)(images()), pooled)


@torch.no_grad()
def test_a_head_that_was_put_on_afterwards_is_no_feature():
    net = timm.create_model("resnet10t", num_classes=0, channels=(8, 8, 16, 16)).eval()
    features = net(images())
    net.fc = nn.Linear(16, 5)
    logits, pooled, _ = answers.read(net, images(), logits=True, tokens=False)
    assert torch.equal(pooled, features)
    assert torch.equal(logits, net(images()))


def test_rows_are_taken_apart_as_they_were_joined():
    layout = Layout(3, (2, 4), (2, 5), (2, 3))
    logits, pooled, tokens = torch.randn(7, 3), torch.randn(7, 6), torch.randn(7, 6, 7)
    rows = layout.join(logits, pooled, tokens)
    assert rows.shape == (7, layout.width)
    found = layout.split(rows)
    assert torch.equal(found.logits, logits)
    assert [each.tolist() for each in found.pooled] == [pooled[:, :2].tolist(), pooled[:, 2:].tolist()]
    assert [each.tolist() for each in found.tokens] == [tokens[..., :2].tolist(), tokens[..., 2:].tolist()]
    judged = layout.split(rows[:, : layout.judged])
    assert torch.equal(judged.pooled[1], pooled[:, 2:])
    assert not judged.tokens


def test_a_readout_leaves_the_logits_of_a_classifier_as_they_are():
    net = timm.create_model("resnet10t", num_classes=5, **SMALL["resnet10t"]).eval()
    classifier = Classifier(net, Card("it", 32, 1.0, (0.5,) * 3, (0.2,) * 3))
    plain = classifier(images())
    answers.read_out(classifier, Readout(5, (1, 1)))
    assert torch.equal(classifier(images()), plain)
    rows = classifier.answers(images())
    assert rows.shape == (2, 5 + 16 + 16)
    assert torch.equal(rows[:, :5], plain)


def test_modes_are_judged_by_logits_and_features():
    reference = torch.randn(6, 9, dtype=torch.float64).float()
    noise = torch.randn(6, 9)
    noise[:, :4] = 0
    scale = reference[:, 4:].norm(dim=1, keepdim=True) / noise[:, 4:].norm(dim=1, keepdim=True)
    check = check_parity(InferenceMode(), reference + 0.02 * scale * noise, reference, 4)
    assert (check.kl, check.agreement) == (0, 1)
    assert check.error == pytest.approx(0.02, rel=1e-3)
    assert check.good
    assert not check_parity(InferenceMode(), reference + 0.04 * scale * noise, reference, 4).good
    features = check_parity(InferenceMode(), -reference, reference, 0)
    assert not features.good
    assert features.cosine == pytest.approx(-1)
    assert features.record["kl"] is None
    assert not check_parity(InferenceMode(), reference * float("nan"), reference, 0).good
