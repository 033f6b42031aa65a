"""Counts the floating-point operations of a network."""

import copy

import torch
from torch import nn


@torch.no_grad()
def gflop(net: nn.Module, side: int) -> float | None:
    """Counts the operations of one forward pass of one image.

    Args:
        net: on any device; it is not changed.
        side: image size, pixels.

    Returns:
        10⁹ operations, a multiply-add counting as two; None if the network cannot be counted.
    """
    from torch.utils.flop_counter import FlopCounterMode  # here, since it imports Triton, where that is installed

    try:
        # On the meta device no numbers are computed, so that even the largest network takes no memory. In fp32, since
        # not every operation has a meta kernel in 16 bits.
        shadow = copy.deepcopy(net).to("meta").float().eval()
        channels = vars(net).get("in_chans", 3)
        with FlopCounterMode(display=False) as counter:
            shadow(torch.zeros(1, channels, side, side, device="meta"))
    except Exception:  # a network may branch on numbers, or not accept this image size
        return None
    return counter.get_total_flops() / 1e9
