"""Native CPU kernels against torch, in double precision where rounding could hide a fault."""

import copy
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from kernel_checks import assert_threads_change_no_bit, build_quickly, errors, gradients
from timm.layers import GroupNormAct
from timm.layers.std_conv import StdConv2d, StdConv2dSame
from torch import nn

from funmatch.models.classifier import Classifier
from funmatch.models.inference.frozen import Frozen, freeze
from funmatch.models.inference.modes import AllowedModes, InferenceMode
from funmatch.models.inference.native import layers as native_layers
from funmatch.models.load import load
from funmatch.ops import resample
from funmatch.ops.crops import crop_resize_flip
from funmatch.ops.native import batch_norms, build, depthwise, library, norms, rows

pytestmark = pytest.mark.skipif(build.find_compiler() is None, reason="there is no C++ compiler here")
LAST = torch.channels_last


@pytest.fixture(autouse=True)
def clear_kernel_caches():
    """Forget kernels that another test loaded from its own cache folder."""
    clear_caches()
    yield
    clear_caches()


def clear_caches() -> None:
    modules = (norms, batch_norms, depthwise, rows, resample)
    for cached in (library._load, *(module.why_unavailable for module in modules)):
        cached.cache_clear()


def native_classes(*kinds: str) -> set[type[nn.Module]]:
    return {native for kind in kinds for native in native_layers.NATIVE_CLASSES[kind].values()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(
    ("n", "channels", "groups", "height", "width", "offset"),
    [
        (4, 64, 32, 7, 9, 0.0), (3, 8, 1, 5, 5, 0.0), (2, 6, 6, 4, 3, 0.0), (5, 33, 3, 1, 1, 0.0),
        (2, 256, 32, 32, 32, 0.0), (4, 16, 4, 12, 12, 1000.0),
    ],
)  # fmt: skip
def test_group_norm_and_its_gradients_equal_torchs(dtype, relu, n, channels, groups, height, width, offset):
    random = torch.Generator().manual_seed(n + channels)

    def randn(*shape):
        return torch.randn(*shape, generator=random)

    x = (randn(n, channels, height, width) + offset).to(dtype).contiguous(memory_format=LAST)
    upstream = randn(n, channels, height, width).to(dtype).contiguous(memory_format=LAST)
    weight, bias = randn(channels), randn(channels)

    def forward_backward(norm, precision):
        leaves = [tensor.clone().to(precision or tensor.dtype).requires_grad_() for tensor in (x, weight, bias)]
        y = norm(*leaves)
        return [y, *torch.autograd.grad(y, leaves, upstream.to(y.dtype))]

    def plain(x, weight, bias):
        y = F.group_norm(x, groups, weight, bias, 1e-5)
        return y.relu() if relu else y

    truth = forward_backward(plain, torch.float64)
    ours = forward_backward(lambda x, w, b: norms.group_norm(x, w, b, groups, 1e-5, relu=relu), None)
    theirs = forward_backward(plain, None)
    assert ours[0].is_contiguous(memory_format=LAST)
    assert ours[1].dtype == dtype
    assert ours[2].dtype == torch.float32
    # Near the ReLU's edge, rounding decides whether a value passes, so errors are compared with torch's own.
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]
    for error, torchs_error in zip(errors(ours, truth), errors(theirs, truth), strict=True):
        assert error <= max(tolerance, 1.5 * torchs_error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8, 3, 7, 7), (5, 16, 1, 1), (64, 64, 3, 3), (2, 1, 3, 1)])
@pytest.mark.parametrize("layout", [LAST, torch.contiguous_format])
def test_standardised_weights_and_their_gradients_equal_torchs(dtype, shape, layout):
    random = torch.Generator().manual_seed(sum(shape))
    weight = (0.1 * torch.randn(shape, generator=random) + 0.05).contiguous(memory_format=layout).requires_grad_()
    upstream = torch.randn(shape, generator=random).to(dtype)  # its memory layout differs from the weight's
    exact = weight.detach().double().requires_grad_()
    rows = F.batch_norm(exact.reshape(1, shape[0], -1), None, None, training=True, eps=1e-8).reshape(shape)
    truth = [rows, *torch.autograd.grad(rows, exact, upstream.double())]
    standardized = norms.standardize_weight(weight, 1e-8, dtype)
    assert standardized.dtype == dtype
    assert standardized.stride() == weight.stride()
    found = [standardized, *torch.autograd.grad(standardized, weight, upstream)]
    assert found[1].dtype == torch.float32
    assert max(errors(found[1:], truth[1:])) < 1e-4
    assert errors(found[:1], truth[:1])[0] < {torch.float32: 1e-5, torch.bfloat16: 5e-3}[dtype]


