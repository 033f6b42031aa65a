"""The frozen teacher: the same function, computed in whatever form is the fastest that is as good."""

import copy
from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import nn

from funmatch.models.classifier import Card, Classifier
from funmatch.models.inference import frozen as frozen_models
from funmatch.models.inference.fold import fold, foldable_batch_norms, to_plain_conv
from funmatch.models.inference.frozen import PLAIN, AllowedModes, Frozen, InferenceMode, ParityCheck, freeze
from funmatch.models.load import load


def shaken(net: nn.Module) -> nn.Module:
    """The network with statistics and scales that are not those of a new one."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return net.eval()


NETWORKS = {
    "resnet10t": {},
    "mobilenetv3_small_050": {},  # squeeze and excite
    "resnetv2_50x1_bit": {},  # weight standardisation, GroupNorm
    "repvgg_a0": {},  # branches that timm itself can join
    "nfnet_l0": {},  # scaled weight standardisation
    "densenet121": {},  # BatchNorm before convolutions, which stays
    "convnext_atto": {},
    "vit_tiny_patch16_224": {"depth": 2, "img_size": 64},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_folding_changes_nothing_but_rounding(name):
    torch.manual_seed(0)
    net = shaken(timm.create_model(name, num_classes=7, **NETWORKS[name]))
    views = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        wanted = net(views)
        got = fold(net)(views)
    assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    assert not any(isinstance(module, StdConv2d) for module in net.modules())


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050", "repvgg_a0"])
def test_no_batch_norm_is_left_behind_a_convolution(name):
    net = shaken(timm.create_model(name, num_classes=7))
    assert any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fold(net).modules())


@pytest.mark.parametrize("kind", [StdConv2d, StdConv2dSame, ScaledStdConv2dSame])
def test_standardised_convolutions_of_each_kind(kind):
    torch.manual_seed(0)
    conv = kind(3, 8, 3, stride=2).eval()
    views = torch.randn(2, 3, 15, 15)
    with torch.no_grad():
        torch.testing.assert_close(to_plain_conv(conv)(views), conv(views), rtol=1e-5, atol=1e-5)


class Shared(nn.Module):
    """One whose convolution's answer is used twice, so that its BatchNorm cannot be folded into it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.conv(x)
        return (self.norm(x) + x).mean((2, 3))


class Twice(Shared):
    """One that uses its BatchNorm twice."""

    def forward(self, x):
        return self.norm(self.conv(self.norm(self.conv(x)[:, :3].repeat(1, 2, 1, 1)[:, :4])[:, :3])).mean((2, 3))


class Branching(Shared):
    """One whose code depends on what it computes."""

    def forward(self, x):
        x = self.norm(self.conv(x))
        return (x if x.sum() > 0 else -x).mean((2, 3))


@pytest.mark.parametrize("kind", [Shared, Twice, Branching])
def test_a_batch_norm_that_cannot_be_folded_stays(kind):
    net = shaken(kind())
    assert foldable_batch_norms(net) == []
    views = torch.rand(2, 3, 12, 12)
    with torch.no_grad():
        wanted = net(views)
        assert torch.equal(fold(net)(views), wanted)


