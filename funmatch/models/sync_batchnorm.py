"""BatchNorm whose statistics are those of the global batch, so that several processes teach what one would."""

from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from funmatch.runtime import distributed, env


def sync_batchnorm(net: nn.Module, device: torch.device) -> nn.Module:
    """The network with every BatchNorm made one of the global batch, if there are several processes.

    Parameters and buffers are the very same, under the same names, so checkpoints and the saved student are those of
    the network as it was given. On accelerators it is torch's own `SyncBatchNorm`, which the CPU does not have.
    """
    if env.world_size() == 1:
        return net
    return _converted(net) if device.type == "cpu" else convert_sync_batchnorm(net)


def _converted(module: nn.Module) -> nn.Module:
    made = GlobalBatchNorm(module) if isinstance(module, _BatchNorm) else module
    for name, child in module.named_children():
        made.add_module(name, _converted(child))
    return made


class GlobalBatchNorm(_BatchNorm):
    """A BatchNorm of the global batch, of which every process has an equal share; for CPUs."""

    def __init__(self, given: _BatchNorm) -> None:
        """Takes the place of another, whose parameters and buffers become its own.

        Args:
            given: torch's BatchNorm of any number of dimensions, or timm's `BatchNormAct2d`, whose `drop` and `act`
                are applied afterwards.
        """
        super().__init__(given.num_features, given.eps, given.momentum, given.affine, given.track_running_stats)
        self._parameters, self._buffers = given._parameters, given._buffers
        self.after: tuple[str, ...] = tuple(name for name in ("drop", "act") if hasattr(given, name))
        self.training = given.training

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions will do."""

    def forward(self, input: Tensor) -> Tensor:
        answer = self.normalize_global(input) if self.training else super().forward(input)
        for name in self.after:
            answer = getattr(self, name)(answer)
        return answer

    def normalize_global(self, input: Tensor) -> Tensor:
        """The input normalised by the mean and the variance of all processes' inputs together, which are tracked."""
        wide = input.to(torch.promote_types(input.dtype, torch.float32))
        over = [d for d in range(wide.ndim) if d != 1]
        count = env.world_size() * wide.numel() // wide.shape[1]
        mean = distributed.all_reduce_sum(wide.sum(over, keepdim=True)) / count
        centred = wide - mean  # the variance in a second pass: a difference of big sums would lose its digits
        variance = distributed.all_reduce_sum(centred.square().sum(over, keepdim=True)) / count
        self.update_running_stats(mean.detach().flatten(), variance.detach().flatten() * (count / max(count - 1, 1)))
        answer = centred * (variance + self.eps).rsqrt()
        if self.affine:
            shape: Any = [-1 if d == 1 else 1 for d in range(wide.ndim)]
            answer = answer * self.weight.view(shape) + self.bias.view(shape)
        return answer.to(input.dtype)

    def update_running_stats(self, mean: Tensor, variance: Tensor) -> None:
        """Moves the running statistics as torch does: by the momentum, or to the mean of all where there is none."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)
