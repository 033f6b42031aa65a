"""Weights under torchvision's names and their authors' names, against the logits of the network that was saved."""

import re

import pytest
import timm
import torch
import torchvision.models as tv
from safetensors.torch import save_file
from torch import nn
from torchvision.models.convnext import CNBlockConfig

from funmatch.errors import InputError
from funmatch.models.load import load
from funmatch.models.timm_models import parse_options


def with_random_weights(net: nn.Module) -> nn.Module:
    """Gives each tensor random values, also those that start as constants, such as norms and position embeddings."""
    torch.manual_seed(0)
    for parameter in net.parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.5, 1.2)
        elif parameter.std() == 0:
            nn.init.normal_(parameter, 0, 0.2)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net.eval()


@torch.inference_mode()
def assert_same_logits(model, net, side):
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    expected = net(images)
    assert expected.std() > 1e-3
    # Kernels in another layout sum in another order.
    assert (model.net.eval()(images) - expected).abs().max() < 1e-5 * expected.abs().max()


def convnext():
    stages = [CNBlockConfig(8, 8, 1), CNBlockConfig(8, 16, 2), CNBlockConfig(16, 16, 1), CNBlockConfig(16, None, 1)]
    return tv.ConvNeXt(stages, num_classes=7)


def vit():
    sizes = {"num_layers": 11, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}
    return tv.VisionTransformer(image_size=32, patch_size=16, num_classes=7, **sizes)


SMALL = {
    "convnext_tiny": (convnext, ("depths=1,2,1,1", "dims=8,8,16,16"), 64),
    "vit_base_patch16_224": (vit, ("img_size=32", "embed_dim=16", "depth=11", "num_heads=2", "mlp_ratio=2"), 32),
    "mobilenetv3_small_100": (lambda: tv.mobilenet_v3_small(num_classes=7), (), 64),
}


@pytest.mark.parametrize("name", SMALL)
def test_names_of_torchvision_are_translated(tmp_path, name):
    build, options, side = SMALL[name]
    net = with_random_weights(build())
    # Safetensors sorts the names, and torch.save keeps their order.
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    model = load(name, weights=tmp_path / "w.safetensors", options=options)
    assert_same_logits(model, net, side)
    assert model.num_classes == 7
    assert model.card.mean == (0.485, 0.456, 0.406)
    assert model.card.std == (0.229, 0.224, 0.225)
    assert "its names are torchvision's, and so are its mean and std" in model.notes[0]


def test_averaged_weights_of_torchvision_are_chosen_by_their_key(tmp_path):
    net, other = with_random_weights(convnext()), convnext().eval()
    ema = {f"module.{key}": tensor for key, tensor in net.state_dict().items()} | {"n_averaged": torch.tensor(1)}
    torch.save({"model": other.state_dict(), "model_ema": ema}, tmp_path / "w.pth")
    for expected, key in ((other, ()), (net, ("weights_key=model_ema",))):
        model = load("convnext_tiny", weights=tmp_path / "w.pth", options=(*SMALL["convnext_tiny"][1], *key))
        assert_same_logits(model, expected, 64)


def test_what_torchvision_computes_otherwise_is_saved_with_the_student(tmp_path):
    torch.save(tv.mobilenet_v3_small(num_classes=7).state_dict(), tmp_path / "w.pth")
    student = load("mobilenetv3_small_100", weights=tmp_path / "w.pth", classes=3)
    assert student.options["bn_eps"] == 0.001
    assert student.num_classes == 3
    assert not student.net.get_submodule("classifier").weight.any()


def test_features_of_torchvision_are_taken_without_a_head(tmp_path):
    net = with_random_weights(convnext())
    state, options = net.state_dict(), SMALL["convnext_tiny"][1]
    headless = {name: tensor for name, tensor in state.items() if not name.startswith("classifier.2.")}
    net.classifier[2] = nn.Identity()
    for saved in (state, headless):
        torch.save(saved, tmp_path / "w.pth")
        assert_same_logits(
            load("convnext_tiny", weights=tmp_path / "w.pth", options=(*options, "num_classes=0")), net, 64
        )
    with pytest.raises(InputError, match=r"without a head for convnext_tiny \(no head\.fc\.weight"):
        load("convnext_tiny", weights=tmp_path / "w.pth", options=options)
    student = load("convnext_tiny", weights=tmp_path / "w.pth", options=options, classes=3)
    assert torch.equal(student.net.state_dict()["stem.0.weight"], state["features.0.0.weight"])
    assert "starts at zero" in student.notes[-1]


