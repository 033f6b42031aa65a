"""Builds MobileNetV3 with GroupNorm, the paper's small student, which timm has with BatchNorm only."""

from typing import Any

import timm
from timm.layers import BatchNormAct2d, GroupNormAct
from torch import nn

GROUP_CHANNELS = 8
"""Channels in a group: the largest number that divides all widths of MobileNetV3-Large."""


# Runs save `funmatch.models.groupnorm:mobilenetv3_large_gn` as their architecture, so both names must stay.
def mobilenetv3_large_gn(num_classes: int = 1000, **kwargs: Any) -> nn.Module:
    """Builds timm's `mobilenetv3_large_100` with every BatchNorm replaced by a GroupNorm.

    The paper does not say how many groups its second student has; here each group has 8 channels.

    Args:
        num_classes: number of classes.
        **kwargs: passed to timm's constructor.
    """
    net = timm.create_model("mobilenetv3_large_100", num_classes=num_classes, **kwargs)
    # Lists, since modules are replaced while they are walked through.
    for parent in list(net.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BatchNormAct2d):
                parent.add_module(name, _to_group_norm(child))
    return net


def _to_group_norm(norm: BatchNormAct2d) -> nn.Module:
    """Returns a GroupNorm for the place of a BatchNorm, with its activation."""
    group_norm = GroupNormAct(norm.num_features, norm.num_features // GROUP_CHANNELS, eps=1e-5)
    # The modules themselves: MobileNetV3's activations differ from layer to layer.
    group_norm.drop, group_norm.act = norm.drop, norm.act
    return group_norm
