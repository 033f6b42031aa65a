"""GroupNorm (with its ReLU) and weight standardisation on the CPU, by our own kernels.

What they cost there is memory, not arithmetic, and torch looks at the same memory several times; with convolutions in
bf16 its GroupNorm takes a third of the step of a BiT network.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from funmatch.ops.native import library

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
CLOSE = 1e-3
FLOATS: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults are


@cache
def why_unavailable() -> str:
    """Why these kernels cannot be had here; empty where they can."""
    return library.why_unavailable() or (
        "" if _computes() else "what the compiler made of them computes something else"
    )


def _computes() -> bool:
    """Whether the kernels give what torch gives, there and back, on a few numbers."""
    random = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(2, 6, 3, 4, generator=random, **FLOATS).contiguous(memory_format=torch.channels_last)
    given = torch.randn(2, 6, 3, 4, generator=random, **FLOATS).contiguous(memory_format=torch.channels_last)
    weight, bias, kernel = (torch.randn(*shape, generator=random, **FLOATS) for shape in ((6,), (6,), (4, 2, 3, 3)))
    y, kept = _norm(x, weight, bias, 3, 1e-5, relu=True)
    got = (y, *_norm_back(given, x, weight, bias, kept, 3, relu=True))
    made, known = _standardise(kernel, 1e-6, torch.float32)
    got = (*got, made, _standardise_back(given.flatten()[:72].view(4, 2, 3, 3), kernel, known))
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias, kernel)]
        wanted = F.group_norm(leaves[0], 3, leaves[1], leaves[2], 1e-5).relu()
        filters = F.batch_norm(leaves[3].view(1, 4, 18), None, None, training=True, eps=1e-6).view(4, 2, 3, 3)
        back = torch.autograd.grad((wanted, filters), leaves, (given, given.flatten()[:72].view(4, 2, 3, 3)))
    truth = (wanted, *back[:3], filters, back[3])
    return all((a - b).abs().max() < CLOSE for a, b in zip(got, truth, strict=True))


def _addresses(*tensors: Tensor) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, *, relu: bool) -> tuple[Tensor, Tensor]:
    """The normalised images, and the mean and 1 / deviation of each group: (2, n, groups)."""
    y, kept = torch.empty_like(x), torch.empty(2, len(x), groups, **FLOATS)
    call = getattr(library.load_library(), f"norm_{DTYPES[x.dtype]}")
    call(*_addresses(x, y, kept[0], kept[1], weight, bias), _shape(x, groups, relu=relu), eps)
    return y, kept


def _norm_back(
    given: Tensor, x: Tensor, weight: Tensor, bias: Tensor, kept: Tensor, groups: int, *, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the images, of weight, and of bias."""
    given = given.contiguous(memory_format=torch.channels_last)
    back, shares = torch.empty_like(x), torch.empty(2, len(x), x.shape[1], **FLOATS)
    call = getattr(library.load_library(), f"norm_back_{DTYPES[x.dtype]}")
    addresses = _addresses(given, x, back, shares[0], shares[1], kept[0], kept[1], weight, bias)
    call(*addresses, _shape(x, groups, relu=relu))
    own, shift = shares.sum(1)
    return back, own, shift


def _shape(x: Tensor, groups: int, *, relu: bool) -> library.NormShape:
    n, channels, height, width = x.shape
    return library.NormShape(n, height * width, channels, groups, relu, torch.get_num_threads())


def _standardise(weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The standardised filters, and the mean and 1 / deviation of each: (2, filters)."""
    made, kept = torch.empty_like(weight, dtype=dtype), torch.empty(2, len(weight), **FLOATS)
    call = getattr(library.load_library(), f"standardise_{DTYPES[dtype]}")
    call(*_addresses(weight, made, kept[0], kept[1]), len(weight), weight[0].numel(), eps, torch.get_num_threads())
    return made, kept


def _standardise_back(given: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
    if given.stride() != weight.stride():
        given = torch.empty_like(weight, dtype=given.dtype).copy_(given)
    back = torch.empty_like(weight)
    call = getattr(library.load_library(), f"standardise_back_{DTYPES[given.dtype]}")
    addresses = _addresses(given, weight, back, kept[0], kept[1])
    call(*addresses, len(weight), weight[0].numel(), torch.get_num_threads())
    return back


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, relu: bool) -> Tensor:
        y, kept = _norm(x, weight, bias, groups, eps, relu=relu)
        ctx.save_for_backward(x, weight, bias, kept)
        ctx.groups, ctx.relu = groups, relu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # pyrefly: ignore[bad-override]
        x, weight, bias, kept = ctx.saved_tensors
        return *_norm_back(gradients[0], x, weight, bias, kept, ctx.groups, relu=ctx.relu), None, None, None


class _Standardised(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        made, kept = _standardise(weight, eps, dtype)
        ctx.save_for_backward(weight, kept)
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # pyrefly: ignore[bad-override]
        return _standardise_back(gradients[0], *ctx.saved_tensors), None, None


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, *, relu: bool = False) -> Tensor:
    """`torch.nn.functional.group_norm` (Wu & He, 2018), and a ReLU.

    Args:
        x: (n, channels, height, width) fp32 or bf16, in `channels_last` memory on the CPU.
        weight, bias: (channels,) fp32.
    """
    return _Norm.apply(x, weight, bias, groups, eps, relu)


def standardize_weight(weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Filters with mean 0 and deviation 1 (Qiao et al., 2019), in the precision in which they are multiplied.

    Args:
        weight: (filters, ...) fp32 on the CPU, each filter in one piece of memory.
        dtype: fp32 or bf16.

    Returns:
        the same shape, laid out alike; gradients come back in fp32.
    """
    return _Standardised.apply(weight, eps, dtype)
