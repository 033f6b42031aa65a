"""Runs a network's GroupNorms and standardized convolutions on native CPU kernels.

A module only changes its class: its name, weights and settings stay, and so does what is saved of it. Inputs that the
kernels do not support (another layout, another precision) are computed by torch as before.
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
# An image is normalized by one thread, so small batches leave threads idle. It pays nevertheless down to a quarter of
# them: the work waits for memory, which all threads share.
THREADS_PER_IMAGE = 4


def _is_enabled(module: Any) -> bool:
    return module.training or not module._training_only


def _is_plain(parameter: Tensor | None) -> bool:
    return parameter is not None and parameter.dtype == torch.float32 and parameter.is_contiguous()


def _is_supported(norm: Any, x: Tensor) -> bool:
    """Returns whether the kernel can normalize an input, and is worth it."""
    return (
        _is_enabled(norm)
        and all(_is_plain(parameter) for parameter in (norm.weight, norm.bias))
        and x.ndim == 4
        and x.dtype in norms.DTYPES
        and x.device.type == "cpu"
        and x.numel() > 0
        and THREADS_PER_IMAGE * len(x) >= torch.get_num_threads()
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def _group_norm(norm: Any, x: Tensor, *, relu: bool = False) -> Tensor:
    return norms.group_norm(x, norm.weight, norm.bias, norm.num_groups, norm.eps, relu=relu)


class _PlainNorm:
    """Forward pass of a GroupNorm; comes before torch's or timm's class in the order of methods."""

    def forward(self, x: Tensor) -> Tensor:
        if _is_supported(self, x):
            return _group_norm(self, x)
        return super().forward(x)  # pyrefly: ignore[missing-attribute]


class NativeGroupNorm(_PlainNorm, nn.GroupNorm):  # pyrefly: ignore[inconsistent-inheritance]
    """torch's GroupNorm."""


class NativeTimmGroupNorm(_PlainNorm, TimmGroupNorm):
    """timm's GroupNorm."""


class NativeGroupNorm1(_PlainNorm, GroupNorm1):
    """timm's GroupNorm of a single group."""


class _ActivatedNorm:
    """Forward pass of a GroupNorm with an activation; a ReLU is computed by the kernel."""

    def forward(self, x: Tensor) -> Tensor:
        own: Any = self
        if not _is_supported(own, x):
            return super().forward(x)  # pyrefly: ignore[missing-attribute]
        # Exactly nn.ReLU: its subclasses, such as ReLU6, compute something else.
        if type(own.act) is nn.ReLU and isinstance(own.drop, nn.Identity):
            return _group_norm(own, x, relu=True)
        return own.act(own.drop(_group_norm(own, x)))


class NativeGroupNormAct(_ActivatedNorm, GroupNormAct):
    """timm's GroupNorm with an activation."""


class NativeGroupNorm1Act(_ActivatedNorm, GroupNorm1Act):
    """timm's GroupNorm of a single group, with an activation."""


def _standardized_kernel(conv: Any) -> Tensor | None:
    """Returns the standardized kernel in the convolution's precision, or None if it is not supported."""
    # Under autocast torch would standardize in fp32 and convert the kernel afterwards, one more pass over it.
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
    weight = conv.weight
    is_dense = weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)
    is_fp32 = weight.dtype == torch.float32 and weight.device.type == "cpu"
    supported = is_fp32 and dtype in norms.DTYPES and is_dense
    return norms.standardize_weight(weight, conv.eps, dtype) if supported and _is_enabled(conv) else None


class NativeStdConv2d(StdConv2d):
    """timm's convolution with weight standardization, of BiT networks."""

    def forward(self, x: Tensor) -> Tensor:
        kernel = _standardized_kernel(self)
        if kernel is None:
            return super().forward(x)
        return F.conv2d(x, kernel, self.bias, self.stride, self.padding, self.dilation, self.groups)


class NativeStdConv2dSame(StdConv2dSame):
    """timm's convolution with weight standardization and TensorFlow's padding."""

    def forward(self, x: Tensor) -> Tensor:
        kernel = _standardized_kernel(self)
        if kernel is None:
            return super().forward(x)
        # Padded as timm does it: TensorFlow's padding depends on the image, so the convolution itself has none.
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
"""For each class of torch's and timm's that the kernels support, the class that uses them."""


def gains_from_native(net: nn.Module) -> bool:
    """Returns whether a network has modules that the native kernels support."""
    return any(type(module) in NATIVE_CLASSES for module in net.modules())


def native_group_norms(net: nn.Module) -> Iterator[nn.GroupNorm]:
    """Yields the GroupNorms of a network that the native kernels compute, or could."""
    # Both: a network may have been converted before.
    known = {*NATIVE_CLASSES, *NATIVE_CLASSES.values()}
    return (module for module in net.modules() if isinstance(module, nn.GroupNorm) and type(module) in known)


def use_native_kernels(net: nn.Module, *, training_only: bool) -> nn.Module:
    """Makes a network's norms and standardized convolutions use the native kernels, in place.

    Args:
        net: the network.
        training_only: use them in training mode only, so that a student is evaluated with the arithmetic of those who
            will load it.

    Returns:
        the network.
    """
    for module in net.modules():
        # Exactly these classes: a subclass may override what the kernels compute.
        if native := NATIVE_CLASSES.get(type(module)):
            # The class instead of the module: replacing modules would lose hooks, and the references that shared or
            # checkpointed blocks hold.
            module.__class__ = native
            # By `vars`, since nn.Module's own assignment is slow and for parameters and modules only.
            vars(module)["_training_only"] = training_only
    return net