def test_nan_spreads_to_its_group_only():
    x = torch.randn(2, 4, 3, 3).contiguous(memory_format=LAST)
    x[0, 1, 1, 1] = float("nan")
    for dtype in norms.DTYPES:
        y = norms.group_norm(x.to(dtype), torch.ones(4), torch.zeros(4), 2, 1e-5, relu=True)
        assert y[0, :2].isnan().all(), "the whole group"
        assert y[0, 2:].isfinite().all()
        assert y[1].isfinite().all()


@pytest.mark.parametrize("threads", [1, 3])
def test_thread_count_changes_no_bit(threads):
    x = torch.randn(6, 32, 8, 8).contiguous(memory_format=LAST).requires_grad_()
    weight, bias = torch.randn(32, requires_grad=True), torch.randn(32, requires_grad=True)

    def forward_backward():
        y = norms.group_norm(x, weight, bias, 8, 1e-5)
        return [y, *torch.autograd.grad(y.square().sum(), (x, weight, bias))]

    assert_threads_change_no_bit(forward_backward, threads)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("resnetv2_50x1_bit", marks=pytest.mark.slow),
        "resnetv2_50d_gn",
        pytest.param("vit_small_r26_s32_224", marks=pytest.mark.slow),
        pytest.param("poolformer_s12", marks=pytest.mark.slow),
        "test_resnet",
    ],
)
def test_network_with_native_kernels_computes_the_same_function(name):
    kwargs = {"img_size": 64} if name.startswith("vit") else {}
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=5, drop_path_rate=0.0, **kwargs).train()
    nn.init.normal_(plain.get_classifier().weight, std=0.1)
    plain.to(memory_format=LAST)
    native = native_layers.use_native_kernels(copy.deepcopy(plain), training_only=True)
    views = torch.rand(4, 3, 64, 64).contiguous(memory_format=LAST)
    exact = copy.deepcopy(plain).double()
    truth, exact_gradients = gradients(exact, views.double())
    (logits, found), (theirs, plain_gradients) = gradients(native, views), gradients(plain, views)
    scale = truth.abs().max()
    assert (logits - truth).abs().max() <= max(1e-4 * scale, 2 * (theirs - truth).abs().max())
    size = sum(float(gradient.square().sum()) for gradient in exact_gradients.values()) ** 0.5

    def relative_error(other):
        return sum(float((other[key] - exact_gradients[key]).square().sum()) for key in exact_gradients) ** 0.5 / size

    assert relative_error(found) <= max(1e-4, 2 * relative_error(plain_gradients))
    assert native.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(native.eval()(views), plain.eval()(views)), (
        "evaluation uses torch's layers, as anyone who loads the student does"
    )
    replaced = any(type(module) in native_classes(*native_layers.FROZEN_KINDS) for module in native.modules())
    assert replaced == (name != "test_resnet") == bool({*native_layers.kinds_of(plain)} & {*native_layers.FROZEN_KINDS})


@pytest.mark.parametrize(
    "norm", [nn.GroupNorm(4, 8), GroupNormAct(8, 4, act_layer=nn.SiLU), GroupNormAct(8, 4, affine=False)]
)
def test_unsupported_inputs_fall_back_to_torch(norm):
    native = native_layers.use_native_kernels(copy.deepcopy(norm), training_only=False)
    for x in (
        torch.randn(4, 8, 5, 5),  # channels first
        torch.randn(4, 8, 5),
        torch.randn(4, 8, 5, 5).contiguous(memory_format=LAST),
        torch.randn(4, 8, 5, 5, dtype=torch.float64).contiguous(memory_format=LAST),
    ):
        layers = (module.to(x.dtype) for module in (native, norm))
        torch.testing.assert_close(*(layer(x.clone()) for layer in layers), rtol=1e-4, atol=1e-5)


