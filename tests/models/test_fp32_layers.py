"""Where a mode of 16 bits fails, the layers that carry its error are found and stay in fp32."""

from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

from funmatch.models.classifier import Card, Classifier
from funmatch.models.inference import frozen as frozen_models
from funmatch.models.inference import sensitive
from funmatch.models.inference.answers import Readout, read_out
from funmatch.models.inference.fp32_layers import UnknownLayers
from funmatch.models.inference.frozen import Frozen, freeze
from funmatch.models.inference.modes import AllowedModes, InferenceMode
from funmatch.models.inference.reference import FurtherViews, Reference
from funmatch.models.inference.sensitive import Layer, choices, modes_with_fp32_layers
from funmatch.models.load import load


class Cancelling(nn.Module):
    """Adds a large number and takes it away again: 16 bits keep little of what was there."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return (self.conv(x) + 3000) - 3000


def scaled(conv: nn.Conv2d, scale: float) -> nn.Conv2d:
    with torch.no_grad():
        conv.weight.mul_(scale)
        conv.bias.zero_()
    return conv


def body(kind: str) -> nn.Sequential:
    wide = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()]
    special = {
        # The second makes numbers that fp16 cannot hold, the third makes them small again.
        "overflow": [scaled(nn.Conv2d(32, 8, 1), 1e6), nn.ReLU(), scaled(nn.Conv2d(8, 32, 1), 1e-6)],
        "cancelling": [Cancelling(32)],
    }[kind]
    return nn.Sequential(*wide, *special, nn.Conv2d(32, 32, 3, padding=1), nn.ReLU())


class Network(nn.Module):
    """A body of layers of which some are sensitive, and a head."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.body, self.head = body(kind), nn.Linear(32, 5)

    def get_classifier(self):
        return self.head

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


def teacher(kind: str) -> Classifier:
    torch.manual_seed(0)
    model = Classifier(Network(kind), Card(kind, 32, 1.0, (0.5,) * 3, (0.25,) * 3), num_classes=5)
    with torch.no_grad():
        model.net.head.weight.mul_(8)
    return model


SENSITIVE = {("overflow", "fp16"): {"body.4", "body.6"}, ("cancelling", "bf16"): {"body.4"}}


def views(seed: int = 0) -> torch.Tensor:
    return torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def reference_of(make) -> Reference:
    reference = Reference(views())
    reference.extend(lambda: Frozen(make()), 16)
    return reference


@pytest.fixture(autouse=True)
def networks_of_any_size_and_speed(monkeypatch):
    """Small networks are no faster in 16 bits, and a layer of theirs takes half of the time by chance."""
    monkeypatch.setattr(frozen_models, "SMALL_NETWORK", 0)
    monkeypatch.setattr(sensitive.Search, "speedup", lambda _: 10.0)
    monkeypatch.setattr(sensitive, "MAX_SHARE", 0.9)
    monkeypatch.setattr(
        frozen_models,
        "time_layouts",
        lambda _make, modes, *_, **_packed: {modes[0]: 9.0 * (modes[0].precision == "fp32")},
    )


@pytest.mark.parametrize(("kind", "precision"), SENSITIVE)
def test_sensitive_layers_are_found_and_the_rest_stays_in_16_bits(kind, precision, capsys):
    further = FurtherViews(views(seed) for seed in range(1, 20))
    frozen, checks = freeze(
        lambda: teacher(kind), views(), AllowedModes((precision, "fp32")), further, modes_with_fp32_layers
    )
    assert [check.good for check in checks] == [False, True], [str(check) for check in checks]
    assert frozen.mode.precision == precision
    assert SENSITIVE[kind, precision] <= {*frozen.mode.fp32_layers}
    assert len(frozen.mode.fp32_layers) < 4
    assert frozen.classifier.net.body[0].weight.dtype != torch.float32
    assert "of its time in fp32" in capsys.readouterr().err
    torch.testing.assert_close(frozen(views(30)), Frozen(teacher(kind))(views(30)), rtol=0.05, atol=0.05)


def test_layers_in_fp32_keep_weights_that_were_never_rounded():
    exact = teacher("cancelling")
    frozen = Frozen(teacher("cancelling"), InferenceMode(precision="bf16", fp32_layers=("body.0", "body.4.conv")))
    net = frozen.classifier.net
    for name in ("body.0", "body.4.conv", "head"):
        assert torch.equal(net.get_submodule(name).weight, exact.net.get_submodule(name).weight)
    seen = {}
    for name in ("body.0", "body.1", "body.2", "body.4.conv", "head"):
        net.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: seen.update({name: inputs[0].dtype})
        )
    assert frozen(views()).dtype == torch.float32
    fp32, bf16 = torch.float32, torch.bfloat16
    assert seen == {"body.0": fp32, "body.1": bf16, "body.2": bf16, "body.4.conv": fp32, "head": fp32}


