"""Frozen networks with packed weights compute what they computed before."""

import copy
from dataclasses import replace

import pytest
import torch
from timm.layers import Mlp
from timm.models.resnet import BasicBlock
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import funmatch
from funmatch.models.classifier import Classifier
from funmatch.models.inference.fold import fold
from funmatch.models.inference.frozen import Frozen, freeze
from funmatch.models.inference.modes import AllowedModes, InferenceMode
from funmatch.models.inference.native import packed as packed_layers
from funmatch.models.inference.native.packed import ACTIVATIONS, pack_layers
from funmatch.models.inference.native.sums import fuse_sums
from funmatch.models.inference.timing import time_layouts
from funmatch.models.load import load
from funmatch.training.run import folder as run_folder
from funmatch.training.teachers.freezing import mode_of

LAST = torch.channels_last
pytestmark = pytest.mark.skipif(not packed_layers.is_available(), reason="torch has no oneDNN here")


def build(name: str, side: int) -> Classifier:
    torch.manual_seed(0)
    classifier = load(name, classes=10, side=side)
    nn.init.normal_(classifier.net.get_classifier().weight, std=0.1)
    return classifier


def fused(net: nn.Module) -> int:
    return sum(getattr(module, "_activation", packed_layers.NONE) != packed_layers.NONE for module in net.modules())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "activations"),
    [
        ("test_resnet", 2), ("test_efficientnet", 6), ("test_vit", 6), ("test_convnext", 0),
        pytest.param("tf_efficientnet_lite0", 33, marks=pytest.mark.slow),
        pytest.param("mobilenetv3_small_050", 20, marks=pytest.mark.slow),
        pytest.param("regnety_002", 26, marks=pytest.mark.slow),
        pytest.param("resnetv2_50x1_bit", 0, marks=pytest.mark.slow),
        pytest.param("swin_tiny_patch4_window7_224", 12, marks=pytest.mark.slow),
        pytest.param("convnext_atto", 12, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_packed_network_gives_equal_logits_for_any_batch(name, activations, precision):
    plain = Frozen(build(name, 64), InferenceMode(precision=precision))
    packed = Frozen(build(name, 64), InferenceMode(precision=precision, packed=True, sums=True))
    assert fused(packed) >= activations
    reference = Frozen(build(name, 64))
    for count in (4, 1, 7):
        views = torch.rand(count, 3, 64, 64)
        truth = reference(views)
        error = (packed(views) - truth).abs().max() / truth.abs().max()
        before = (plain(views) - truth).abs().max() / truth.abs().max()
        assert error <= max({"fp32": 1e-5, "bf16": 1e-2}[precision], 2 * before)


def sums_in(frozen: Frozen, views: Tensor) -> int:
    """Returns how many sums torch computes of images, of which a packed convolution may compute some."""
    counted = Counted()
    with counted:
        frozen(views)
    return counted.sums


class Counted(TorchFunctionMode):
    """Counts sums of tensors with four dimensions."""

    sums = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "").strip("_")
        self.sums += name in ("add", "iadd") and all(isinstance(each, Tensor) and each.ndim == 4 for each in args)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("resnet18", 8, 0), ("test_resnet", 4, 0), ("regnety_002", 13, 0),
        # Here another factor follows the last convolution of most blocks, or this convolution is narrow.
        ("seresnet50", 16, 12), ("tf_efficientnet_lite0", 9, 9), ("densenet121", 0, 0),
    ],
)  # fmt: skip
def test_convolutions_add_the_shortcuts_of_their_blocks(name, before, after):
    views = torch.rand(2, 3, 32, 32)
    truth = Frozen(build(name, 32))(views)
    for mode, count in ((InferenceMode(packed=True), before), (InferenceMode(packed=True, sums=True), after)):
        frozen = Frozen(build(name, 32), mode)
        assert sums_in(frozen, views) == count
        assert frozen.mode.sums == (count < before)
        for each in (frozen, copy.deepcopy(frozen)):
            torch.testing.assert_close(each(views), truth, atol=1e-5, rtol=1e-4)


