"""A frozen teacher computes the same function in the fastest mode whose outputs are close enough."""

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
from funmatch.models.inference.frozen import Frozen, freeze
from funmatch.models.inference.modes import PLAIN, AllowedModes, InferenceMode
from funmatch.models.inference.parity import ParityCheck, check_parity
from funmatch.models.load import load


def randomize_norms(net: nn.Module) -> nn.Module:
    """Give BatchNorm random statistics and scales: those of a new network would hide a wrong fold."""
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
def test_folding_changes_logits_by_rounding_only(name):
    torch.manual_seed(0)
    net = randomize_norms(timm.create_model(name, num_classes=7, **NETWORKS[name]))
    views = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = net(views)
        actual = fold(net)(views)
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert not any(isinstance(module, StdConv2d) for module in net.modules())


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050", "repvgg_a0"])
def test_every_batch_norm_after_a_convolution_is_folded(name):
    net = randomize_norms(timm.create_model(name, num_classes=7))
    assert any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fold(net).modules())


@pytest.mark.parametrize("kind", [StdConv2d, StdConv2dSame, ScaledStdConv2dSame])
def test_standardised_convolutions_become_plain_ones(kind):
    torch.manual_seed(0)
    conv = kind(3, 8, 3, stride=2).eval()
    views = torch.randn(2, 3, 15, 15)
    with torch.no_grad():
        torch.testing.assert_close(to_plain_conv(conv)(views), conv(views), rtol=1e-5, atol=1e-5)


class SharedOutput(nn.Module):
    """Its convolution's output is used twice, so BatchNorm cannot be folded into it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.conv(x)
        return (self.norm(x) + x).mean((2, 3))


class SharedNorm(SharedOutput):
    """Uses its BatchNorm twice."""

    def forward(self, x):
        return self.norm(self.conv(self.norm(self.conv(x)[:, :3].repeat(1, 2, 1, 1)[:, :4])[:, :3])).mean((2, 3))


class DataDependent(SharedOutput):
    """Branches on a computed value, so it cannot be traced."""

    def forward(self, x):
        x = self.norm(self.conv(x))
        return (x if x.sum() > 0 else -x).mean((2, 3))


@pytest.mark.parametrize("kind", [SharedOutput, SharedNorm, DataDependent])
def test_batch_norm_that_cannot_be_folded_is_kept(kind):
    net = randomize_norms(kind())
    assert foldable_batch_norms(net) == []
    views = torch.rand(2, 3, 12, 12)
    with torch.no_grad():
        expected = net(views)
        assert torch.equal(fold(net)(views), expected)


def test_a_folded_batch_norm_keeps_its_activation():
    net = randomize_norms(nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    views = torch.rand(2, 3, 12, 12)
    with torch.no_grad():
        x = F.conv2d(views, net[0].weight, net[0].bias)
        x = (x - net[1].running_mean.view(-1, 1, 1)) / (net[1].running_var.view(-1, 1, 1) + 1e-5).sqrt()
        expected = (x * net[1].weight.view(-1, 1, 1) + net[1].bias.view(-1, 1, 1)).relu().mean((2, 3))
        torch.testing.assert_close(fold(net)(views), expected)


def teacher(name: str = "resnet10t", **options) -> Classifier:
    torch.manual_seed(3)
    model = load(name, classes=5, **options)
    randomize_norms(model.net)
    with torch.no_grad():
        model.net.get_classifier().weight.mul_(20)  # distinct logits, so that agreement means something
    return model


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_precision_returns_fp32_logits_and_stays_frozen(precision):
    views = torch.rand(8, 3, 64, 64)
    expected = Frozen(teacher())(views)
    frozen = Frozen(teacher(), InferenceMode(precision=precision))
    parent = nn.ModuleList([frozen]).train()
    with torch.autocast("cpu", torch.bfloat16):
        actual = parent[0](views.requires_grad_())
    assert actual.dtype == torch.float32
    assert not actual.requires_grad
    assert not any(module.training for module in frozen.classifier.modules())
    assert frozen.size == teacher().count_parameters()
    tolerance = {"fp32": 1e-5, "fp16": 1e-2, "bf16": 5e-2}[precision]
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()
    distinct = (actual * 2**8).frac().unique().numel()
    assert precision == "fp32" or distinct > 10, "the head computes in fp32, so logits have more than 16-bit resolution"


def fake_timing(seconds: dict[str, float]):
    """Replaces the time measurement, so that the order of modes does not depend on the machine."""
    return lambda _make, modes, *_, **_packed: {modes[0]: seconds[modes[0].precision]}


def test_fastest_mode_with_equal_outputs_is_chosen(monkeypatch):
    """A 16-bit mode is chosen only if its outputs agree with fp32, however fast it is."""
    monkeypatch.setattr(frozen_models, "SMALL_NETWORK", 0)
    monkeypatch.setattr(frozen_models, "time_layouts", fake_timing({"bf16": 1.0, "fp16": 2.0, "fp32": 9.0}))
    views = torch.rand(32, 3, 32, 32)
    frozen, checks = freeze(teacher, views, AllowedModes(("bf16", "fp16", "fp32")))
    assert [check.mode.precision for check in checks] == ["bf16", "fp16", "fp32"][: len(checks)]
    assert frozen.mode == checks[-1].mode
    assert checks[-1].good
    assert not any(check.good for check in checks[:-1])
    torch.testing.assert_close(frozen(views), Frozen(teacher())(views), rtol=5e-2, atol=5e-2)


def test_mode_with_other_outputs_is_rejected(monkeypatch):
    monkeypatch.setattr(frozen_models, "SMALL_NETWORK", 0)
    original_forward = frozen_models.Frozen.forward

    def with_noise(self, views):
        return original_forward(self, views) + (torch.randn(len(views), 5) if self.mode.precision != "fp32" else 0)

    monkeypatch.setattr(frozen_models.Frozen, "forward", with_noise)
    monkeypatch.setattr(
        frozen_models,
        "time_layouts",
        lambda _make, modes, *_, **_packed: {modes[0]: 9.0 if modes[0].precision == "fp32" else 1.0},
    )
    frozen, checks = freeze(teacher, torch.rand(16, 3, 32, 32), AllowedModes(("bf16", "fp32")))
    assert frozen.mode.precision == "fp32"
    assert [check.good for check in checks] == [False, True]
    single, checks = freeze(teacher, torch.rand(16, 3, 32, 32), AllowedModes(("bf16",)))
    assert single.mode.precision == "bf16", "the only allowed mode is used although it differs"
    assert [check.good for check in checks] == [False]


def test_failing_fold_falls_back_to_the_plain_teacher(monkeypatch):
    monkeypatch.setattr(frozen_models, "fold", lambda _: 1 / 0)
    frozen, checks = freeze(teacher, torch.rand(4, 3, 32, 32), AllowedModes())
    assert frozen.mode == PLAIN
    assert "division by zero" in str(checks[0])
    assert checks[-1].good


def test_parity_check_equals_its_definition():
    truth = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 0.9]])
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.9, 1.0]])
    check = check_parity(InferenceMode(), logits, truth)
    p, q = truth.double().softmax(-1), logits.double().softmax(-1)
    assert check.kl == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-4)
    assert check.agreement == pytest.approx(2 / 3)
    assert not check.good
    assert ParityCheck(InferenceMode(), 9, 1e-3, 0.995).good
    assert not ParityCheck(InferenceMode(), 9, 1.1e-3, 1.0).good
    assert not ParityCheck(InferenceMode(), 9, 0.0, 0.994).good
    assert not check_parity(InferenceMode(), logits * float("nan"), truth).good


def test_previously_best_mode_is_tried_first():
    first = InferenceMode(layout="contiguous")
    modes = list(
        frozen_models.candidate_modes(
            teacher, torch.rand(2, 3, 32, 32), AllowedModes(("fp32",), first=first), small=False
        )
    )
    assert modes[0] == first


class ReturnsObject(nn.Module):
    """Returns an object with `logits`, as the models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, x):
        return type("Reply", (), {"logits": self.linear(x.mean((2, 3)))})()


