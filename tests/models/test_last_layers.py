"""Heads in the place of a network's last layer, for networks that end in many ways."""

import json

import pytest
import timm
import torch
import transformer_families
from torch import nn

from funmatch.errors import InputError
from funmatch.models.classifier import Card, Classifier
from funmatch.models.heads.headed import HEADED, attach
from funmatch.models.heads.modules import CosineHead, NeighbourHead
from funmatch.models.inference.features import Features
from funmatch.models.load import load
from funmatch.models.save import save
from funmatch.ops.heads.logistic import LinearHead

FAMILIES = {
    "resnet10t": "a linear layer",
    "convnext_atto": "a norm before it",
    "deit_tiny_distilled_patch16_224": "two heads, of which the mean counts",
    "mobilenetv3_small_050": "a convolution behind the pool",
    "vit_base_patch16_siglip_224": "attention as pool",
    "resnetv2_50x1_bit": "a convolution",
    "levit_128s": "a norm that the features do not pass",
    "repvit_m0_9": "the same, of one head",
    "volo_d1_224": "a second head for patches",
    "crossvit_9_240": "two branches",
    "vgg11": "linear layers before it",
    "swin_tiny_patch4_window7_224": "channels last",
    "efficientformer_l1": "two heads",
    "dla34": "a convolution",
}
UNREPLACED = "caformer_s18"
"""Its head is a network of several layers, whose input are timm's features."""


def linear_head(size, classes=7):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(size, classes, generator=generator, dtype=torch.float64) / size**0.5
    return LinearHead(weight, torch.randn(classes, generator=generator, dtype=torch.float64))


def attached(classifier, make_head=linear_head):
    """A classifier with a head, views, and the logits that the head gives for their features."""
    side = classifier.card.side
    views = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        features = Features(classifier.eval())(views)
        head = make_head(features.shape[1])
        expected = head(features)
        attach(classifier, head, None, side)
    return classifier, views, expected


def check_saved(classifier, views, expected, folder):
    folder.mkdir()
    save(classifier, folder, card=classifier.card, about={})
    with torch.no_grad():
        torch.testing.assert_close(load(str(folder)).eval()(views), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("num_classes=0",)], ids=["other classes", "headless"])
