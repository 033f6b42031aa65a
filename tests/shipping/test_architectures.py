"""Networks of all families are the same function in ONNX Runtime as in PyTorch, from images of real sizes."""

import copy
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

from funmatch.config import Export
from funmatch.models.classifier import Card, Classifier, timm_config
from funmatch.shipping.export import export, verify
from funmatch.shipping.runtimes import open_runtime
from funmatch.training.student.trained_model import open_trained_model

FAMILIES = (
    "resnet18", "resnet50d", "seresnet50", "resnetv2_50x1_bit", "resnetv2_50d_gn", "nf_resnet50", "dm_nfnet_f0",
    "regnety_004", "densenet121", "inception_v3", "efficientnet_b0", "tf_efficientnet_lite0", "tf_efficientnetv2_b0",
    "mobilenetv2_100", "mobilenetv3_small_100", "mobilenetv4_conv_small", "ghostnet_100", "repvgg_a0", "mobileone_s0",
    "fastvit_t8", "convnext_atto", "convnextv2_atto", "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224",
    "swin_tiny_patch4_window7_224", "maxvit_pico_rw_256", "coatnet_pico_rw_224", "mixer_s32_224", "poolformer_s12",
    "mobilevit_xxs", "levit_128s", "xcit_nano_12_p16_224", "eva02_tiny_patch14_224", "tiny_vit_5m_224",
    "efficientvit_b0", "pvt_v2_b0",
)  # fmt: skip
"""Standardised kernels, GroupNorm, odd padding, several branches, window attention, two heads, rotary positions, …"""


def smooth_images(count: int, side: int) -> torch.Tensor:
    """Images with colour, form and some noise, (count, 3, side, side) in [0, 1]."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(count, 3, 7, 7, generator=generator)
    images = nn.functional.interpolate(coarse, (side, side), mode="bicubic")
    return (images + 0.02 * torch.randn(images.shape, generator=generator)).clamp(0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_onnx_is_the_same_function(name: str, tmp_path: Path):
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=12)
    config = timm_config(net)
    side = config["input_size"][-1]
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))
    images = smooth_images(8, side)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.momentum = 1.0  # running statistics are those of these images
    for module in net.modules():
        # Heads that begin with zeros, or nearly so, would make every network the same function.
        if isinstance(module, nn.Linear) and module.out_features == 12:
            nn.init.normal_(module.weight, std=0.1)
    with torch.no_grad():
        net.train()((images - mean) / std)
        expected = net.eval()((images - mean) / std).numpy()
        exact = copy.deepcopy(net).double()((images.double() - mean) / std).numpy()
    # PyTorch's own error: random weights of several branches amplify every rounding.
    rounding = float((np.abs(expected - exact).max(1) / np.abs(exact).max(1)).max())
    card = Card(name, side, config["crop_pct"], config["mean"], config["std"])
    given = {"python:net": Classifier(net, card, num_classes=12)}
    model = open_trained_model("python:net", given=given)
    export.export(Export(model="python:net", out=tmp_path / "out", verify=False), model, None)
    found = open_runtime(tmp_path / "out/model.onnx")(images.numpy())
    comparison = verify.compare(expected, found)
    assert comparison.max_relative <= max(verify.MAX_RELATIVE, verify.ROUNDINGS * rounding)
    assert comparison.others == ()
    # Outputs of a network that is not trained are near to each other: what counts is that they depend on the image.
    assert np.ptp(expected, axis=0).max() > 1e-3
