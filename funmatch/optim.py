"""Adam as the paper uses it: weight decay that does not depend on the learning rate, on kernels only."""

import torch
from torch import Tensor, nn


def kernels(model: nn.Module) -> set[str]:
    """Names of the parameters that decay: weights of convolutions and linear maps, no bias, norm or embedding."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if name.endswith("weight") and parameter.ndim >= 2 and not isinstance(module, nn.Embedding)
    }


def adam(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """Adam (β 0.9 / 0.999) whose step is Δw = −s·(lr·adam + weight_decay·w), with s the schedule's factor.

    `torch.optim.AdamW` multiplies its own decay by the learning rate, so it is given `weight_decay / lr`, and
    `set_factor` moves both together. The user's number is thus the share of a kernel that is lost in a step at
    the top of the schedule, whatever the learning rate.

    Args:
        model: whose parameters with `requires_grad` are taught.
        lr: at the top of the schedule, > 0.
        weight_decay: as above; FACTS of the field give 1e-5 … 1e-3.
    """
    decaying = kernels(model)
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for name, p in named if name in decaying], "weight_decay": weight_decay / lr},
        {"params": [p for name, p in named if name not in decaying], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, fused=True)


def set_factor(optimizer: torch.optim.Optimizer, lr: float, factor: float) -> None:
    """Puts the schedule's factor into every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr * factor


def clip_(parameters: list[nn.Parameter], norm: float) -> Tensor:
    """Scales all gradients together so that their global norm is at most `norm`; returns the norm before."""
    return torch.nn.utils.clip_grad_norm_(parameters, norm)