def test_all_layers_in_fp32_give_the_logits_of_fp32():
    names = tuple(f"body.{number}" for number in (0, 2, 4, 5))
    frozen = Frozen(teacher("cancelling"), InferenceMode(precision="bf16", fp32_layers=names))
    expected = Frozen(teacher("cancelling"), InferenceMode())(views())
    # The last layer's output is rounded on its way to the head, whose mean is taken outside of any layer.
    torch.testing.assert_close(frozen(views()), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("names", [("body.9",), ("",), ("body", "body.0"), ("body.0", "body.0")])
def test_names_that_are_no_separate_layers_are_refused(names):
    with pytest.raises(UnknownLayers):
        Frozen(teacher("cancelling"), InferenceMode(precision="bf16", fp32_layers=names))


def test_measuring_leaves_the_network_as_it_was():
    model = teacher("cancelling")
    search = sensitive.Search(
        model, InferenceMode(precision="bf16"), views(), Frozen(teacher("cancelling"))(views()), 9
    )
    expected = search.frozen(views())
    errors = {layer.name: layer.error for layer in search.layers()}
    assert max(errors, key=lambda name: errors[name]) == "body.4"
    assert errors["body.4"] > 100 * errors["body.5"]
    assert torch.equal(search.frozen(views()), expected)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.net.modules())


@pytest.mark.parametrize(("options", "rows"), [({}, 0), ({"speedup": lambda _: 1.05}, 0), ({"MAX_SHARE": 0.0}, 0)])
def test_nothing_is_tried_that_would_not_pay_off(monkeypatch, options, rows):
    for name, value in options.items():
        monkeypatch.setattr(sensitive.Search if name == "speedup" else sensitive, name, value)
    found = [*modes_with_fp32_layers(lambda: teacher("cancelling"), InferenceMode(precision="bf16"),
             reference_of(lambda: teacher("cancelling")))]  # fmt: skip
    assert bool(found) == (not options) or len(found) == rows


def test_a_search_that_fails_ends_in_a_line(monkeypatch, capsys):
    monkeypatch.setattr(sensitive.Search, "error_of", lambda *_: 1 / 0)
    mode, kind = InferenceMode(precision="bf16"), "cancelling"
    assert not [*modes_with_fp32_layers(lambda: teacher(kind), mode, reference_of(lambda: teacher(kind)))]
    assert "its sensitive layers were not found (division by zero)" in capsys.readouterr().err


def test_layers_with_the_most_error_for_their_time_are_kept_first():
    layers = [Layer("a", 3.0, 0.5), Layer("b", 2.0, 0.1), Layer("c", 0.2, 0.2), Layer("d", 0.3, 0.2)]
    kept = [[layer.name for layer in each] for each in choices(layers, 5.5)]
    assert kept == [["b", "a"], ["b", "a", "d"], ["b", "a", "d", "c"]]
    infinite = [replace(layers[0], error=float("inf")), *layers[1:]]
    assert [layer.name for layer in next(choices(infinite, float("inf")))] == ["a", "b"]


NETWORKS = {
    "resnetv2_50x1_bit": ("stem.conv", "stages.3.blocks.1", "norm"),
    "resnet10t": ("conv1", "layer2.0"),
    "convnext_atto": ("stem", "stages.2.blocks.0"),
    "vit_tiny_patch16_224": ("patch_embed", "blocks.1", "norm"),
    "levit_128s": ("stem", "stages.1"),
}


@pytest.mark.parametrize(
    ("name", "kernels"), [("resnetv2_50x1_bit", "native"), *((name, "packed") for name in NETWORKS)]
)
def test_networks_of_timm_compute_with_layers_in_fp32(name, kernels):
    side = 224 if name == "levit_128s" else 64
    options = {"vit_tiny_patch16_224": ("img_size=64", "depth=2")}.get(name, ())

    def make() -> Classifier:
        torch.manual_seed(0)
        return load(name, classes=5, options=options)

    pictures = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    mode = InferenceMode(precision="bf16", fp32_layers=NETWORKS[name], **{kernels: True})
    mixed, whole = Frozen(make(), mode), Frozen(make(), replace(mode, fp32_layers=()))
    expected = Frozen(make())(pictures)
    error, error_of_whole = ((each(pictures) - expected).abs().max() for each in (mixed, whole))
    assert error < 1.5 * error_of_whole
    assert error < 0.3 * expected.abs().max()
    assert mixed(pictures).dtype == torch.float32
    assert not torch.equal(mixed(pictures), whole(pictures))


def test_a_readout_of_features_with_layers_in_fp32():
    net = timm.create_model("resnet10t", num_classes=5).eval()

    def make() -> Classifier:
        other = timm.create_model("resnet10t", num_classes=5)
        other.load_state_dict(net.state_dict())
        return read_out(Classifier(other, Card("it", 64, 1.0, (0.5,) * 3, (0.2,) * 3)), Readout(5, (1, 1)))

    pictures = torch.rand(4, 3, 64, 64)
    rows = Frozen(make(), InferenceMode(precision="bf16", fp32_layers=("layer3",)))(pictures)
    expected = Frozen(make())(pictures)
    assert rows.shape == expected.shape
    assert (rows - expected).norm() < 0.02 * expected.norm()
