"""Synchronizes BatchNorm over processes: statistics are those of the global batch, as in a single process."""

from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from funmatch.runtime import distributed, env


def sync_batchnorm(net: nn.Module, device: torch.device) -> nn.Module:
    """Makes every BatchNorm of a network compute the statistics of the global batch, if there are several processes.

    Parameters and buffers are the same tensors under the same names, so checkpoints and the exported student are those
    of the network as given. On accelerators this is torch's `SyncBatchNorm`, which the CPU does not have.

    Args:
        net: converted in place; use the return value.
        device: where it runs.
    """
    if env.world_size() == 1:
        return net
    return _convert(net) if device.type == "cpu" else convert_sync_batchnorm(net)


def _convert(module: nn.Module) -> nn.Module:
    kind = GlobalBatchNormAct if hasattr(module, "act") else GlobalBatchNorm
    converted = kind(module) if isinstance(module, _BatchNorm) else module
    # The children too: a BatchNormAct2d has its activation as one.
    for name, child in module.named_children():
        converted.add_module(name, _convert(child))
    return converted


class GlobalBatchNorm(_BatchNorm):
    """BatchNorm of the global batch, of which every process has an equal share; for CPUs.

    Args:
        norm: torch's BatchNorm of any number of dimensions. Its parameters and buffers become this module's own.
    """

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        # The same dicts, not copies: the optimizer and the EMA hold these tensors.
        self._parameters, self._buffers = norm._parameters, norm._buffers
        self.training = norm.training

    def _check_input_dim(self, input: Tensor) -> None:
        """Accepts any number of dimensions."""

    def forward(self, input: Tensor) -> Tensor:
        # In evaluation the statistics are the same everywhere, so processes may evaluate different numbers of batches.
        return self.normalize_global(input) if self.training else super().forward(input)

    def normalize_global(self, input: Tensor) -> Tensor:
        """Normalizes by the mean and variance of all processes' inputs, and updates the running statistics.

        Args:
            input: (n, channels, ...), as many images in every process.
        """
        # At least float32: sums of bf16 numbers would lose the variance.
        wide = input.to(torch.promote_types(input.dtype, torch.float32))
        over = [d for d in range(wide.ndim) if d != 1]
        count = env.world_size() * wide.numel() // wide.shape[1]
        mean = distributed.all_reduce_sum(wide.sum(over, keepdim=True)) / count
        # The variance in a second pass, though it costs a second message: a difference of large sums loses its digits.
        centered = wide - mean
        variance = distributed.all_reduce_sum(centered.square().sum(over, keepdim=True)) / count
        # As torch: normalized by the biased variance, tracked is the unbiased one.
        self.update_running_stats(mean.detach().flatten(), variance.detach().flatten() * (count / max(count - 1, 1)))
        output = centered * (variance + self.eps).rsqrt()
        if self.affine:
            shape: Any = [-1 if d == 1 else 1 for d in range(wide.ndim)]
            output = output * self.weight.view(shape) + self.bias.view(shape)
        return output.to(input.dtype)

    def update_running_stats(self, mean: Tensor, variance: Tensor) -> None:
        """Updates the running statistics as torch does: by the momentum, or to the cumulative mean without one."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)


class GlobalBatchNormAct(GlobalBatchNorm):
    """timm's `BatchNormAct2d`, whose `drop` and `act` are applied to what is normalized."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))
