"""Optimizers as the paper uses them: weight decay that does not depend on the learning rate, on kernels only."""

import copy
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


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
    return torch.optim.AdamW(_groups(model, lr, weight_decay), lr=lr, fused=True)


def sgd(model: nn.Module, lr: float, weight_decay: float, momentum: float = 0.9) -> "SGD":
    """SGD with momentum whose step is Δw = −s·(lr·m + weight_decay·w), with s the schedule's factor.

    Args:
        model: whose parameters with `requires_grad` are taught.
        lr: at the top of the schedule, > 0.
        weight_decay: the share of a kernel that is lost in a step at the top of the schedule.
        momentum: m ← momentum·m + gradient.
    """
    return SGD(_groups(model, lr, weight_decay), lr=lr, momentum=momentum)


class SGD(torch.optim.SGD):
    """torch's SGD, but for weight decay: it does not go through the gradient, so momentum does not multiply it."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update. A group's `weight_decay` is, as that of `torch.optim.AdamW`, multiplied by its `lr`."""
        decays = [group["weight_decay"] for group in self.param_groups]
        for group in self.param_groups:
            if decaying := [p for p in group["params"] if group["weight_decay"] and p.grad is not None]:
                torch._foreach_mul_(decaying, 1 - group["lr"] * group["weight_decay"])
            group["weight_decay"] = 0.0
        try:
            return super().step(closure)
        finally:
            for group, decay in zip(self.param_groups, decays, strict=True):
                group["weight_decay"] = decay


def _groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters that are taught: those that decay, and those that do not."""
    decaying = kernels(model)
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for name, p in named if name in decaying], "weight_decay": weight_decay / lr},
        {"params": [p for name, p in named if name not in decaying], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def set_factor(optimizer: torch.optim.Optimizer, lr: float, factor: float) -> None:
    """Puts the schedule's factor into every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr * factor


def clip_(parameters: list[nn.Parameter], norm: float) -> Tensor:
    """Scales all gradients together so that their global norm is at most `norm`; returns the norm before."""
    return torch.nn.utils.clip_grad_norm_(parameters, norm)


class Average(Generic[Model]):
    """The exponential moving average of a model's weights and statistics.

    Early on it forgets faster, by (1 + t) / (10 + t) at step t, so that the random beginning has no share in it.

    Attributes:
        model: a copy with the averaged weights.
    """

    def __init__(self, model: Model, decay: float) -> None:
        self.decay = decay
        self.model: Model = copy.deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def follow(self, model: Model, step: int) -> None:
        """Takes the model's weights after `step` updates into the average."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        kept, now = (dict(each.state_dict()) for each in (self.model, model))
        floating = [name for name in kept if kept[name].is_floating_point()]
        torch._foreach_lerp_([kept[name] for name in floating], [now[name] for name in floating], share)
        for name in kept.keys() - floating:
            kept[name].copy_(now[name])