@pytest.mark.parametrize("name", FAMILIES)
def test_saved_network_has_the_logits_of_the_head(name, options, tmp_path):
    torch.manual_seed(0)
    classifier, views, expected = attached(load(name, options=options))
    assert classifier.function is None, FAMILIES[name]
    check_saved(classifier, views, expected, tmp_path / "model")
    net = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(net(classifier.normalize(views)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_head_is_put_behind_a_network_whose_last_layer_is_not_linear(tmp_path):
    torch.manual_seed(0)
    classifier, views, expected = attached(load(UNREPLACED))
    assert classifier.function == HEADED
    check_saved(classifier, views, expected, tmp_path / "model")


def neighbours(size):
    head = NeighbourHead(size, 3, 5, 2)
    head.known = nn.functional.normalize(torch.randn(5, size, generator=torch.Generator().manual_seed(3)), dim=-1)
    head.labels = torch.tensor([0, 1, 2, 0, 1])
    return head.scaled(0.5)


def cosines(size):
    head = CosineHead(size, 3, 4.0)
    head.means = nn.functional.normalize(torch.randn(3, size, generator=torch.Generator().manual_seed(3)), dim=-1)
    return head


def neighbours_of_sets(size):
    head = NeighbourHead(size, 3, 5, 2, several=True)
    head.known = nn.functional.normalize(torch.randn(5, size, generator=torch.Generator().manual_seed(3)), dim=-1)
    head.labels = torch.tensor([[0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1], [0, 1, 0]], dtype=torch.uint8)
    return head.scaled(0.5)


def cosines_of_sets(size):
    head = CosineHead(size, 3, 4.0, several=True)
    head.means = torch.randn(3, size, generator=torch.Generator().manual_seed(3))
    head.bias = torch.tensor([-3.0, 0.5, -1.0])
    return head


@pytest.mark.parametrize("make_head", [neighbours, cosines, neighbours_of_sets, cosines_of_sets])
@pytest.mark.parametrize("options", [(), ("num_classes=0",)], ids=["other classes", "headless"])
def test_heads_of_ours_are_loaded_with_their_network(make_head, options, tmp_path):
    torch.manual_seed(0)
    classifier, views, expected = attached(load("test_convnext", options=options, side=32), make_head)
    check_saved(classifier, views, expected, tmp_path / "model")
    again = load(str(tmp_path / "model"))
    assert (again.function, again.num_classes) == (HEADED, 3)
    # What was loaded can be saved again.
    check_saved(again.eval(), views, expected, tmp_path / "again")


@pytest.mark.parametrize(
    ("family", "headless"),
    [
        ("vit", False),
        ("vit", True),
        *(pytest.param(name, False, marks=pytest.mark.slow) for name in transformer_families.FAMILIES if name != "vit"),
    ],
)
def test_networks_of_transformers_are_saved_with_the_head(family, headless, tmp_path):
    path = transformer_families.write(family, tmp_path / "network")
    if headless:
        import transformers

        net = transformers.ViTModel(transformers.ViTConfig(**transformer_families.VIT))
        processor = transformers.ViTImageProcessor(**transformer_families.WHOLE)
        path = transformer_families.write_net(net, processor, tmp_path / "headless")
    classifier, views, expected = attached(load(str(path)))
    check_saved(classifier, views, expected, tmp_path / "model")
    with pytest.raises(InputError, match="is built neither by timm nor by a function, so no head"):
        attached(load(str(path)), cosines)


class Plain(nn.Module):
    """A network that is not timm's."""

    def __init__(self, num_classes=4):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6, num_classes)

    def forward(self, images):
        return self.fc(self.conv(images).relu().mean((2, 3)))


def plain(num_classes=4):
    return Plain(num_classes)


def test_last_layer_of_another_network_is_replaced(tmp_path):
    card = Card("plain", 16, 1.0, (0.0,) * 3, (1.0,) * 3)
    name = f"{__name__}:plain"
    classifier, views, expected = attached(Classifier(Plain(), card, {}, 4, name))
    folder = tmp_path / "model"
    folder.mkdir()
    save(classifier, folder, card=classifier.card, about={})
    with torch.no_grad():
        torch.testing.assert_close(classifier(views), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="if you trust that code, name it yourself"):
        load(str(folder))


class Returning(Plain):
    """A network that returns its map of features, too."""

    def forward(self, images):
        found = self.conv(images).relu()
        return self.fc(found.mean((2, 3))), found


def test_head_is_put_behind_a_network_that_returns_more_than_logits():
    card = Card("returning", 16, 1.0, (0.0,) * 3, (1.0,) * 3)
    classifier, views, expected = attached(Classifier(Returning(), card, {}, 4, f"{__name__}:Returning"), cosines)
    assert classifier.function == HEADED
    with torch.no_grad():
        torch.testing.assert_close(classifier(views), expected, atol=1e-5, rtol=1e-5)


def test_file_does_not_decide_which_code_a_backbone_runs(tmp_path):
    card = Card("plain", 16, 1.0, (0.0,) * 3, (1.0,) * 3)
    classifier, _, _ = attached(Classifier(Plain(), card, {}, 4, f"{__name__}:plain"), cosines)
    folder = tmp_path / "model"
    folder.mkdir()
    save(classifier, folder, card=classifier.card, about={})
    assert json.loads((folder / "config.json").read_text())["model_args"]["backbone"] == f"{__name__}:plain"
    with pytest.raises(InputError, match="a file must not decide which code runs"):
        load(str(folder))


def test_network_that_does_not_end_in_a_linear_layer_is_refused():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    classifier = Classifier(net, Card("plain", 16, 1.0, (0.0,) * 3, (1.0,) * 3), {}, 4)
    with pytest.raises(InputError, match=r"its last layer is not a torch\.nn\.Linear"):
        attach(classifier.eval(), linear_head(4), None, 16)