def test_outputs_with_a_logits_attribute():
    model = Classifier(ReturnsObject(), Card("replying", 8, 1.0, (0.0,) * 3, (1.0,) * 3), num_classes=4)
    views = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        expected = model.net.linear(views.mean((2, 3)))
    assert torch.equal(model(views), expected)
    torch.testing.assert_close(Frozen(model, InferenceMode())(views), expected)


@pytest.mark.slow
def test_compiled_teacher_gives_equal_logits(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    views = torch.rand(4, 3, 32, 32)
    frozen, checks = freeze(teacher, views, AllowedModes(compiled=True))
    measured = replace(InferenceMode(), layout=frozen.mode.layout)  # whichever is faster here
    assert frozen.mode == replace(measured, compiled=True), [str(check) for check in checks]
    expected = Frozen(teacher())(views)
    torch.testing.assert_close(frozen(views), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(frozen(views[:3]), expected[:3], rtol=1e-4, atol=1e-4)


class SharedKernel(SharedOutput):
    """Uses its convolution's kernel a second time, outside the layer."""

    def forward(self, x):
        return self.norm(self.conv(x)).mean((2, 3)) + F.conv2d(x, self.conv.weight).mean((2, 3))


def test_kernel_that_is_used_elsewhere_is_not_folded():
    assert foldable_batch_norms(randomize_norms(SharedKernel())) == []


def test_head_that_folding_joins_with_its_norm():
    """Folding replaces LeViT's head by another module, and the 16-bit conversion must find the new one."""
    torch.manual_seed(0)
    model = load("levit_128s", classes=5)
    views = torch.rand(2, 3, 224, 224)
    # A copy, because older timm caches what it computed in fp32.
    expected = Frozen(copy.deepcopy(model))(views)
    model = Frozen(model, InferenceMode(precision="bf16"))
    assert (model(views) - expected).abs().max() < 0.1 * expected.abs().max() + 0.05


def test_networks_with_5d_kernels_can_be_frozen():
    assert Frozen(load("lambda_resnet26t", classes=3), InferenceMode()).mode.folded