def test_a_folded_batch_norm_keeps_its_activation():
    net = shaken(nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    views = torch.rand(2, 3, 12, 12)
    with torch.no_grad():
        x = F.conv2d(views, net[0].weight, net[0].bias)
        x = (x - net[1].running_mean.view(-1, 1, 1)) / (net[1].running_var.view(-1, 1, 1) + 1e-5).sqrt()
        wanted = (x * net[1].weight.view(-1, 1, 1) + net[1].bias.view(-1, 1, 1)).relu().mean((2, 3))
        torch.testing.assert_close(fold(net)(views), wanted)


def teacher(name: str = "resnet10t", **knobs) -> Classifier:
    torch.manual_seed(3)
    model = load(name, classes=5, **knobs)
    shaken(model.net)
    with torch.no_grad():
        model.net.get_classifier().weight.mul_(20)  # so that it has opinions
    return model


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_form_answers_in_fp32_and_stays_frozen(precision):
    views = torch.rand(8, 3, 64, 64)
    wanted = Frozen(teacher())(views)
    frozen = Frozen(teacher(), InferenceMode(precision=precision))
    parent = nn.ModuleList([frozen]).train()
    with torch.autocast("cpu", torch.bfloat16):
        got = parent[0](views.requires_grad_())
    assert got.dtype == torch.float32
    assert not got.requires_grad
    assert not any(module.training for module in frozen.classifier.modules())
    assert frozen.size == teacher().count_parameters()
    tolerance = {"fp32": 1e-5, "fp16": 1e-2, "bf16": 5e-2}[precision]
    assert (got - wanted).abs().max() <= tolerance * wanted.abs().max()
    distinct = (got * 2**8).frac().unique().numel()
    assert precision == "fp32" or distinct > 10, "logits are as fine as fp32, whatever is before the head"


def as_fast_as(seconds: dict[str, float]):
    """What stands for a measurement."""
    return lambda _make, forms, _views: {forms[0]: seconds[forms[0].precision]}


def test_what_is_as_good_is_taken(monkeypatch):
    """Whatever is faster here, 16 bits are only taken if they answer as fp32 does."""
    monkeypatch.setattr(frozen_models, "SMALL_NETWORK", 0)
    monkeypatch.setattr(frozen_models, "time_layouts", as_fast_as({"bf16": 1.0, "fp16": 2.0, "fp32": 9.0}))
    views = torch.rand(32, 3, 32, 32)
    frozen, tried = freeze(teacher, views, AllowedModes(("bf16", "fp16", "fp32")))
    assert [check.mode.precision for check in tried] == ["bf16", "fp16", "fp32"][: len(tried)]
    assert frozen.mode == tried[-1].mode
    assert tried[-1].good
    assert not any(check.good for check in tried[:-1])
    torch.testing.assert_close(frozen(views), Frozen(teacher())(views), rtol=5e-2, atol=5e-2)


def test_a_form_that_answers_otherwise_is_refused(monkeypatch):
    monkeypatch.setattr(frozen_models, "SMALL_NETWORK", 0)
    honest = frozen_models.Frozen.forward

    def off(self, views):
        return honest(self, views) + (torch.randn(len(views), 5) if self.mode.precision != "fp32" else 0)

    monkeypatch.setattr(frozen_models.Frozen, "forward", off)
    monkeypatch.setattr(
        frozen_models,
        "time_layouts",
        lambda _make, forms, _views: {forms[0]: 9.0 if forms[0].precision == "fp32" else 1.0},
    )
    frozen, tried = freeze(teacher, torch.rand(16, 3, 32, 32), AllowedModes(("bf16", "fp32")))
    assert frozen.mode.precision == "fp32"
    assert [check.good for check in tried] == [False, True]
    alone, tried = freeze(teacher, torch.rand(16, 3, 32, 32), AllowedModes(("bf16",)))
    assert alone.mode.precision == "bf16", "who says it gets it"
    assert [check.good for check in tried] == [False]


def test_folding_that_goes_wrong_leaves_the_plain_teacher(monkeypatch):
    monkeypatch.setattr(frozen_models, "fold", lambda _: 1 / 0)
    frozen, tried = freeze(teacher, torch.rand(4, 3, 32, 32), AllowedModes())
    assert frozen.mode == PLAIN
    assert "division by zero" in str(tried[0])
    assert tried[-1].good


def test_the_check_is_what_it_says():
    truth = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 0.9]])
    answers = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.9, 1.0]])
    check = frozen_models.check_parity(InferenceMode(), answers, truth)
    p, q = truth.double().softmax(-1), answers.double().softmax(-1)
    assert check.kl == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-4)
    assert check.agreement == pytest.approx(2 / 3)
    assert not check.good
    assert ParityCheck(InferenceMode(), 9, 1e-3, 0.995).good
    assert not ParityCheck(InferenceMode(), 9, 1.1e-3, 1.0).good
    assert not ParityCheck(InferenceMode(), 9, 0.0, 0.994).good
    assert not frozen_models.check_parity(InferenceMode(), answers * float("nan"), truth).good


def test_the_form_that_was_best_before_comes_first():
    first = InferenceMode(layout="contiguous")
    forms = list(
        frozen_models.candidate_modes(
            teacher, torch.rand(2, 3, 32, 32), AllowedModes(("fp32",), first=first), small=False
        )
    )
    assert forms[0] == first


class Replying(nn.Module):
    """One that answers with an object, as those of Hugging Face do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, x):
        return type("Reply", (), {"logits": self.linear(x.mean((2, 3)))})()


def test_answers_with_logits_inside():
    model = Classifier(Replying(), Card("replying", 8, 1.0, (0.0,) * 3, (1.0,) * 3), num_classes=4)
    views = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        wanted = model.net.linear(views.mean((2, 3)))
    assert torch.equal(model(views), wanted)
    torch.testing.assert_close(Frozen(model, InferenceMode())(views), wanted)


@pytest.mark.slow
def test_compiled_it_is_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    views = torch.rand(4, 3, 32, 32)
    frozen, tried = freeze(teacher, views, AllowedModes(compiled=True))
    measured = replace(InferenceMode(), layout=frozen.mode.layout)  # whichever is faster here
    assert frozen.mode == replace(measured, compiled=True), [str(check) for check in tried]
    wanted = Frozen(teacher())(views)
    torch.testing.assert_close(frozen(views), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(frozen(views[:3]), wanted[:3], rtol=1e-4, atol=1e-4)


class Lending(Shared):
    """One that uses its convolution's kernel once more, by itself."""

    def forward(self, x):
        return self.norm(self.conv(x)).mean((2, 3)) + F.conv2d(x, self.conv.weight).mean((2, 3))


def test_a_kernel_that_is_used_by_itself_is_left_alone():
    assert foldable_batch_norms(shaken(Lending())) == []


def test_a_head_that_folding_joins_with_its_norm():
    """LeViT's head ends as another module than it began; 16 bits are no reason to stumble over that."""
    torch.manual_seed(0)
    model = load("levit_128s", classes=5)
    views = torch.rand(2, 3, 224, 224)
    # A copy, since an older timm keeps what it computed in fp32 for the next time.
    wanted = Frozen(copy.deepcopy(model))(views)
    model = Frozen(model, InferenceMode(precision="bf16"))
    assert (model(views) - wanted).abs().max() < 0.1 * wanted.abs().max() + 0.05


def test_kernels_of_five_axes():
    assert Frozen(load("lambda_resnet26t", classes=3), InferenceMode()).mode.folded