def test_native_convolutions_follow_autocast_and_padding():
    x = torch.rand(4, 3, 15, 15).contiguous(memory_format=LAST)
    for conv in (StdConv2d(3, 8, 3, stride=2), StdConv2dSame(3, 8, 3, stride=2)):
        native = native_layers.use_native_kernels(copy.deepcopy(conv), training_only=True)
        assert torch.allclose(native(x), conv(x), atol=1e-5)
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype):
                assert native(x).dtype == dtype
                assert torch.allclose(native(x), conv(x), atol=2e-2)


def test_native_kernels_work_with_freezing_and_gradient_checkpointing():
    net = native_layers.use_native_kernels(
        timm.create_model("resnetv2_50x1_bit", num_classes=3).to(memory_format=LAST).train(), training_only=True
    )
    nn.init.normal_(net.get_classifier().weight, std=0.1)
    views = torch.rand(2, 3, 32, 32).contiguous(memory_format=LAST)
    _, stored = gradients(net, views)
    net.set_grad_checkpointing()
    _, checkpointed = gradients(net, views)
    assert all(torch.equal(stored[name], checkpointed[name]) for name in stored)
    net.stem.requires_grad_(False)
    net.stages[0].requires_grad_(False)
    net.zero_grad()
    net(views).sum().backward()
    assert net.stages[0].blocks[0].norm1.weight.grad is None
    assert net.stages[1].blocks[0].norm1.weight.grad is not None


def test_frozen_teacher_with_native_kernels_gives_equal_logits():
    def build() -> Classifier:
        torch.manual_seed(0)
        classifier = load("resnetv2_50x1_bit", classes=10)
        nn.init.normal_(classifier.net.get_classifier().weight, std=0.1)
        return classifier

    views = torch.rand(8, 3, 64, 64)
    frozen, checks = freeze(build, views, AllowedModes(("bf16", "fp32"), native=True))
    assert frozen.mode.native
    assert checks[-1].good
    assert "native kernels" in str(frozen.mode)
    assert all(norm.weight.dtype == torch.float32 for norm in native_layers.native_group_norms(frozen.classifier.net))
    plain = Frozen(build())(views)
    exact = Frozen(build(), InferenceMode(native=True))(views)
    assert (exact - plain).abs().max() < 1e-4 * plain.abs().max()


