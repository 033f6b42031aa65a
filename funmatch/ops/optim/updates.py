"""What an update is beside its optimizer: which parameters decay, the schedule's factor, clipping, averaging."""

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


def decayed_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters that decay: weights of convolutions and linear maps, no bias, norm or embedding."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if name.endswith("weight") and parameter.ndim >= 2 and not isinstance(module, nn.Embedding)
    }


def set_lr(optimizer: torch.optim.Optimizer, lr: float, factor: float) -> None:
    """Puts the schedule's factor into every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr * factor


def clip_grad_norm_(parameters: list[nn.Parameter], norm: float) -> Tensor:
    """Scales all gradients together so that their global norm is at most `norm`; returns the norm before."""
    return torch.nn.utils.clip_grad_norm_(parameters, norm)


class EMA(Generic[Model]):
    """The exponential moving average of a model's weights and statistics.

    Early on it forgets faster, by (1 + t) / (10 + t) at step t, so that the random beginning has no share in it.

    Attributes:
        model: a copy with the averaged weights.
    """

    def __init__(self, model: Model, decay: float) -> None:
        self.decay = decay
        self.model: Model = copy.deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, model: Model, step: int) -> None:
        """Takes the model's weights after `step` updates into the average."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        kept, now = (dict(each.state_dict()) for each in (self.model, model))
        floating = [name for name in kept if kept[name].is_floating_point()]
        torch._foreach_lerp_([kept[name] for name in floating], [now[name] for name in floating], share)
        for name in kept.keys() - floating:
            kept[name].copy_(now[name])
