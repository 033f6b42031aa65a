"""MobileNetV3 with GroupNorm: the small student of the paper, which timm builds with BatchNorm alone."""

import timm
from timm.layers import BatchNormAct2d, GroupNormAct
from torch import nn

GROUP_CHANNELS = 8
"""A group of: the largest number that divides all widths of MobileNetV3-Large."""


def mobilenetv3_large_gn(num_classes: int = 1000, **kwargs) -> nn.Module:
    """timm's `mobilenetv3_large_100` with every BatchNorm replaced by a GroupNorm, as the paper's second student has.

    How many groups the paper took is not published; here each has 8 channels.

    Args:
        num_classes: of its head.
        **kwargs: of timm's constructor.
    """
    net = timm.create_model("mobilenetv3_large_100", num_classes=num_classes, **kwargs)
    for parent in list(net.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BatchNormAct2d):
                parent.add_module(name, _grouped(child))
    return net


def _grouped(norm: BatchNormAct2d) -> nn.Module:
    """A GroupNorm in a BatchNorm's place, with its activation."""
    made = GroupNormAct(norm.num_features, norm.num_features // GROUP_CHANNELS, eps=1e-5)
    made.drop, made.act = norm.drop, norm.act
    return made