def test_without_a_compiler_torch_is_used(tmp_path, monkeypatch):
    image = torch.randint(0, 256, (70, 90, 3), dtype=torch.uint8)
    box, flip = np.array([[3, 5, 60, 70]]), np.array([True])
    views = crop_resize_flip([image], box, flip, 32)
    monkeypatch.setenv("FUNMATCH_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    clear_caches()
    assert build.find_compiler() is None
    for reason in (library.why_unavailable(), norms.why_unavailable(), resample.why_unavailable()):
        assert "no C++ compiler" in reason
    torch.testing.assert_close(crop_resize_flip([image], box, flip, 32), views, atol=1e-5, rtol=0)
    student = native_layers.use_native_kernels(load("resnetv2_50x1_bit", classes=10).net, training_only=False)
    frozen = Frozen(load("resnetv2_50x1_bit", classes=10), InferenceMode(native=True))
    assert not any(
        type(norm) in native_classes("group_norm") for norm in native_layers.native_group_norms(frozen.classifier.net)
    )
    assert native_layers.kinds_of(load("resnetv2_50x1_bit", classes=10).net) == ("group_norm", "std_conv")
    assert not native_layers.kinds_of(student), "it has native layers already"


def test_kernel_check_ignores_torchs_default_dtype():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert norms.why_unavailable() == ""
        assert resample.why_unavailable() == ""
    finally:
        torch.set_default_dtype(before)


def use_copy_of_kernels(cache: Path, monkeypatch) -> Path:
    """Uses another cache, with the kernels that the session has built; returns their file."""
    built = build.build()
    shutil.copytree(built.parent, cache / "kernels")
    monkeypatch.setenv("FUNMATCH_CACHE", str(cache))
    return cache / "kernels" / built.name


@pytest.mark.slow
def test_damaged_library_is_rebuilt(tmp_path, monkeypatch):
    built = use_copy_of_kernels(tmp_path, monkeypatch)
    assert build.build() == built
    content = built.read_bytes()
    built.write_bytes(content[:100])
    assert library.why_unavailable() == ""
    assert built.stat().st_size == len(content)


def test_boxes_beyond_their_image_are_rejected():
    image = torch.full((100, 100, 3), 200, dtype=torch.uint8)
    for box in ([90, 0, 40, 100], [10, 10, 5, 0], [-1, 0, 20, 20]):
        with pytest.raises(ValueError, match="a box is empty, or lies beyond its image"):
            crop_resize_flip([image], np.array([box]), np.array([False]), 8)


def test_outlier_costs_group_norm_no_precision():
    x = torch.randn(2, 8, 240, 240, generator=torch.Generator().manual_seed(0))
    x[:, :, 0, 0] = 10
    x = x.contiguous(memory_format=LAST)
    weight, bias = torch.ones(8), torch.zeros(8)
    truth = F.group_norm(x.double(), 4, weight.double(), bias.double(), 1e-5)
    theirs = (F.group_norm(x, 4, weight, bias, 1e-5) - truth).abs().max()
    assert (norms.group_norm(x, weight, bias, 4, 1e-5) - truth).abs().max() <= max(1.5 * theirs, 2e-5)


def test_failing_compilers_are_reported(tmp_path, monkeypatch):
    monkeypatch.setenv("FUNMATCH_CACHE", str(tmp_path / "cache"))
    failing = tmp_path / "failing"
    failing.write_text("#!/bin/sh\necho 'no such instruction' >&2; exit 1\n")
    failing.chmod(failing.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(failing))
    assert library.why_unavailable() == f"{failing} cannot compile the kernels: no such instruction"
    assert not list((tmp_path / "cache").rglob("*.so"))


def miscompile(tmp_path: Path, monkeypatch, source: str, line: str, fault: str) -> None:
    """Builds the kernels, in a cache of their own, from sources in one of which a line is replaced by a fault."""
    build_quickly(monkeypatch)
    monkeypatch.setenv("FUNMATCH_CACHE", str(tmp_path / "cache"))
    for path in (*build.SOURCES, *build.HEADERS):
        text = path.read_text()
        if path.name == source:
            assert line in text
            text = text.replace(line, fault)
        (tmp_path / path.name).write_text(text)
    monkeypatch.setattr(build, "SOURCES", tuple(tmp_path / path.name for path in build.SOURCES))


@pytest.mark.parametrize(
    ("source", "line", "fault"),
    [
        ("norms.cpp", "value * value", "value"),
        pytest.param("views.cpp", "* down;", "* 2;", marks=pytest.mark.slow),
        pytest.param("views.cpp", "1.5 * d - 2.5", "1.5 * d - 2", marks=pytest.mark.slow),
        pytest.param("views.cpp", "red += weight[t]", "red += 1.1f * weight[t]", marks=pytest.mark.slow),
        pytest.param("batch_norms.cpp", "sigmoid * (1 + x", "sigmoid * (2 + x", marks=pytest.mark.slow),
        pytest.param("depthwise.cpp", "back = 0; j < own.last", "back = 1; j < own.last", marks=pytest.mark.slow),
        pytest.param("rows.cpp", "1 / sum.total()", "2 / sum.total()", marks=pytest.mark.slow),
        pytest.param("rows.cpp", "of_bias += sums", "of_bias -= sums", marks=pytest.mark.slow),
        pytest.param("rows.cpp", "total += sums", "total -= sums", marks=pytest.mark.slow),
    ],
)
def test_miscompiled_kernels_are_reported_and_leave_the_others_alone(tmp_path, monkeypatch, source, line, fault):
    miscompile(tmp_path, monkeypatch, source, line, fault)
    checks = {
        "norms.cpp": norms.why_unavailable, "views.cpp": resample.why_unavailable,
        "batch_norms.cpp": batch_norms.why_unavailable, "depthwise.cpp": depthwise.why_unavailable,
        "rows.cpp": rows.why_unavailable,
    }  # fmt: skip
    # The gradient of a depthwise convolution's bias is a sum of columns.
    broken = {source, "depthwise.cpp"} if source == "rows.cpp" else {source}
    assert {name for name, why_unavailable in checks.items() if "wrong values" in why_unavailable()} == broken


def test_compiler_is_asked_for_its_version_once(tmp_path, monkeypatch):
    monkeypatch.setenv("FUNMATCH_CACHE", str(tmp_path / "cache"))
    compiler, asked = tmp_path / "c++", tmp_path / "asked"
    compiler.write_text(f"#!/bin/sh\necho x >> {asked}\necho 'c++ 1.0'\n")
    compiler.chmod(0o755)
    versions = [build._version_of(str(compiler)) for _ in range(2)]
    assert versions == [b"c++ 1.0\n"] * 2
    assert asked.read_text() == "x\n"
    compiler.write_text(f"#!/bin/sh\necho x >> {asked}\necho 'c++ 2.0, newer'\n")
    assert build._version_of(str(compiler)) == b"c++ 2.0, newer\n", "another file under the same path"


def test_library_is_built_once(tmp_path, monkeypatch):
    build_quickly(monkeypatch)
    monkeypatch.setenv("FUNMATCH_CACHE", str(tmp_path))
    assert library.why_unavailable() == ""
    (built,) = Path(tmp_path, "kernels").glob("*.so")
    before = os.stat(built).st_mtime_ns
    clear_caches()
    assert library.why_unavailable() == ""
    assert os.stat(built).st_mtime_ns == before


def test_a_library_that_is_damaged_or_that_others_can_write_is_not_loaded(tmp_path, monkeypatch):
    build_quickly(monkeypatch)
    monkeypatch.setenv("FUNMATCH_CACHE", str(tmp_path / "cache"))
    built = build.build()
    assert library.why_unavailable() == ""
    whole = built.read_bytes()
    copy_of = tmp_path / "cache" / "kernels" / "copy.so"
    copy_of.write_bytes(whole)
    copy_of.chmod(0o644)
    build._digest_of(copy_of).write_text(build._digest_of(built).read_text())
    assert build._is_intact(copy_of)
    for seed in range(100):
        damaged = bytearray(whole)
        bit = random.Random(seed).randrange(8 * len(whole))
        damaged[bit // 8] ^= 1 << bit % 8
        copy_of.write_bytes(damaged)
        assert not build._is_intact(copy_of), bit
    copy_of.write_bytes(whole)
    for mode in (0o664, 0o646):
        copy_of.chmod(mode)
        assert not build._is_intact(copy_of)
    # A new file: this process has the other one mapped.
    built.unlink()
    built.write_bytes(bytes(damaged))
    clear_caches()
    assert library.why_unavailable() == ""
    assert built.read_bytes() != bytes(damaged)
    assert build._is_intact(built)


def test_kernels_lie_elsewhere_if_the_cache_is_of_somebody_else(tmp_path, monkeypatch):
    monkeypatch.setenv("FUNMATCH_CACHE", str(tmp_path / "shared"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    shared = tmp_path / "shared" / "kernels"
    shared.mkdir(parents=True, mode=0o777)
    shared.chmod(0o777)
    assert build._folder() == shared
    assert stat.S_IMODE(shared.stat().st_mode) == 0o755, "one of this user's is closed to others"
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    if shared.stat().st_uid != 0:
        assert build._folder() == tmp_path / "own" / "funmatch" / "kernels"
    monkeypatch.setattr(build, "_is_ours", lambda _: False)
    assert build._folder() == tmp_path / "own" / "funmatch" / "kernels"


COMPILE = """
import os, signal, threading, time
from funmatch.ops.native import build
build.FLAGS = tuple("-O0" if each == "-O3" else each for each in build.FLAGS)
def kill():
    while not any(build._folder().glob(".compiling.*.partial/*")):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
threading.Thread(target=kill).start()
build.build()
"""


def test_what_a_kill_leaves_of_a_compilation_is_cleared_by_the_next(tmp_path, monkeypatch):
    build_quickly(monkeypatch)
    monkeypatch.setenv("FUNMATCH_CACHE", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", COMPILE], check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert len([*Path(tmp_path, "kernels").glob(".compiling.*.partial")]) == 1
    built = build.build()
    assert {*built.parent.iterdir()} == {built, build._digest_of(built)}
