"""Provides what belongs to an update beside its optimizer: which parameters decay, and the average of the weights."""

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def decayed_parameters(model: nn.Module) -> set[str]:
    """Returns the names of the parameters that decay: the weights of convolutions and linear layers.

    Biases, norms and embeddings do not decay; the paper's code decays what it calls kernels.
    """
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        # Norms have weights too, but with a single axis.
        if name.endswith("weight") and parameter.ndim >= 2 and not isinstance(module, nn.Embedding)
    }


class EMA(Generic[Model]):
    """Keeps the exponential moving average of a model's weights and statistics.

    Args:
        model: the model to average; it is copied.
        decay: factor by which the average decays in a step, in [0, 1).

    Attributes:
        model: the copy, with the averaged weights, in evaluation mode.
    """

    def __init__(self, model: Model, decay: float) -> None:
        self.decay = decay
        self.model: Model = copy.deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, model: Model, step: int) -> None:
        """Averages in the model's weights after `step` updates."""
        # Early on it decays faster, or the random weights of the start would count for thousands of steps.
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        average, current = (dict(each.state_dict()) for each in (self.model, model))
        # BatchNorm's running statistics are averaged too: those of the last weights would not fit averaged ones.
        floating = [name for name in average if average[name].is_floating_point()]
        torch._foreach_lerp_([average[name] for name in floating], [current[name] for name in floating], share)
        # Counters, such as BatchNorm's number of batches, have no average.
        if counters := [name for name in average if not average[name].is_floating_point()]:
            torch._foreach_copy_([average[name] for name in counters], [current[name] for name in counters])
