"""Computes gradients of convolutions of one filter a channel on the CPU by native kernels.

oneDNN is fast forward, and for 3 × 3 filters without a stride. Others it computes by code for any convolution: of 72
channels, 5 × 5 with stride 2, in bf16, in 25 ms instead of 1 (batch 32, 32 × 32 pixels, two cores of an AMD EPYC).
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from funmatch.ops.native import library, rows
from funmatch.ops.native.norms import DTYPES, TOLERANCE

SIZES, STRIDES = (3, 5, 7), (1, 2)
"""Filters and strides that the kernels have."""
MIN_CHANNELS = 16
"""Channels of a vector."""


@cache
def why_unavailable() -> str:
    """Returns why these kernels are unavailable; an empty string if they are available."""
    return rows.why_unavailable() or ("" if _kernels_are_right() else "the compiled kernels compute wrong values")


def _kernels_are_right() -> bool:
    """Compares the kernels with torch on a few numbers."""
    random = torch.Generator("cpu").manual_seed(0)  # of its own: drawing from torch's would change the run
    x = torch.randn(2, 19, 6, 9, generator=random, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    for size in SIZES:
        kernel = torch.randn(19, 1, size, size, generator=random, dtype=torch.float32)
        for stride in STRIDES:
            # The first call may come from inside `no_grad` or inference mode.
            with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
                leaves = (x.clone().requires_grad_(), kernel.clone().requires_grad_())
                y = F.conv2d(leaves[0], leaves[1], None, stride, size // 2, 1, 19)
                grad = torch.randn(y.shape, generator=random, dtype=torch.float32)
                grad = grad.contiguous(memory_format=torch.channels_last)
                reference = torch.autograd.grad(y, leaves, grad)
            ours = (
                _input_gradient(grad, x, kernel, stride, size // 2),
                _weight_gradient(grad, x, kernel, stride, size // 2),
            )
            if any((a - b).abs().max() >= TOLERANCE for a, b in zip(ours, reference, strict=True)):
                return False
    return True


def is_slow_in_torch(size: int, stride: int, dtype: torch.dtype) -> bool:
    """Returns whether torch computes the gradients of such a convolution slowly.

    Args:
        size: height and width of the filters.
        stride: along both axes.
        dtype: of images and filters.
    """
    return size in SIZES and stride in STRIDES and (size > 3 or (stride > 1 and dtype == torch.bfloat16))


def _window(grad_y: Tensor, x: Tensor, size: int, stride: int, padding: int) -> library.Window:
    n, channels, height, width = x.shape
    sizes = (n, height, width, channels, *grad_y.shape[2:])
    return library.Window(*sizes, size, stride, padding, torch.get_num_threads())


def _input_gradient(grad_y: Tensor, x: Tensor, kernel: Tensor, stride: int, padding: int) -> Tensor:
    """Returns the gradient of the images."""
    channels, size = len(kernel), kernel.shape[-1]
    # A row for each tap, whose channels are neighbours as those of the images are.
    taps, grad_x = kernel.reshape(channels, size * size).t().float().contiguous(), torch.empty_like(x)
    function = getattr(library.load_library(), f"depthwise_input_{DTYPES[x.dtype]}")
    function(*library.addresses(grad_y, taps, grad_x), _window(grad_y, x, size, stride, padding))
    return grad_x


def _weight_gradient(grad_y: Tensor, x: Tensor, kernel: Tensor, stride: int, padding: int) -> Tensor:
    """Returns the gradient of the filters in fp32."""
    channels, size = len(kernel), kernel.shape[-1]
    shares = torch.empty(len(x), size * size, channels, dtype=torch.float32)
    function = getattr(library.load_library(), f"depthwise_weight_{DTYPES[x.dtype]}")
    function(*library.addresses(grad_y, x, shares), _window(grad_y, x, size, stride, padding))
    # Summed over images here, in an order that does not depend on the kernel's threads.
    return shares.sum(0).t().reshape(kernel.shape)


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
        kernel = weight.to(x.dtype)
        ctx.save_for_backward(x, kernel)
        ctx.geometry, ctx.has_bias = (stride, padding), bias is not None
        return F.conv2d(x, kernel, None if bias is None else bias.to(x.dtype), stride, padding, 1, len(kernel))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # pyrefly: ignore[bad-override]  (torch's is untyped)
        x, kernel = ctx.saved_tensors
        # Autograd may hand over a gradient of another layout, e.g. an expanded one behind a mean.
        grad_y = gradients[0].contiguous(memory_format=torch.channels_last)
        grad_x = _input_gradient(grad_y, x, kernel, *ctx.geometry) if ctx.needs_input_grad[0] else None
        grad_weight = _weight_gradient(grad_y, x, kernel, *ctx.geometry) if ctx.needs_input_grad[1] else None
        # With channels last, images are rows of them.
        grad_bias = rows.column_sums(grad_y.permute(0, 2, 3, 1).flatten(0, 2)) if ctx.has_bias else None
        return grad_x, grad_weight, grad_bias, None, None


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """Computes `torch.nn.functional.conv2d` with one filter a channel.

    Args:
        x: (n, channels, height, width) fp32 or bf16, in `channels_last` memory on the CPU; at least `MIN_CHANNELS`.
        weight: (channels, 1, size, size) fp32, a size of `SIZES`.
        bias: (channels,) fp32, or None.
        stride: one of `STRIDES`, along both axes.
        padding: zeros on each side, pixels.

    Returns:
        (n, channels, out height, out width) in the dtype and layout of `x`; differentiable once.
    """
    return _Depthwise.apply(x, weight, bias, stride, padding)
