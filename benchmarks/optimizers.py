"""Compares the time of a step of Shampoo with that of pytorch-optimizer's `ScalableShampoo`.

    python benchmarks/optimizers.py [--model resnet50] [--turns 3] [--device auto]

Both precondition the parameters of a network in blocks of 128, compute every root in each step, and get the same random
gradients. Rounds alternate, so that a drift of the machine affects both. There is no forward or backward pass.
ScalableShampoo computes roots by iterated matrix products, as published, or by singular values.
"""

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable

import timm
import torch
from pytorch_optimizer import ScalableShampoo
from torch import nn

from funmatch.ops.optim.shampoo import Shampoo
from funmatch.ops.optim.shampoo_blocks import block_grids, merge_axes
from funmatch.runtime import devices

BLOCK = 128


def parameters(name: str, device: torch.device) -> list[nn.Parameter]:
    """The parameters of a network, with gradients."""
    torch.manual_seed(0)
    found = [nn.Parameter(p.detach().to(device)) for p in timm.create_model(name).parameters()]
    for p in found:
        p.grad = torch.randn_like(p)
    return found


def seconds(step: Callable[[], object], device: torch.device) -> float:
    """Seconds that a step takes."""
    devices.synchronize(device)
    began = time.perf_counter()
    step()
    devices.synchronize(device)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--device", default="cpu", help="cpu, auto, or as torch names it")
    options = parser.parse_args()
    device = devices.pick_device(options.device)
    shapes = [merge_axes(p.shape, BLOCK) for p in parameters(options.model, device)]
    cuts = [grid for shape in shapes if len(shape) > 1 for grid in block_grids(shape, BLOCK)]
    usual = {"lr": 1e-3, "block_size": BLOCK, "preconditioning_compute_steps": 1}
    contenders = {
        "ours": Shampoo(parameters(options.model, device), **usual),
        "ScalableShampoo, iterations": ScalableShampoo(parameters(options.model, device), **usual),
        "ScalableShampoo, singular values": ScalableShampoo(parameters(options.model, device), use_svd=True, **usual),
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(options.turns + 1):
        for name, optimizer in contenders.items():
            taken = seconds(optimizer.step, device)
            if turn:  # the first makes the state
                times[name].append(taken)
    result = {
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, {device}",
        "torch": torch.__version__,
        "model": options.model,
        "blocks": sum(grid.total for grid in cuts),
        "matrices": sum(grid.total * len(grid.block) for grid in cuts),
        "largest": max(math.prod(grid.block) for grid in cuts),
        "seconds a step": {name: spread(each) for name, each in times.items()},
        "times ours": {
            name: spread([one / ours for one, ours in zip(each, times["ours"], strict=True)])
            for name, each in times.items()
        },
    }
    print(json.dumps(result, indent=1))


def spread(values: list[float]) -> str:
    """Median, lowest and highest of the rounds."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} … {max(values):.2f}, n = {len(values)})"


if __name__ == "__main__":
    main()
