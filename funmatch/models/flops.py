"""How much arithmetic a network takes."""

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


@torch.no_grad()
def gflop(net: nn.Module, side: int) -> float | None:
    """Arithmetic of one forward pass for one image, in 10⁹ operations, a multiply-add being two."""
    try:
        shadow = copy.deepcopy(net).to("meta").float().eval()
        channels = vars(net).get("in_chans", 3)
        with FlopCounterMode(display=False) as counter:
            shadow(torch.zeros(1, channels, side, side, device="meta"))
    except Exception:  # not every network can be followed without numbers, nor takes every side
        return None
    return counter.get_total_flops() / 1e9
