"""Modules that compute BatchNorm with its activation and depthwise convolutions by native kernels.

They are the classes of torch and timm with another forward pass; `native.layers` puts them into a network. Inputs that
the kernels do not support (another layout, another precision) are computed by torch as before.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import pad_same
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from funmatch.models.inference.native.inputs import compute_dtype, has_kernel_layout, is_enabled, is_plain
from funmatch.models.sync_batchnorm import GlobalBatchNorm, GlobalBatchNormAct
from funmatch.ops.native import batch_norms, depthwise, norms
from funmatch.runtime import env


def _batch_norm(norm: Any, x: Tensor, activation: type[nn.Module] = nn.Identity) -> Tensor | None:
    """Returns what the kernel computes of a BatchNorm in training mode, or None if it does not support the inputs."""
    # In evaluation mode it is one pass, which torch computes as well. Without a momentum torch averages over all steps.
    supported = norm.training and norm.momentum is not None and has_kernel_layout(x)
    if not supported or not (is_plain(norm.weight) and is_plain(norm.bias)) or x.numel() == x.shape[1]:
        return None
    running = (norm.running_mean, norm.running_var) if norm.track_running_stats else None
    if running and not all(map(is_plain, running)):
        return None
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    processes = env.world_size() if isinstance(norm, GlobalBatchNorm) else 1
    return batch_norms.batch_norm(x, norm.weight, norm.bias, running, norm.momentum, norm.eps, activation, processes)


class NativeBatchNorm:
    """Forward pass of a BatchNorm, with the activation behind it if that is a module of its own."""

    # A `SkippedOnce`, or None; set through `vars`, as it is not this module's child.
    _activation: nn.Module | None

    def forward(self, x: Tensor) -> Tensor:
        follower: Any = self._activation
        y = _batch_norm(self, x, follower.kind if follower else nn.Identity)
        if y is None:
            return super().forward(x)  # pyrefly: ignore[missing-attribute]
        if follower:
            vars(follower)["_skip"] = True
        return y


class NativeBatchNorm2d(NativeBatchNorm, nn.BatchNorm2d):
    """torch's BatchNorm of images."""


class NativeGlobalBatchNorm(NativeBatchNorm, GlobalBatchNorm):  # pyrefly: ignore[inconsistent-inheritance]
    """BatchNorm of the global batch."""


class SkippedOnce:
    """An activation behind a `NativeBatchNorm`, which leaves out a call where the norm has computed it already."""

    _skip: bool
    kind: type[nn.Module]

    def forward(self, x: Tensor) -> Tensor:
        # The norm has seen to it that this call follows its own.
        if self._skip:
            vars(self)["_skip"] = False
            return x
        return super().forward(x)  # pyrefly: ignore[missing-attribute]


class SkippedReLU(SkippedOnce, nn.ReLU):  # pyrefly: ignore[inconsistent-inheritance]
    """torch's ReLU."""

    kind = nn.ReLU


class SkippedReLU6(SkippedOnce, nn.ReLU6):
    """torch's ReLU6."""

    kind = nn.ReLU6


class SkippedHardswish(SkippedOnce, nn.Hardswish):  # pyrefly: ignore[inconsistent-inheritance]
    """torch's Hardswish."""

    kind = nn.Hardswish


class SkippedSiLU(SkippedOnce, nn.SiLU):  # pyrefly: ignore[inconsistent-inheritance]
    """torch's SiLU."""

    kind = nn.SiLU


SKIPPED: dict[type[nn.Module], type[nn.Module]] = {
    nn.ReLU: SkippedReLU, nn.ReLU6: SkippedReLU6, nn.Hardswish: SkippedHardswish, nn.SiLU: SkippedSiLU,
}  # fmt: skip
"""For each activation that the kernels compute, the class that leaves it out where they did."""


class _NativeBatchNormAct:
    """Forward pass of a BatchNorm that has an activation."""

    def forward(self, x: Tensor) -> Tensor:
        own: Any = self
        fused = type(own.act) in batch_norms.ACTIVATIONS and isinstance(own.drop, nn.Identity)
        y = _batch_norm(self, x, type(own.act) if fused else nn.Identity)
        if y is None:
            return super().forward(x)  # pyrefly: ignore[missing-attribute]
        return y if fused else own.act(own.drop(y))


class NativeBatchNormAct2d(_NativeBatchNormAct, BatchNormAct2d):
    """timm's BatchNorm with an activation."""


class NativeGlobalBatchNormAct(_NativeBatchNormAct, GlobalBatchNormAct):  # pyrefly: ignore[inconsistent-inheritance]
    """timm's BatchNorm with an activation, of the global batch."""


class _NativeDepthwise:
    """Forward pass of a depthwise convolution; comes before torch's or timm's class in the order of methods."""

    def forward(self, x: Tensor) -> Tensor:
        own: Any = self
        dtype = compute_dtype(x)
        slow = depthwise.is_slow_in_torch(own.kernel_size[0], own.stride[0], dtype)
        if slow and is_enabled(own) and torch.is_grad_enabled() and is_plain(own.weight):
            padding = own.padding[0]
            if isinstance(own, Conv2dSame):
                x, padding = pad_same(x, [*own.kernel_size], [*own.stride], [*own.dilation]), 0
            x = x.to(dtype).contiguous(memory_format=torch.channels_last)
            if has_kernel_layout(x):
                return depthwise.depthwise_conv(x, own.weight, own.bias, own.stride[0], padding)
            return F.conv2d(x, own.weight, own.bias, own.stride, padding, own.dilation, own.groups)
        return super().forward(x)  # pyrefly: ignore[missing-attribute]


class NativeDepthwiseConv2d(_NativeDepthwise, nn.Conv2d):  # pyrefly: ignore[inconsistent-inheritance]
    """torch's convolution with one filter a channel."""


class NativeDepthwiseConv2dSame(_NativeDepthwise, Conv2dSame):
    """timm's convolution with one filter a channel and TensorFlow's padding."""


def is_depthwise(conv: nn.Conv2d) -> bool:
    """Returns whether a convolution is one that the depthwise kernels have."""
    size, stride, padding = conv.kernel_size, conv.stride, conv.padding
    return (
        conv.groups == conv.in_channels == conv.out_channels >= depthwise.MIN_CHANNELS
        and size[0] == size[1]
        and stride[0] == stride[1]
        and any(depthwise.is_slow_in_torch(size[0], stride[0], dtype) for dtype in norms.DTYPES)
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and not isinstance(padding, str)
        and padding[0] == padding[1] < size[0]
    )


def is_batch_norm(module: nn.Module) -> bool:
    """Returns whether a module is a BatchNorm of images without an activation of its own."""
    return type(module) in (nn.BatchNorm2d, GlobalBatchNorm)