def test_networks_that_pad_otherwise_are_not_filled(tmp_path):
    torch.save(tv.mobilenet_v3_small(num_classes=7).state_dict(), tmp_path / "w.pth")
    for name in ("tf_mobilenetv3_small_100", "mobilenetv3_large_100"):
        with pytest.raises(InputError, match=r"w\.pth does not fit .*features\.0\.0\.weight.*package\.module:function"):
            load(name, weights=tmp_path / "w.pth")


LARGE = {
    "efficientnet_b0": "efficientnet_b0", "efficientnet_b4": "efficientnet_b4", "efficientnet_b5": "efficientnet_b5",
    "efficientnet_v2_s": "efficientnetv2_s", "mobilenet_v2": "mobilenetv2_100", "mnasnet0_5": "mnasnet_050",
    "mnasnet0_75": "mnasnet_075", "mnasnet1_0": "mnasnet_100", "regnet_x_400mf": "regnetx_004_tv",
    "mobilenet_v3_large": "mobilenetv3_large_100", "regnet_y_400mf": "regnety_004", "regnet_x_800mf": "regnetx_008",
    "regnet_y_800mf": "regnety_008_tv", "swin_t": "swin_tiny_patch4_window7_224",
    "swin_s": "swin_small_patch4_window7_224",
    "convnext_tiny": "convnext_tiny", "vit_b_16": "vit_base_patch16_224", "vit_b_32": "vit_base_patch32_224",
    "vgg11_bn": "vgg11_bn", "resnet50": "resnet50", "resnext50_32x4d": "resnext50_32x4d", "densenet121": "densenet121",
    "wide_resnet50_2": "wide_resnet50_2",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_networks_of_torchvision_are_those_of_timm(tmp_path, name):
    net = with_random_weights(getattr(tv, name)(weights=None))
    torch.save(net.state_dict(), tmp_path / "w.pth")
    assert_same_logits(load(LARGE[name], weights=tmp_path / "w.pth"), net, 224)


def convnext_of_its_authors(name):
    name = name.replace("stem.", "downsample_layers.0.").replace("head.norm", "norm").replace("head.fc", "head")
    name = re.sub(r"stages\.(\d)\.downsample\.", r"downsample_layers.\1.", name).replace(".blocks.", ".")
    return name.replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")


def swin_of_its_authors(name):
    merged = re.sub(r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name)
    return merged.replace("head.fc", "head")


TINY = ("img_size=32", "embed_dim=16", "depth=2", "num_heads=2")
AUTHORS = {
    "deit3_small_patch16_224": (TINY, lambda name: re.sub(r"ls(\d)\.gamma", r"gamma_\1", name)),
    "convnext_tiny": (("depths=1,1,1,1", "dims=8,8,16,16"), convnext_of_its_authors),
    "swin_tiny_patch4_window7_224": (("depths=1,1,1,1", "embed_dim=8", "num_heads=1,2,2,2"), swin_of_its_authors),
}


@pytest.mark.parametrize("name", AUTHORS)
def test_names_of_authors_are_translated_as_timm_does(tmp_path, name):
    options, rename = AUTHORS[name]
    kwargs = parse_options(options)
    net = with_random_weights(timm.create_model(name, num_classes=7, **kwargs))
    torch.save({"model": {rename(key): tensor for key, tensor in net.state_dict().items()}}, tmp_path / "w.pth")
    model = load(name, weights=tmp_path / "w.pth", options=options)
    assert_same_logits(model, net, kwargs.get("img_size", 224))
    assert model.notes[0].endswith("w.pth: its names are the authors', translated as timm does")


def test_what_training_without_labels_leaves_beside_a_network_is_left_out(tmp_path):
    net = with_random_weights(
        timm.create_model("vit_small_patch16_224", num_classes=0, embed_dim=16, depth=2, num_heads=2)
    )
    beside = {
        "mask_token": torch.ones(1, 1, 8),
        "decoder_blocks.0.weight": torch.ones(8),
        "predictor.0.bias": torch.ones(2),
    }
    torch.save({"model": net.state_dict() | beside}, tmp_path / "w.pth")
    options = ("num_classes=0", *TINY[1:])
    model = load("vit_small_patch16_224", weights=tmp_path / "w.pth", options=options)
    assert_same_logits(model, net, 224)
    assert "left out mask_token, decoder_blocks.0.weight, predictor.0.bias" in model.notes[-1]


def test_weights_for_another_side_are_not_resampled_without_a_word(tmp_path):
    net = timm.create_model("vit_small_patch16_224", img_size=64, num_classes=7, embed_dim=16, depth=2, num_heads=2)
    torch.save(net.state_dict(), tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"pos_embed has shape \(1, 17, 16\), expected \(1, 5, 16\)"):
        load("vit_small_patch16_224", weights=tmp_path / "w.pth", options=TINY)
