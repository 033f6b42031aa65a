"""Networks whose GroupNorms and standardised convolutions are computed by our own kernels, on a CPU.

A module only changes its class: its names, weights and settings stay, and so does what is saved of it. What the kernels
do not know (another layout, another precision) is computed as ever.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import GroupNorm as TimmGroupNorm
from timm.layers import GroupNorm1, GroupNormAct, pad_same
from timm.layers.norm_act import GroupNorm1Act
from timm.layers.std_conv import StdConv2d, StdConv2dSame
from torch import Tensor, nn

from funmatch.ops.native import norms

PRECISIONS = ("fp32", "bf16")
SHARED = 4
"""Threads of which one may be the only one to have an image: memory, which is what it waits for, is shared anyway."""


def _wanted(module: Any) -> bool:
    return module.training or not module._taught_only


def _plain(parameter: Tensor | None) -> bool:
    return parameter is not None and parameter.dtype == torch.float32 and parameter.is_contiguous()


def _known(norm: Any, x: Tensor) -> bool:
    """Whether a kernel normalises this: images with their channels last, enough of them to share out."""
    return (
        _wanted(norm)
        and all(_plain(parameter) for parameter in (norm.weight, norm.bias))
        and x.ndim == 4
        and x.dtype in norms.DTYPES
        and x.device.type == "cpu"
        and x.numel() > 0
        and SHARED * len(x) >= torch.get_num_threads()
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def _normed(norm: Any, x: Tensor, *, relu: bool = False) -> Tensor:
    return norms.group_norm(x, norm.weight, norm.bias, norm.num_groups, norm.eps, relu=relu)


class _Normal:
    def forward(self, x: Tensor) -> Tensor:
        if _known(self, x):
            return _normed(self, x)
        return super().forward(x)  # pyrefly: ignore[missing-attribute]


class NativeGroupNorm(_Normal, nn.GroupNorm):  # pyrefly: ignore[inconsistent-inheritance]
    """torch's."""


class NativeTimmGroupNorm(_Normal, TimmGroupNorm):
    """timm's."""


class NativeGroupNorm1(_Normal, GroupNorm1):
    """timm's, of one group."""


class _Active:
    """With an activation: a ReLU is done by the kernel."""

    def forward(self, x: Tensor) -> Tensor:
        own: Any = self
        if not _known(own, x):
            return super().forward(x)  # pyrefly: ignore[missing-attribute]
        if type(own.act) is nn.ReLU and isinstance(own.drop, nn.Identity):
            return _normed(own, x, relu=True)
        return own.act(own.drop(_normed(own, x)))


class NativeGroupNormAct(_Active, GroupNormAct):
    """timm's."""


class NativeGroupNorm1Act(_Active, GroupNorm1Act):
    """timm's, of one group."""


def _kernel(conv: Any) -> Tensor | None:
    """The standardised kernel in the precision of the convolution, or None where ours does not make it."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
    weight = conv.weight
    dense = weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)
    known = weight.dtype == torch.float32 and weight.device.type == "cpu" and dtype in norms.DTYPES and dense
    return norms.standardize_weight(weight, conv.eps, dtype) if known and _wanted(conv) else None


class NativeStdConv2d(StdConv2d):
    """timm's, of BiT networks."""

    def forward(self, x: Tensor) -> Tensor:
        kernel = _kernel(self)
        if kernel is None:
            return super().forward(x)
        return F.conv2d(x, kernel, self.bias, self.stride, self.padding, self.dilation, self.groups)


class NativeStdConv2dSame(StdConv2dSame):
    """timm's, with TensorFlow's padding."""

    def forward(self, x: Tensor) -> Tensor:
        kernel = _kernel(self)
        if kernel is None:
            return super().forward(x)
        if self.same_pad:
            x = pad_same(x, [*self.kernel_size], [*self.stride], [*self.dilation])
        return F.conv2d(x, kernel, self.bias, self.stride, self.padding, self.dilation, self.groups)


NATIVE_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    nn.GroupNorm: NativeGroupNorm,
    TimmGroupNorm: NativeTimmGroupNorm,
    GroupNorm1: NativeGroupNorm1,
    GroupNormAct: NativeGroupNormAct,
    GroupNorm1Act: NativeGroupNorm1Act,
    StdConv2d: NativeStdConv2d,
    StdConv2dSame: NativeStdConv2dSame,
}


def gains_from_native(net: nn.Module) -> bool:
    """Whether a network has something that our kernels compute."""
    return any(type(module) in NATIVE_CLASSES for module in net.modules())


def native_group_norms(net: nn.Module) -> Iterator[nn.GroupNorm]:
    """The GroupNorms of a network that our kernels compute, or could."""
    known = {*NATIVE_CLASSES, *NATIVE_CLASSES.values()}
    return (module for module in net.modules() if isinstance(module, nn.GroupNorm) and type(module) in known)


def use_native_kernels(net: nn.Module, *, taught_only: bool) -> nn.Module:
    """Has a network's norms and standardised kernels computed by ours, in place.

    Args:
        taught_only: only while it is in training mode; so that it is judged as whoever loads it will compute it.
    """
    for module in net.modules():
        if own := NATIVE_CLASSES.get(type(module)):
            module.__class__ = own
            vars(module)["_taught_only"] = taught_only
    return net
