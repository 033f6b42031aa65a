"""Tiny networks of transformers with random weights, made by transformers itself, each with its own processor."""

from pathlib import Path
from typing import Any

import torch

HEAD = {"num_labels": 5}
VIT = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
FOUR = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
TWO = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
LEVIT = {
    "image_size": 64, "hidden_sizes": [16, 16, 16], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1],
    "key_dim": [4, 4, 4], "attention_ratio": [2, 2, 2], "mlp_ratio": [2, 2, 2],
    "down_ops": [["Subsample", 4, 4, 4, 2, 2], ["Subsample", 4, 4, 4, 2, 2]],
}  # fmt: skip
EFFICIENTNET = {
    "image_size": 32, "width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 128, "in_channels": [32, 16],
    "out_channels": [16, 24], "kernel_sizes": [3, 3], "strides": [1, 2], "num_block_repeats": [1, 1],
    "expand_ratios": [1, 6], "depthwise_padding": [],
}  # fmt: skip
MOBILEVIT = {
    "image_size": 64, "hidden_sizes": [8, 8, 8], "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 16], "num_attention_heads": 2,
    "expand_ratio": 2.0,
}  # fmt: skip
ATTENTION = {"num_attention_heads": [1, 1, 2, 2]}
FOCAL = {
    "image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "focal_levels": [1, 1],
    "focal_windows": [3, 3], "hidden_sizes": [8, 16],
}  # fmt: skip
HIERA = {
    "image_size": [64, 64], "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "query_stride": [2, 2],
    "masked_unit_size": [4, 4], "num_query_pool": 1,
}  # fmt: skip
THIN = {"depth_multiplier": 0.1, "min_depth": 4}
TOWER = {"vision_config": VIT}


def square(side: int) -> dict[str, Any]:
    return {"height": side, "width": side}


def short(side: int, crop: int) -> dict[str, Any]:
    return {"size": {"shortest_edge": side}, "crop_size": square(crop)}


SHORT = {"size": {"shortest_edge": 32}}
WHOLE, CROPPED = {"size": square(32)}, {"size": square(38), "crop_size": square(32), "do_center_crop": True}

# The class without "ForImageClassification", options of its configuration, its processor, and options of that.
FAMILIES: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "vit": ("ViT", VIT, "ViT", WHOLE),
    "resnet": ("ResNet", {**TWO, "layer_type": "basic"}, "ConvNext", {**SHORT, "crop_pct": 0.875}),
    "mobilevit": ("MobileViT", MOBILEVIT, "MobileViT", short(72, 64)),
    "deit": ("DeiT", VIT, "DeiT", CROPPED),
    "deit-distilled": ("DeiT", VIT, "DeiT", CROPPED),
    "beit": ("Beit", VIT, "Beit", CROPPED),
    "swin": ("Swin", SWIN, "ViT", {**WHOLE, "resample": 3}),
    "swinv2": ("Swinv2", SWIN, "ViT", {**WHOLE, "resample": 3}),
    "convnext": ("ConvNext", FOUR, "ConvNext", {"size": {"shortest_edge": 384}}),
    "convnextv2": ("ConvNextV2", FOUR, "ConvNext", {"size": {"shortest_edge": 64}, "crop_pct": 0.9}),
    "regnet": ("RegNet", {**TWO, "groups_width": 8}, "ConvNext", SHORT),
    "bit": ("Bit", {**TWO, "num_groups": 4}, "Bit", short(40, 32)),
    "mobilevitv2": (
        "MobileViTV2", {"image_size": 64, "width_multiplier": 0.1}, "MobileViT",
        {**short(72, 64), "do_flip_channel_order": False},
    ),
    "mobilenet_v1": ("MobileNetV1", THIN, "MobileNetV1", short(40, 32)),
    "mobilenet_v2": ("MobileNetV2", THIN, "MobileNetV2", short(41, 32)),
    "efficientnet": (
        "EfficientNet", EFFICIENTNET, "EfficientNet", {**WHOLE, "rescale_factor": 1 / 127.5, "rescale_offset": True}
    ),
    "levit": ("Levit", LEVIT, "Levit", short(64, 64)),
    "levit-distilled": ("Levit", LEVIT, "Levit", short(64, 64)),
    "poolformer": ("PoolFormer", FOUR, "PoolFormer", {**short(32, 32), "crop_pct": 0.9}),
    "focalnet": ("FocalNet", FOCAL, "Bit", short(36, 32)),
    "pvt": ("Pvt", {**FOUR, **ATTENTION, "image_size": 32}, "Pvt", WHOLE),
    "pvt_v2": ("PvtV2", {**FOUR, **ATTENTION, "image_size": 32}, "Pvt", WHOLE),
    "dinov2": ("Dinov2", VIT, "Bit", short(36, 32)),
    "dinov2-registers": ("Dinov2WithRegisters", VIT, "Bit", short(36, 32)),
    "vit_msn": ("ViTMSN", VIT, "ViT", WHOLE),
    "siglip": ("Siglip", TOWER, "Siglip", WHOLE),
    "clip": ("CLIP", TOWER, "CLIP", short(32, 32)),
    "hiera": ("Hiera", HIERA, "Bit", short(72, 64)),
    "segformer": ("Segformer", {**FOUR, **ATTENTION}, "Segformer", {"size": square(64)}),
    "swiftformer": ("SwiftFormer", {"embed_dims": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}, "ViT", {"size": square(64)}),
}  # fmt: skip
QUICK = ("vit", "resnet", "mobilevit")


@torch.no_grad()
def write(name: str, folder: Path, **options: Any) -> Path:
    """Writes the network of a family, by transformers' own `save_pretrained`; returns its folder."""
    import transformers

    stem, config, processor, seen = FAMILIES[name]
    ending = "ForImageClassificationWithTeacher" if name.endswith("-distilled") else "ForImageClassification"
    torch.manual_seed(0)
    config_class = getattr(transformers, f"{stem}Config")
    return write_net(
        getattr(transformers, stem + ending)(config_class(**config, **HEAD, **options)),
        getattr(transformers, f"{processor}ImageProcessor")(**seen),
        folder,
    )


@torch.no_grad()
def write_net(net: torch.nn.Module, processor: Any, folder: Path) -> Path:
    """Writes a network with weights at random, so that all parts of it show in its outputs."""
    for parameter in net.parameters():
        if parameter.ndim > 1:
            parameter.normal_().mul_(max(1, parameter[0].numel()) ** -0.5)
        else:
            parameter.add_(0.1 * torch.randn_like(parameter))
    for key, buffer in net.named_buffers():
        if "running" in key:
            buffer.uniform_(0.5, 1.5)
    net.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return folder
