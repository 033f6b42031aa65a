"""Frozen networks with packed weights compute what they computed before."""

import pytest
import torch
from timm.layers import Mlp
from torch import Tensor, nn

import funmatch
from funmatch.models.classifier import Classifier
from funmatch.models.inference.frozen import Frozen, freeze
from funmatch.models.inference.modes import AllowedModes, InferenceMode
from funmatch.models.inference.native import packed as packed_layers
from funmatch.models.inference.native.packed import ACTIVATIONS, pack_layers
from funmatch.models.load import load
from funmatch.training.run import folder as run_folder

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
    packed = Frozen(build(name, 64), InferenceMode(precision=precision, packed=True))
    assert fused(packed) >= activations
    reference = Frozen(build(name, 64))
    for count in (4, 1, 7):
        views = torch.rand(count, 3, 64, 64)
        truth = reference(views)
        error = (packed(views) - truth).abs().max() / truth.abs().max()
        before = (plain(views) - truth).abs().max() / truth.abs().max()
        assert error <= max({"fp32": 1e-5, "bf16": 1e-2}[precision], 2 * before)


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


def test_packed_weights_are_tried_where_they_are_allowed(monkeypatch):
    views = torch.rand(8, 3, 64, 64)
    allowed = AllowedModes(("fp32",), packed=True)
    mode = InferenceMode(packed=True)
    assert mode.is_allowed(allowed)
    assert not mode.is_allowed(AllowedModes(("fp32",)))
    assert "packed weights" in str(mode)
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
