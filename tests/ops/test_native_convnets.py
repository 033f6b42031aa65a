"""Native kernels of BatchNorm, depthwise convolutions, linear layers and attention, against torch in fp64."""

import copy
from collections.abc import Callable, Iterable

import pytest
import timm
import torch
import torch.nn.functional as F
from kernel_checks import assert_threads_change_no_bit, errors, gradients
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from funmatch.models.classifier import Card, Classifier
from funmatch.models.inference.native import layers as native_layers
from funmatch.models.inference.native.convnets import NativeBatchNorm2d, SkippedOnce
from funmatch.ops.native import attention, batch_norms, build, depthwise, linear

pytestmark = pytest.mark.skipif(build.find_compiler() is None, reason="there is no C++ compiler here")
LAST = torch.channels_last
KINDS = tuple(native_layers.AVAILABLE)
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def with_gradients(compute: Callable[..., Tensor], leaves: Iterable[Tensor], upstream: Tensor) -> list[Tensor]:
    leaves = [leaf.detach().clone(memory_format=torch.preserve_format).requires_grad_() for leaf in leaves]
    y = compute(*leaves)
    return [y, *torch.autograd.grad(y, leaves, upstream.to(y.dtype))]


def doubled(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [tensor.double() for tensor in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", batch_norms.ACTIVATIONS)
@pytest.mark.parametrize(
    ("n", "channels", "height", "width", "offset"), [(4, 24, 7, 9, 0.0), (3, 5, 1, 2, 0.0), (6, 16, 12, 12, 1000.0)]
)
def test_batch_norm_its_gradients_and_statistics_equal_torchs(dtype, activation, n, channels, height, width, offset):
    random = torch.Generator().manual_seed(n + channels)

    def randn(*shape):
        return torch.randn(*shape, generator=random)

    x = (3 * randn(n, channels, height, width) + offset).to(dtype).contiguous(memory_format=LAST)
    upstream = randn(n, channels, height, width).to(dtype).contiguous(memory_format=LAST)
    leaves = [x, randn(channels), randn(channels)]
    running = (randn(channels), randn(channels).abs())
    moved, torchs = copy.deepcopy(running), copy.deepcopy(running)
    exact = tuple(doubled(running))

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return batch_norms.batch_norm(x, weight, bias, moved, 0.1, 1e-5, activation)

    def plain(statistics: tuple[Tensor, ...]) -> Callable[..., Tensor]:
        return lambda x, w, b: activation()(F.batch_norm(x, *statistics, w, b, True, 0.1, 1e-5))

    found = with_gradients(ours, leaves, upstream)
    truth = with_gradients(plain(exact), doubled(leaves), upstream.double())
    theirs = with_gradients(plain(torchs), leaves, upstream)
    assert found[0].is_contiguous(memory_format=LAST)
    assert [each.dtype for each in found] == [dtype, dtype, torch.float32, torch.float32]
    # Near an activation's edge, rounding decides whether a value passes, so errors are compared with torch's own.
    for error, torchs_error in zip(errors(found, truth), errors(theirs, truth), strict=True):
        assert error <= max(TOLERANCES[dtype], 1.5 * torchs_error)
    assert max(errors(moved, exact)) <= max(1e-5, 1.5 * max(errors(torchs, exact)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", depthwise.SIZES)
@pytest.mark.parametrize("stride", depthwise.STRIDES)
@pytest.mark.parametrize(
    ("channels", "height", "width", "less"), [(16, 9, 8, 0), (37, 5, 12, 1), (24, 3, 2, 0), (19, 16, 7, 2)]
)
def test_gradients_of_depthwise_convolutions_equal_torchs(dtype, size, stride, channels, height, width, less):
    # With less padding the last pixels may be read by no filter.
    padding = max(0, size // 2 - less)
    if min(height, width) + 2 * padding < size:
        return
    random = torch.Generator().manual_seed(size + channels)
    x = torch.randn(3, channels, height, width, generator=random).to(dtype).contiguous(memory_format=LAST)
    leaves = [x, torch.randn(channels, 1, size, size, generator=random), torch.randn(channels, generator=random)]
    # Rounded first, as under autocast, so that all compute with the same filters.
    leaves[1:] = [leaf.to(dtype).float() for leaf in leaves[1:]]

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, stride, padding, 1, channels)

    y = plain(*leaves[:1], *(leaf.to(dtype) for leaf in leaves[1:]))
    upstream = torch.randn(y.shape, generator=random).to(dtype)
    truth = with_gradients(plain, doubled(leaves), upstream.double())
    found = with_gradients(lambda *all: depthwise.depthwise_conv(*all, stride, padding), leaves, upstream)
    assert found[0].is_contiguous(memory_format=LAST)
    assert [each.dtype for each in found] == [dtype, dtype, torch.float32, torch.float32]
    assert max(errors(found, truth)) < {torch.float32: 1e-5, torch.bfloat16: 6e-3}[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_and_its_gradients_equal_torchs(dtype, bias):
    random = torch.Generator().manual_seed(0)
    leaves = [torch.randn(4, 50, 48, generator=random), 0.1 * torch.randn(36, 48, generator=random)]
    leaves += [torch.randn(36, generator=random)] * bias
    # Rounded first, so that both compute the same; one more rounding, of the result, is bf16's.
    leaves = [leaf.to(dtype).float() for leaf in leaves]
    upstream = torch.randn(4, 50, 36, generator=random).to(dtype)
    found = with_gradients(lambda x, w, b=None: linear.linear(x, w, b, dtype), leaves, upstream)
    truth = with_gradients(F.linear, doubled(leaves), upstream.double())
    assert found[0].dtype == dtype
    assert {each.dtype for each in found[1:]} == {torch.float32}
    assert max(errors(found, truth)) < {torch.float32: 1e-5, torch.bfloat16: 6e-3}[dtype]


def test_precision_that_onednn_lacks_is_computed_by_torch(monkeypatch):
    def failing(*_):
        raise RuntimeError("mkldnn_bf16 needs a processor with avx512bw\nand more")

    layer = native_layers.use_native_kernels(nn.Linear(64, 64), training_only=True, kinds=KINDS)
    rows = torch.randn(200, 64)
    with monkeypatch.context() as patch:
        patch.setattr(linear, "product", failing)
        linear.why_unavailable.cache_clear()
        assert linear.why_unavailable(torch.bfloat16) == "mkldnn_bf16 needs a processor with avx512bw"
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer(rows), F.linear(rows, layer.weight, layer.bias))
        patch.setattr(linear, "product", lambda rows, weight: rows @ weight.t() + 1)
        linear.why_unavailable.cache_clear()
        assert linear.why_unavailable() == "oneDNN computes wrong values"
    linear.why_unavailable.cache_clear()
    assert [linear.why_unavailable(dtype) for dtype in (torch.float32, torch.bfloat16)] == ["", ""]


def test_attention_equals_torchs_and_leaves_other_calls_alone():
    random = torch.Generator().manual_seed(0)
    heads = [torch.randn(2, 3, 11, 8, generator=random).bfloat16() for _ in range(3)]
    upstream = torch.randn(2, 3, 11, 8, generator=random).bfloat16()
    truth = with_gradients(F.scaled_dot_product_attention, doubled(heads), upstream.double())
    with attention.ProductAttention():
        found = with_gradients(F.scaled_dot_product_attention, heads, upstream)
        assert max(errors(found, truth)) < 2e-2
        scaled = F.scaled_dot_product_attention(*heads, scale=0.5)
        assert max(errors([scaled], [F.scaled_dot_product_attention(*doubled(heads), scale=0.5)])) < 2e-2
        mask = torch.zeros(11, 11, dtype=torch.bool).fill_diagonal_(True)
        masked = F.scaled_dot_product_attention(*heads, mask)
        assert torch.equal(masked, heads[2]), "each token attends to itself alone"
        causal = F.scaled_dot_product_attention(*heads, is_causal=True)
        assert torch.equal(causal[:, :, 0], heads[2][:, :, 0])
    assert not attention.is_faster_by_products(*heads, mask)
    assert not attention.is_faster_by_products(*heads, dropout_p=0.1)
    assert not attention.is_faster_by_products(*(head.float() for head in heads)), "torch's kernel is as fast in fp32"
    assert attention.is_faster_by_products(*heads)


@pytest.mark.parametrize("threads", [1, 3])
def test_thread_count_changes_no_bit(threads):
    x = torch.randn(6, 32, 8, 8).contiguous(memory_format=LAST)
    leaves, kernel = (x, torch.randn(32)), torch.randn(32, 1, 5, 5)

    def forward_backward() -> list[Tensor]:
        upstream = torch.ones_like(x) * x
        return [
            *with_gradients(lambda x, w: batch_norms.batch_norm(x, w, w, None, 0.1, 1e-5, nn.SiLU), leaves, upstream),
            *with_gradients(lambda x, k: depthwise.depthwise_conv(x, k, None, 1, 2), (x, kernel), upstream)[1:],
        ]  # fmt: skip

    assert_threads_change_no_bit(forward_backward, threads)


def test_nan_and_infinity_spread_to_their_channel_only():
    x = torch.randn(2, 4, 3, 3).contiguous(memory_format=LAST)
    x[0, 1, 1, 1] = float("nan")
    x[1, 2, 0, 0] = float("inf")
    for activation in batch_norms.ACTIVATIONS:
        y = batch_norms.batch_norm(x, torch.ones(4), torch.zeros(4), None, 0.1, 1e-5, activation)
        assert y[:, 1:3].isnan().all()
        assert y[:, [0, 3]].isfinite().all()


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("test_resnet", ("batch_norm",)),
        ("test_efficientnet", ("batch_norm", "depthwise")),
        ("test_convnext", ("depthwise", "linear", "layer_norm")),
        ("test_vit", ("linear", "layer_norm", "attention", "softmax")),
        ("mobilenetv3_small_050", ("batch_norm", "depthwise")),
        pytest.param("tf_efficientnet_lite0", ("batch_norm", "depthwise"), marks=pytest.mark.slow),
        pytest.param("regnety_002", ("batch_norm",), marks=pytest.mark.slow),
        pytest.param("convnext_atto", ("depthwise", "layer_norm"), marks=pytest.mark.slow),
        pytest.param("resnet18d", ("batch_norm",), marks=pytest.mark.slow),
        pytest.param("mobilenetv4_conv_small_050", ("batch_norm", "depthwise"), marks=pytest.mark.slow),
        pytest.param(
            "swin_tiny_patch4_window7_224", ("linear", "layer_norm", "attention", "softmax"), marks=pytest.mark.slow
        ),
    ],
)
def test_network_with_native_kernels_computes_the_same_function(name, kinds):
    # A value at the edge of a ReLU may fall to its other side, in torch as well, and move the gradient by 1e-3: not for
    # each seed.
    assert min(error_beside_torch(name, kinds, seed) for seed in range(3)) <= 1


def error_beside_torch(name: str, kinds: tuple[str, ...], seed: int) -> float:
    """Returns the relative error of a network's gradient with kernels, as a multiple of what torch's may be."""
    kwargs = {"img_size": 64} if "vit" in name or "swin" in name else {}
    torch.manual_seed(seed)
    plain = timm.create_model(name, num_classes=40, drop_path_rate=0.0, drop_rate=0.0, **kwargs).train()
    plain.to(memory_format=LAST)
    assert native_layers.kinds_of(plain) == kinds
    native = native_layers.use_native_kernels(copy.deepcopy(plain), training_only=True, kinds=kinds)
    views = torch.rand(8, 3, 64, 64).contiguous(memory_format=LAST)
    exact = copy.deepcopy(plain).double()
    truth, exact_gradients = gradients(exact, views.double())
    (logits, found), (theirs, plain_gradients) = gradients(native, views), gradients(plain, views)
    scale = truth.abs().max()
    assert (logits - truth).abs().max() <= max(1e-4 * scale, 2 * (theirs - truth).abs().max())
    assert native.state_dict().keys() == plain.state_dict().keys()
    statistics = [(native.get_buffer(name), buffer) for name, buffer in plain.named_buffers()]
    assert all(torch.allclose(ours.double(), buffer.double(), rtol=1e-4, atol=1e-5) for ours, buffer in statistics)
    native.load_state_dict(plain.state_dict())
    assert torch.equal(native.eval()(views), plain.eval()(views)), (
        "evaluation uses torch's layers, as anyone who loads the student does"
    )
    size = sum(float(gradient.square().sum()) for gradient in exact_gradients.values()) ** 0.5

    def relative_error(other):
        return sum(float((other[key] - exact_gradients[key]).square().sum()) for key in exact_gradients) ** 0.5 / size

    return relative_error(found) / max(1e-4, 2 * relative_error(plain_gradients))


def test_activation_behind_a_norm_is_computed_once_in_either_mode():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.SiLU(), nn.Conv2d(16, 8, 1)).to(
        memory_format=LAST
    )
    native = native_layers.use_native_kernels(copy.deepcopy(plain), training_only=True, kinds=KINDS)
    assert isinstance(native[1], NativeBatchNorm2d)
    assert isinstance(native[2], SkippedOnce)
    views = torch.randn(4, 3, 9, 9).contiguous(memory_format=LAST)
    for mode in ("train", "eval", "norm alone in eval mode", "train"):
        for net in (plain, native):
            net.train(mode != "eval")
            net[1].train(mode == "train")
        assert torch.allclose(native(views), plain(views), atol=1e-5), mode
    assert torch.allclose(native(views.double().float().contiguous()), plain(views), atol=1e-5), "channels first"


@pytest.mark.parametrize(
    ("layer", "inputs"),
    [
        (nn.BatchNorm2d(8), torch.randn(4, 8, 5, 5)),  # channels first
        (nn.BatchNorm2d(8, affine=False), torch.randn(4, 8, 5, 5).contiguous(memory_format=LAST)),
        (nn.BatchNorm2d(8, momentum=None), torch.randn(4, 8, 5, 5).contiguous(memory_format=LAST)),
        (nn.BatchNorm2d(8, track_running_stats=False), torch.randn(4, 8, 5, 5).contiguous(memory_format=LAST)),
        (nn.BatchNorm2d(8).double(), torch.randn(4, 8, 5, 5).double().contiguous(memory_format=LAST)),
        (BatchNormAct2d(8, act_layer=nn.ELU), torch.randn(4, 8, 5, 5).contiguous(memory_format=LAST)),
        (BatchNormAct2d(8, act_layer=nn.ReLU6), torch.randn(4, 8, 5, 5).contiguous(memory_format=LAST)),
        (nn.Conv2d(24, 24, 5, 2, 2, groups=24), torch.randn(4, 24, 9, 9)),
        (Conv2dSame(24, 24, 5, 2, groups=24), torch.randn(4, 24, 9, 8).contiguous(memory_format=LAST)),
        (nn.Conv2d(24, 48, 5, 2, 2, groups=24), torch.randn(4, 24, 9, 9)),
        (nn.Linear(64, 64), torch.randn(3, 64)),
        (nn.Linear(64, 64), torch.randn(3, 5, 7, 9, 64)),
        (nn.Linear(64, 64).double(), torch.randn(200, 64).double()),
    ],
)  # fmt: skip
def test_any_input_gives_what_torch_gives(layer, inputs):
    native = native_layers.use_native_kernels(copy.deepcopy(layer), training_only=True, kinds=KINDS)
    for _ in range(2):
        results = []
        for net in (native, layer):
            x = inputs.clone().requires_grad_()
            y = net(x)
            results.append([y, torch.autograd.grad(y.square().sum(), x)[0], *net.state_dict().values()])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_batch_norm_of_a_single_value_fails_as_torchs_does():
    norm = native_layers.use_native_kernels(nn.BatchNorm2d(8), training_only=True, kinds=KINDS)
    with pytest.raises(ValueError, match="more than 1 value"):
        norm(torch.randn(1, 8, 1, 1).contiguous(memory_format=LAST))


def test_student_uses_products_of_attention_in_training_only(monkeypatch):
    calls = []
    monkeypatch.setattr(attention, "attention", lambda *heads, **_: calls.append(1) or heads[2])
    net = timm.create_model("test_vit", num_classes=3, img_size=64)
    student = Classifier(net, Card("x", 64, 1.0, (0.5,) * 3, (0.5,) * 3))
    student.attention = attention.ProductAttention
    for training in (True, False):
        student.train(training)
        with torch.autocast("cpu", torch.bfloat16):
            student(torch.rand(2, 3, 64, 64))
        assert bool(calls) == training
        calls.clear()
