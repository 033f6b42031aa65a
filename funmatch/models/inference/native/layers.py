"""Runs a network's norms, convolutions and linear layers on native CPU kernels.

A module only changes its class: its name, weights and settings stay, and so does what is saved of it. Inputs that the
kernels do not support (another layout, another precision) are computed by torch as before.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import GroupNorm as TimmGroupNorm
from timm.layers import GroupNorm1, GroupNormAct, LayerNorm2d, pad_same
from timm.layers import LayerNorm as TimmLayerNorm
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d, GroupNorm1Act
from timm.layers.std_conv import StdConv2d, StdConv2dSame
from torch import Tensor, nn

from funmatch.models.inference.native.convnets import (
    SKIPPED,
    NativeBatchNorm,
    NativeBatchNorm2d,
    NativeBatchNormAct2d,
    NativeDepthwiseConv2d,
    NativeDepthwiseConv2dSame,
    NativeGlobalBatchNorm,
    NativeGlobalBatchNormAct,
    is_batch_norm,
    is_depthwise,
)
from funmatch.models.inference.native.inputs import compute_dtype, has_kernel_layout, is_enabled, is_plain
from funmatch.models.inference.native.transformers import (
    NativeLayerNorm,
    NativeLayerNorm2d,
    NativeLinear,
    NativeTimmLayerNorm,
    is_row_norm,
    is_wide,
)
from funmatch.models.inference.tracing import followers
from funmatch.models.sync_batchnorm import GlobalBatchNorm, GlobalBatchNormAct
from funmatch.ops.native import batch_norms, depthwise, linear, norms, rows

PRECISIONS = ("fp32", "bf16")
# An image is normalized by one thread, so small batches leave threads idle. It pays nevertheless down to a quarter of
# them: the work waits for memory, which all threads share.
THREADS_PER_IMAGE = 4


def _is_supported(norm: Any, x: Tensor) -> bool:
    """Returns whether the kernel can normalize an input, and is worth it."""
    return (
        is_enabled(norm)
        and all(is_plain(parameter) for parameter in (norm.weight, norm.bias))
        and has_kernel_layout(x)
        and THREADS_PER_IMAGE * len(x) >= torch.get_num_threads()
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
    weight = conv.weight
    dtype = compute_dtype(weight)
    is_dense = weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)
    is_fp32 = weight.dtype == torch.float32 and weight.device.type == "cpu"
    supported = is_fp32 and dtype in norms.DTYPES and is_dense
    return norms.standardize_weight(weight, conv.eps, dtype) if supported and is_enabled(conv) else None


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


NATIVE_CLASSES: dict[str, dict[type[nn.Module], type[nn.Module]]] = {
    "group_norm": {
        nn.GroupNorm: NativeGroupNorm,
        TimmGroupNorm: NativeTimmGroupNorm,
        GroupNorm1: NativeGroupNorm1,
        GroupNormAct: NativeGroupNormAct,
        GroupNorm1Act: NativeGroupNorm1Act,
    },
    "std_conv": {StdConv2d: NativeStdConv2d, StdConv2dSame: NativeStdConv2dSame},
    "batch_norm": {
        nn.BatchNorm2d: NativeBatchNorm2d,
        BatchNormAct2d: NativeBatchNormAct2d,
        GlobalBatchNorm: NativeGlobalBatchNorm,
        GlobalBatchNormAct: NativeGlobalBatchNormAct,
    },
    "depthwise": {nn.Conv2d: NativeDepthwiseConv2d, Conv2dSame: NativeDepthwiseConv2dSame},
    "linear": {nn.Linear: NativeLinear},
    "layer_norm": {
        nn.LayerNorm: NativeLayerNorm,
        TimmLayerNorm: NativeTimmLayerNorm,
        LayerNorm2d: NativeLayerNorm2d,
    },
}
"""For each kind of kernel, the classes of torch and timm that it supports, and for each the class that uses it."""
CONDITIONS: dict[str, Callable[[Any], bool]] = {
    "depthwise": is_depthwise,
    "linear": is_wide,
    "layer_norm": is_row_norm,
}
"""What a module must be besides, where its class alone does not decide."""
FROZEN_KINDS = ("group_norm", "std_conv")
"""Kernels that compute forward passes alone faster, and all that there were in runs that did not record theirs."""
ATTENTION, SOFTMAX = "attention", "softmax"
"""The kinds that change no module (`ops.native.attention`): its products, and the softmax between them."""
AVAILABLE: dict[str, Callable[[], str]] = {
    **dict.fromkeys(FROZEN_KINDS, lambda: norms.why_unavailable()),
    "batch_norm": lambda: batch_norms.why_unavailable(),
    "depthwise": lambda: depthwise.why_unavailable(),
    "linear": lambda: linear.why_unavailable(),
    "layer_norm": lambda: rows.why_unavailable(),
    ATTENTION: lambda: "",
    SOFTMAX: lambda: rows.why_unavailable(),
}
"""For each kind a function that returns why it is unavailable here, or nothing."""


def kinds_of(net: nn.Module) -> tuple[str, ...]:
    """Returns the kinds of kernels that support modules of a network."""
    found = Counter(kind for module in net.modules() if (kind := _kind_of(module)))
    # A single linear layer is the head, which has but one row an image.
    if found["linear"] == 1:
        del found["linear"]
    if any("attention" in type(module).__name__.lower() for module in net.modules()):
        found.update((ATTENTION, SOFTMAX))
    return tuple(kind for kind in AVAILABLE if kind in found)


def _kind_of(module: nn.Module) -> str | None:
    """Returns the kind of kernel that supports a module: exactly these classes, as a subclass may override its work."""
    found = (kind for kind, classes in NATIVE_CLASSES.items() if type(module) in classes)
    return next((kind for kind in found if kind not in CONDITIONS or CONDITIONS[kind](module)), None)


def native_group_norms(net: nn.Module) -> Iterator[nn.GroupNorm]:
    """Yields the GroupNorms of a network that the native kernels compute, or could."""
    # Both: a network may have been converted before.
    classes = NATIVE_CLASSES["group_norm"]
    known = {*classes, *classes.values()}
    return (module for module in net.modules() if isinstance(module, nn.GroupNorm) and type(module) in known)


def use_native_kernels(net: nn.Module, *, training_only: bool, kinds: Collection[str] = FROZEN_KINDS) -> nn.Module:
    """Makes a network's layers use the native kernels, in place.

    Args:
        net: the network.
        training_only: use them in training mode only, so that a student is evaluated with the arithmetic of those who
            will load it.
        kinds: of kernels; others are left to torch.

    Returns:
        the network.
    """
    # Found before the classes change, which a trace would not know.
    activations = followers(net, is_batch_norm, lambda module: type(module) in SKIPPED) if "batch_norm" in kinds else {}
    rounding = (
        followers(net, _is_layer_norm, lambda module: isinstance(module, nn.Linear)) if "layer_norm" in kinds else {}
    )
    for name, module in net.named_modules():
        kind = _kind_of(module)
        if kind is None or kind not in kinds:
            continue
        # The class instead of the module: replacing modules would lose hooks, and the references that shared or
        # checkpointed blocks hold.
        module.__class__ = NATIVE_CLASSES[kind][type(module)]
        # By `vars`, since nn.Module's own assignment is slow and for parameters and modules only.
        vars(module)["_training_only"] = training_only
        if isinstance(module, NativeBatchNorm):
            vars(module)["_activation"] = _skipping(net, activations.get(name))
        if isinstance(module, nn.LayerNorm):
            vars(module)["_rounded"] = name in rounding
    return net


def _is_layer_norm(module: nn.Module) -> bool:
    return type(module) in NATIVE_CLASSES["layer_norm"]


def _skipping(net: nn.Module, name: str | None) -> nn.Module | None:
    """Lets an activation leave out what the BatchNorm before it has computed, and returns it."""
    if name is None:
        return None
    activation = net.get_submodule(name)
    activation.__class__ = SKIPPED[type(activation)]
    vars(activation)["_skip"] = False
    return activation