def test_blocks_that_are_watched_train_or_are_not_timms_keep_their_code():
    class Own(BasicBlock):
        pass

    def change_hook(net: nn.Module) -> None:
        net.layer1[0].conv1.register_forward_hook(lambda *_: None)

    def change_class(net: nn.Module) -> None:
        net.layer1[0].__class__ = Own

    for change, count in ((nn.Module.eval, 8), (nn.Module.train, 0), (change_hook, 7), (change_class, 7)):
        net = pack_layers(fold(build("resnet18", 32).net.eval()))
        change(net)
        assert fuse_sums(net) == count


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", [(2, 6, 4, 5), (6, 1, 1), (1, 6, 4, 5)])
@pytest.mark.parametrize("kind", ["usual", "gradients", "double"])
def test_sum_of_any_kind_equals_torchs(relu, shape, kind):
    torch.manual_seed(0)
    dtype = torch.double if kind == "double" else torch.float
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2).to(dtype)
    views, other = torch.randn(2, 4, 8, 9, dtype=dtype), torch.randn(shape, dtype=dtype)
    truth = conv(views) + other
    (packed,) = pack_layers(nn.Sequential(conv)).requires_grad_(kind == "gradients")
    y = packed(views, other, relu=relu)
    torch.testing.assert_close(y, truth.relu() if relu else truth, atol=1e-5, rtol=1e-5)
    assert y.requires_grad == (kind == "gradients")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_each_activation_is_computed_with_its_layer(activation):
    torch.manual_seed(0)
    convolution, linear = nn.Conv2d(3, 8, 3, bias=False), nn.Linear(8, 16)
    pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net = nn.Sequential(convolution, nn.Identity(), activation(), *pool, linear, activation()).eval()
    net.requires_grad_(False)
    views = 4 * torch.randn(5, 3, 9, 9).contiguous(memory_format=LAST)
    truth = net(views)
    assert fused(pack_layers(net)) == 2
    torch.testing.assert_close(net(views), truth, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_packed_is_computed_by_torch():
    torch.manual_seed(0)

    class Shared(nn.Module):
        """An activation behind two layers, a layer that is called twice, and paddings that oneDNN lacks."""

        def __init__(self) -> None:
            super().__init__()
            self.act, self.approximate = nn.ReLU(), nn.GELU(approximate="tanh")
            self.one = nn.Conv2d(4, 4, 3, padding="same")
            self.two = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
            self.three, self.linear = nn.Conv2d(4, 4, 1), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.three(self.act(self.two(self.act(self.one(x)))))
            return self.approximate(self.linear(self.linear(x.mean((2, 3)))))

    net = Shared().eval().requires_grad_(False)
    views = torch.randn(2, 4, 6, 6).contiguous(memory_format=LAST)
    truth = net(views)
    assert fused(pack_layers(net)) == 0
    assert [type(module).__name__ for module in (net.one, net.two)] == ["Conv2d", "Conv2d"]
    torch.testing.assert_close(net(views), truth)
    torch.testing.assert_close(net(views.clone().requires_grad_()), truth)
    torch.testing.assert_close(net.double()(views.double()).float(), truth)
    one = pack_layers(nn.Linear(4, 3).requires_grad_(False))
    row = views[0, 0, 0, :4]
    torch.testing.assert_close(one(row), nn.functional.linear(row, one.weight, one.bias))


def test_mlp_in_a_network_without_a_trace_is_fused():
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = Mlp(8, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.mlp(x) if x.sum() > 0 else x

    net = Branching().eval().requires_grad_(False)
    x = torch.rand(3, 8)
    truth = net(x)
    assert fused(pack_layers(net)) == 1
    torch.testing.assert_close(net(x), truth)


def test_the_pass_that_lays_weights_out_does_not_count(monkeypatch):
    clock = [0.0]

    class Teacher:
        """Takes 2 s, or 1 s packed, and 10 s more to lay its weights out."""

        def __init__(self, mode: InferenceMode) -> None:
            self.mode, self.classifier, self.laid_out = mode, build("test_resnet", 32), False

        def pack(self, *, sums: bool) -> None:
            self.mode = replace(self.mode, packed=True, sums=sums)

        def __call__(self, views: Tensor) -> Tensor:
            clock[0] += 1 if self.laid_out else 11 if self.mode.packed else 2
            self.laid_out = self.mode.packed
            return views

    monkeypatch.setattr("funmatch.models.inference.timing.time.perf_counter", lambda: clock[0])
    found = time_layouts(Teacher, [InferenceMode()], torch.rand(1), 2.0, AllowedModes(packed=True))
    assert found == {InferenceMode(packed=True): 1.0}


def test_packed_weights_are_tried_where_they_are_allowed(monkeypatch):
    views = torch.rand(8, 3, 64, 64)
    allowed = AllowedModes(("fp32",), packed=True)
    mode = InferenceMode(packed=True)
    assert mode.is_allowed(allowed)
    assert not mode.is_allowed(AllowedModes(("fp32",)))
    assert "packed weights" in str(mode)
    assert not replace(mode, sums=True).is_allowed(allowed)
    assert replace(mode, sums=True).is_allowed(replace(allowed, sums=True))
    # A record from before there were sums: that run never had them.
    assert "sums" not in mode.record
    assert mode_of(mode.record) == mode
    monkeypatch.setattr("funmatch.models.inference.frozen.SMALL_NETWORK", 0)
    monkeypatch.setattr("funmatch.models.inference.timing._median_seconds", lambda frozen, *_: 2.0 - frozen.mode.packed)
    frozen, checks = freeze(lambda: build("test_vit", 64), views, allowed)
    assert frozen.mode.packed
    assert checks[-1].good


def test_run_with_a_packed_teacher_resumes_bitwise(tmp_path, monkeypatch):
    monkeypatch.setenv("FUNMATCH_CACHE", str(tmp_path / "cache"))
    for module in ("models.inference.frozen", "training.teachers.freezing", "training.student.acceleration"):
        monkeypatch.setattr(f"funmatch.{module}.SMALL_NETWORK", 0)
    monkeypatch.setattr("funmatch.models.inference.timing._median_seconds", lambda frozen, *_: 2.0 - frozen.mode.packed)
    options = {
        "data": "fashion-mini", "teacher": "fashion-mini-teacher", "student": "fashion-mini-student", "batch": 16,
        "save_every": 2, "threads": 1, "precision": "bf16", "compile": "native",
    }  # fmt: skip
    options |= {"steps": 4, "log_every": 1}
    whole = funmatch.distill(**options, out=tmp_path / "whole")
    (record,) = (each for each in run_folder.Run(whole.folder).metrics.read() if each["event"] == "teacher")
    assert record["form"]["packed"]
    assert run_folder.provenance_of(whole.folder)["kernels"] == ["batch_norm"]

    def stop(_event, step, _values):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        funmatch.distill(**options, out=tmp_path / "again", on_event=stop)
    # What is faster now is of no account.
    monkeypatch.setattr("funmatch.models.inference.timing._median_seconds", lambda frozen, *_: 1.0 + frozen.mode.packed)
    again = funmatch.distill(**options, out=tmp_path / "again")
    first, second = ((run.folder / "student" / "model.safetensors").read_bytes() for run in (whole, again))
    assert first == second
