"""Native kernels of softmax, LayerNorm and sums of columns, against torch in fp64."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from kernel_checks import assert_threads_change_no_bit, errors
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from funmatch.models.inference.native import layers as native_layers
from funmatch.models.inference.native.transformers import NativeLayerNorm, NativeLayerNorm2d
from funmatch.ops.native import attention, build, linear, rows

pytestmark = pytest.mark.skipif(build.find_compiler() is None, reason="there is no C++ compiler here")
F32, BF16 = torch.float32, torch.bfloat16
ROUNDING = {F32: 2e-6, BF16: 4e-3}
"""Error of a result, relative to the largest: of sums in fp32, and of rounding to bf16."""


def with_gradients(compute, leaves, upstream) -> list[Tensor]:
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    y = compute(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream.to(y.dtype))]


@pytest.mark.parametrize(("of", "to"), [(F32, F32), (F32, BF16), (BF16, BF16)])
@pytest.mark.parametrize(("shape", "offset"), [((2, 3, 7), 0.0), ((300, 40), 100.0), ((1, 1), 0.0), ((129, 64), 1.0)])
def test_layer_norm_and_its_gradients_equal_torchs(of, to, shape, offset):
    random = torch.Generator().manual_seed(len(shape))
    width = shape[-1]
    x = (torch.randn(shape, generator=random) + offset).to(of)
    leaves = [x, torch.randn(width, generator=random), torch.randn(width, generator=random)]
    upstream = torch.randn(shape, generator=random).to(to)
    found = with_gradients(lambda x, w, b: rows.layer_norm(x, w, b, 1e-6, to), leaves, upstream)
    truth = with_gradients(
        lambda x, w, b: F.layer_norm(x, (width,), w, b, 1e-6), [leaf.double() for leaf in leaves], upstream
    )
    assert [each.dtype for each in found] == [to, of, F32, F32]
    rounding = [ROUNDING[to], ROUNDING[of], ROUNDING[F32], ROUNDING[F32]]
    # Far from 0, the deviation of numbers is known to their own precision only.
    scale = 1 + offset
    if width > 1:  # one number is its own mean, and all of its gradient is rounding
        assert all(error < scale * limit for error, limit in zip(errors(found, truth), rounding, strict=True))
    else:
        assert torch.equal(found[0].float(), leaves[2].to(to).float().expand(shape))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape", [(4, 3, 17, 17), (5, 197), (2, 1), (3, 64)])
def test_softmax_and_its_gradient_equal_torchs(dtype, shape):
    random = torch.Generator().manual_seed(shape[-1])
    x, upstream = (5 * torch.randn(shape, generator=random).to(dtype) for _ in range(2))
    found = with_gradients(rows.softmax, [x], upstream)
    truth = with_gradients(lambda x: x.softmax(-1), [x.double()], upstream)
    assert [each.dtype for each in found] == [dtype, dtype]
    assert float((found[0].double() - truth[0]).abs().max()) < ROUNDING[dtype]
    # torch computes the gradient from what was rounded.
    assert float((found[1].double() - truth[1]).abs().max()) < 20 * ROUNDING[dtype]


def test_softmax_of_masks_infinities_and_nan_is_torchs():
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[0.0, -inf, 1.0], [-inf, -inf, -inf], [inf, 0.0, 1.0], [nan, 0.0, 1.0], [3e38, -3e38, 3e38]])
    assert torch.allclose(rows.softmax(x), x.softmax(-1), atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (1000, 33), (129, 64)])
def test_sums_of_columns_are_exact_to_fp32(dtype, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype) + 1
    assert torch.allclose(rows.column_sums(x).double(), x.double().sum(0), rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("threads", [1, 3])
def test_thread_count_changes_no_bit(threads):
    x = torch.randn(300, 24, generator=torch.Generator().manual_seed(0))

    def compute() -> list[Tensor]:
        normed = with_gradients(lambda x: rows.layer_norm(x, torch.ones(24), torch.ones(24), 1e-6, F32), [x], x)
        return [*normed, rows.softmax(x), rows.column_sums(x)]

    assert_threads_change_no_bit(compute, threads)


def test_attention_with_the_native_softmax_equals_torchs():
    random = torch.Generator().manual_seed(0)
    heads = [torch.randn(2, 3, 11, 8, generator=random).to(BF16) for _ in range(3)]
    upstream = torch.randn(2, 3, 11, 8, generator=random).to(BF16)
    truth = with_gradients(F.scaled_dot_product_attention, [head.double() for head in heads], upstream)
    with attention.ProductAttention(native_softmax=True):
        assert max(errors(with_gradients(F.scaled_dot_product_attention, heads, upstream), truth)) < 2e-2


def vit() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "depth": 2, "embed_dim": 64, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, **sizes).train()


def test_norm_is_rounded_only_where_linear_layers_read_it_and_changes_no_result_by_that():
    net = vit()
    native = native_layers.use_native_kernels(copy.deepcopy(net), training_only=True, kinds=["layer_norm"])
    norms = {name: module for name, module in native.named_modules() if isinstance(module, NativeLayerNorm)}
    norms |= {name: module for name, module in native.named_modules() if type(module).__name__ == "NativeTimmLayerNorm"}
    read = {name for name, norm in norms.items() if norm._rounded}
    assert read == {f"blocks.{i}.norm{j}" for i in range(len(net.blocks)) for j in (1, 2)}, "and not the last one"
    x = torch.randn(4, 3, *net.patch_embed.img_size)
    results = []
    for each in (net, native):
        with torch.autocast("cpu", BF16):
            y = each(x)
        y.float().square().mean().backward()
        results.append((y.detach(), torch.cat([parameter.grad.flatten() for parameter in each.parameters()])))
    (theirs, their_gradient), (ours, our_gradient) = results
    assert ours.dtype == theirs.dtype
    assert float((ours - theirs).abs().max()) < 0.05 * float(theirs.abs().max())
    assert float((our_gradient - their_gradient).norm() / their_gradient.norm()) < 0.03


@pytest.mark.parametrize(
    ("norm", "x", "reason"),
    [
        (nn.LayerNorm(24), torch.randn(3, 24), ""),
        (LayerNorm2d(24), torch.randn(3, 24, 4, 4).contiguous(memory_format=torch.channels_last), ""),
        (LayerNorm2d(24), torch.randn(3, 24, 4, 4), "channels first"),
        (nn.LayerNorm(24), torch.randn(24, 3).t(), "columns"),
        (nn.LayerNorm(24).double(), torch.randn(3, 24).double(), "fp64"),
        (nn.LayerNorm(24), torch.randn(0, 24), "no rows"),
    ],
)
def test_layer_norm_that_the_kernel_cannot_compute_is_torchs(monkeypatch, norm, x, reason):
    native = native_layers.use_native_kernels(copy.deepcopy(norm), training_only=True, kinds=["layer_norm"])
    assert isinstance(native, NativeLayerNorm | NativeLayerNorm2d)
    calls = []
    real = rows.layer_norm
    monkeypatch.setattr(rows, "layer_norm", lambda *given: calls.append(1) or real(*given))
    assert torch.allclose(native(x), norm(x), atol=1e-5)
    assert bool(calls) == (not reason)
    calls.clear()
    native.eval()
    assert torch.equal(native(x), norm(x)), "evaluation uses torch's"
    assert not calls


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm((4, 6)), nn.LayerNorm(6, bias=False), nn.LayerNorm(6, elementwise_affine=False)]
)
def test_other_layer_norms_stay_torchs(norm):
    native_layers.use_native_kernels(norm, training_only=True, kinds=["layer_norm"])
    assert type(norm) is nn.LayerNorm


def test_gradient_of_biases_without_a_compiler_is_torchs(monkeypatch):
    leaves = [torch.randn(200, 40), torch.randn(36, 40), torch.randn(36)]
    upstream = torch.randn(200, 36)
    ours = with_gradients(lambda *given: linear.linear(*given, F32), leaves, upstream)
    monkeypatch.setattr(rows, "why_unavailable", lambda: "there is no compiler")
    theirs = with_gradients(lambda *given: linear.linear(*given, F32), leaves, upstream)
    assert torch.equal(theirs[-1], upstream.sum(0))
    assert torch.allclose(ours[-1], theirs[-1], atol=1e-4)
