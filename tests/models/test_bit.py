"""BiT checkpoints: both published layouts against a forward pass written out with torch's functions alone."""

import io
import math
import random
import re
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

from funmatch.commands.networks.import_model import import_model
from funmatch.config import Import
from funmatch.errors import InputError
from funmatch.models import bit
from funmatch.models.bit import PUBLISHED_EPS, TIMM_EPS, rescale_for_timm
from funmatch.models.inference.fold import bit_for_timm
from funmatch.models.load import load
from funmatch.models.origins.find import find_origin
from funmatch.models.save import save
from funmatch.models.weights import Lazily

CLASSES = 5
UNITS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def random_bit(depth: int, width: int, seed: int = 0, scale: float = 1.0) -> dict[str, np.ndarray]:
    """Random weights of a BiT network under the names of the first layout, without `resnet/`.

    Kernels have standard deviation `scale` / √fan-in: a small scale makes the eps of the standardisation matter.
    """
    rng = np.random.default_rng(seed)
    weights: dict[str, np.ndarray] = {}

    def conv(name: str, size: int, inner: int, outer: int) -> None:
        spread = scale / (size * size * inner) ** 0.5
        weights[f"{name}/kernel"] = rng.normal(0, spread, (size, size, inner, outer)).astype(np.float32)

    def norm(name: str, channels: int) -> None:
        weights[f"{name}/gamma"] = rng.uniform(0.5, 1.5, channels).astype(np.float32)
        weights[f"{name}/beta"] = rng.normal(0, 0.2, channels).astype(np.float32)

    conv("root_block/standardized_conv2d", 7, 3, 64 * width)
    inner = 64 * width
    for block, units in enumerate(UNITS[depth]):
        middle = 64 * width * 2**block
        for unit in range(units):
            name = f"block{block + 1}/unit{unit + 1:02}"
            if unit == 0:
                conv(f"{name}/a/proj/standardized_conv2d", 1, inner, 4 * middle)
            for part, size, a, b in (("a", 1, inner, middle), ("b", 3, middle, middle), ("c", 1, middle, 4 * middle)):
                norm(f"{name}/{part}/group_norm", a)
                conv(f"{name}/{part}/standardized_conv2d", size, a, b)
            inner = 4 * middle
    norm("group_norm", inner)
    weights["head/conv2d/kernel"] = rng.normal(0, 0.05, (1, 1, inner, CLASSES)).astype(np.float32)
    weights["head/conv2d/bias"] = rng.normal(0, 0.1, CLASSES).astype(np.float32)
    return weights


def as_first_layout(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"resnet/{name}": array for name, array in weights.items()}


def with_numbers(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The first layout with numbered names such as `standardized_conv2d_17`, as in some published files."""
    return {
        re.sub("standardized_conv2d/", f"standardized_conv2d_{i}/", f"resnet/{name}"): array
        for i, (name, array) in enumerate(weights.items())
    }


def as_second_layout(weights: dict[str, np.ndarray], prefix: str = "") -> dict[str, np.ndarray]:
    """The layout that big_vision writes: scales and biases of shape (1, 1, 1, channels), a head of two axes."""
    changed = {}
    for name, array in weights.items():
        name = name.replace("root_block/standardized_conv2d", "root_block/conv_root")
        name = name.replace("a/proj/standardized_conv2d", "conv_proj")
        for number, part in enumerate("abc", 1):
            name = name.replace(f"/{part}/standardized_conv2d", f"/conv{number}")
            name = name.replace(f"/{part}/group_norm/", f"/gn{number}/")
        name = re.sub("^group_norm/", "norm-pre-head/", name).replace("gamma", "scale").replace("beta", "bias")
        if "/gn" in name or "norm-pre-head" in name:
            array = array[None, None, None]
        if name.startswith("head"):
            name, array = name.replace("conv2d/", ""), array[0, 0] if array.ndim == 4 else array
        changed[prefix + name] = array
    return changed


def reference(weights: dict[str, np.ndarray], images: torch.Tensor, padding: float = 0.0) -> torch.Tensor:
    """Logits of [0, 1] images: the network as section 4 of its paper and its published code describe it.

    Its first max-pool is padded with zeros in TensorFlow's code, with −∞ in big_vision, whose layout is the second.
    """

    def conv(x, name, stride=1):
        kernel = torch.from_numpy(weights[f"{name}/kernel"].astype(np.float64))
        mean, variance = kernel.mean((0, 1, 2)), kernel.var((0, 1, 2), correction=0)
        kernel = ((kernel - mean) / (variance + 1e-10).sqrt()).float().permute(3, 2, 0, 1)
        return F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)

    def norm(x, name):
        gamma, beta = (torch.from_numpy(weights[f"{name}/{part}"]) for part in ("gamma", "beta"))
        return F.relu(F.group_norm(x, 32, gamma, beta, 1e-5))

    x = conv(images * 2 - 1, "root_block/standardized_conv2d", 2)
    x = F.max_pool2d(F.pad(x, (1, 1, 1, 1), value=padding), 3, 2)
    units = sorted({name.rsplit("/", 3)[0] for name in weights if "/c/" in name})
    for unit in units:
        ahead = norm(x, f"{unit}/a/group_norm")
        first = unit.endswith("unit01")
        stride = 2 if first and not unit.startswith("block1") else 1
        shortcut = conv(ahead, f"{unit}/a/proj/standardized_conv2d", stride) if first else x
        y = conv(ahead, f"{unit}/a/standardized_conv2d")
        y = conv(norm(y, f"{unit}/b/group_norm"), f"{unit}/b/standardized_conv2d", stride)
        x = conv(norm(y, f"{unit}/c/group_norm"), f"{unit}/c/standardized_conv2d") + shortcut
    features = norm(x, "group_norm").mean((2, 3))
    kernel, bias = (torch.from_numpy(weights[f"head/conv2d/{part}"]) for part in ("kernel", "bias"))
    return features @ kernel[0, 0] + bias


def images(side: int = 48) -> torch.Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def assert_same(model: torch.nn.Module, expected: torch.Tensor, side: int = 48) -> None:
    actual = model.eval()(images(side))
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.fixture(name="weights", scope="module")
def r50_weights() -> dict[str, np.ndarray]:
    return random_bit(50, 1)


@pytest.fixture(name="expected", scope="module")
def r50_logits(weights) -> dict[str, torch.Tensor]:
    """Logits by the padding of the first max-pool."""
    with torch.inference_mode():
        found = {"zeros": reference(weights, images()), "-inf": reference(weights, images(), -math.inf)}
    # Otherwise the tests below would pass with either.
    assert (found["zeros"] - found["-inf"]).abs().max() > 0.01 * found["zeros"].abs().max()
    return found


LAYOUTS = {
    "first": as_first_layout,
    "first with numbers": with_numbers,
    "second": as_second_layout,
    "second under params/": lambda weights: as_second_layout(weights, "params/") | {"opt/step": np.zeros(1)},
    "neither with a prefix": dict,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_layouts_give_the_published_logits(tmp_path, weights, expected, layout):
    path = tmp_path / "w.npz"
    np.savez(path, **LAYOUTS[layout](weights))
    model = load(str(path))
    assert (model.num_classes, model.card.mean, model.card.std) == (CLASSES, (0.5,) * 3, (0.5,) * 3)
    usual, other = ("-inf", "zeros") if "second" in layout else ("zeros", "-inf")
    assert_same(model, expected[usual])
    assert model.alternatives == (f"pool_padding={other}",)
    assert f"padded with {usual}, as by" in model.notes[0]


@pytest.mark.parametrize(
    "layout", [name if name in ("first", "second") else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS]
)
def test_either_padding_and_timms_name_can_be_asked_for(tmp_path, weights, expected, layout):
    path = tmp_path / "w.npz"
    np.savez(path, **LAYOUTS[layout](weights))
    usual, other = ("-inf", "zeros") if "second" in layout else ("zeros", "-inf")
    assert_same(load("resnetv2_50x1_bit", weights=path), expected[usual])
    asked = load(str(path), options=(f"pool_padding={other}",))
    assert_same(asked, expected[other])
    assert (asked.alternatives, asked.notes) == ((), ())


@pytest.mark.parametrize(
    ("prefix", "state"),
    [
        ("", ("opt/0/mu/{}", "opt/0/count", "extra/step")),
        ("params/", ("opt/0/mu/{}", "opt/0/nu/{}", "chrono/accum_train_time")),
        ("model/params/", ("model/opt_state/0/trace/{}", "model/step")),
        ("optimizer/target/", ("optimizer/state/param_states/{}/momentum", "optimizer/state/step")),
    ],
)
def test_training_state_beside_the_weights_is_left_out(prefix, state):
    names = ["root_block/conv_root/kernel", "block1/unit01/conv1/kernel", "head/bias"]
    beside = [each.format(name) for each in state for name in names]
    assert [*bit.canonical([prefix + each for each in names] + beside, "here").values()] == [
        prefix + each for each in names
    ]


def test_network_with_the_padding_of_big_vision_is_saved_and_loads_again(tmp_path, weights, expected, capsys):
    path, out = tmp_path / "w.npz", tmp_path / "out"
    np.savez(path, **as_second_layout(weights))
    import_model(Import(model=str(path), out=out))
    shown = capsys.readouterr().err
    assert "padded with -inf, as by big_vision, whose layout the file has" in shown
    assert (
        "timm has no network with this padding; only funmatch can load this folder (export --format timm folds it)"
        in shown
    )
    assert_same(load(str(out)), expected["-inf"])
    # Folded, it is a network that timm has.
    folded = bit_for_timm(load(str(out)))
    (tmp_path / "timm").mkdir()
    save(folded, tmp_path / "timm", card=folded.card, about={})
    with torch.inference_mode():
        found = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()(images() * 2 - 1)
    assert (found - expected["-inf"]).abs().max() <= 1e-4 * expected["-inf"].abs().max()
    # What is saved again, and what gets another head, keeps it.
    (tmp_path / "again").mkdir()
    model = load(str(out), classes=3)
    save(model, tmp_path / "again", card=model.card, about={})
    again = load(str(tmp_path / "again"))
    assert (again.num_classes, again.options["pool_padding"]) == (3, "-inf")
    kept = load(str(out))
    with torch.inference_mode():
        assert torch.equal(again.net.forward_features(images()), kept.net.forward_features(images()))


def test_padding_is_an_option_of_npz_files_alone(tmp_path, weights):
    np.savez(tmp_path / "w.npz", **weights)
    with pytest.raises(InputError, match="pool_padding is 'ones', expected zeros or -inf"):
        load(str(tmp_path / "w.npz"), options=("pool_padding=ones",))
    with pytest.raises(InputError, match=r"an option of BiT's \.npz files"):
        load("resnet18", options=("pool_padding=zeros",))


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "width"), [(50, 3), (101, 1), (101, 3), (152, 2), (152, 4)])
def test_all_published_sizes_give_the_published_logits(tmp_path, depth, width):
    weights = random_bit(depth, width)
    with torch.inference_mode():
        expected = {padding: reference(weights, images(32), float(padding)) for padding in ("0", "-inf")}
    np.savez(tmp_path / "w.npz", **as_second_layout(weights))
    assert_same(load(str(tmp_path / "w.npz")), expected["-inf"], 32)
    model = load(str(tmp_path / "w.npz"), options=("pool_padding=zeros",))
    assert model.net.pretrained_cfg["architecture"] == f"resnetv2_{depth}x{width}_bit"
    assert_same(model, expected["0"], 32)


@pytest.mark.slow
def test_small_kernels_need_the_published_eps(tmp_path):
    """With kernels this small, timm's eps gives other logits; weights saved for timm are rescaled to give the same."""
    weights = random_bit(50, 1, scale=2e-3)
    with torch.inference_mode():
        expected = reference(weights, images())
    np.savez(tmp_path / "w.npz", **as_first_layout(weights))
    model = load(str(tmp_path / "w.npz"))
    assert_same(model, expected)
    with_timm = load(str(tmp_path / "w.npz"))
    for module in with_timm.modules():
        if hasattr(module, "eps") and hasattr(module, "kernel_size"):
            module.eps = TIMM_EPS
    with pytest.raises(AssertionError):
        assert_same(with_timm, expected)
    rescale_for_timm(model.net)
    assert_same(model, expected)
    (tmp_path / "out").mkdir()
    save(load(str(tmp_path / "w.npz")), tmp_path / "out", card=model.card, about={})
    assert_same(load(str(tmp_path / "out")), expected)
    with_timm_alone = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    with torch.inference_mode():
        torch.testing.assert_close(with_timm_alone(images() * 2 - 1), expected, rtol=1e-3, atol=1e-4)


def test_new_class_count_keeps_the_body_and_zeroes_the_head(tmp_path, weights):
    np.savez(tmp_path / "w.npz", **as_second_layout(weights))
    model = load(str(tmp_path / "w.npz"), classes=37)
    assert model.count_parameters() == 23_576_165
    assert not model(images()).any()
    kernel = torch.from_numpy(weights["root_block/standardized_conv2d/kernel"]).permute(3, 2, 0, 1)
    assert torch.equal(model.net.stem.conv.weight, kernel)


def changed(weights: dict[str, np.ndarray], **changes) -> dict[str, np.ndarray]:
    return {name: array for name, array in {**weights, **changes}.items() if array is not None}


BAD = {
    "one is missing": ({"block2/unit03/b/group_norm/beta": None}, "stages.1.blocks.2.norm2.bias is missing"),
    "one is too much": ({"block2/unit03/b/moving": np.zeros(3)}, "block2/unit03/b/moving is not of this model"),
    "one has another shape": ({"group_norm/gamma": np.zeros(7, np.float32)}, r"norm.weight has shape \(7,\)"),
    "one is not finite": (
        {"head/conv2d/bias": np.full(5, np.nan, np.float32)},
        "head.fc.bias has values that are not",
    ),
    "it has no head": ({"head/conv2d/bias": None, "head/conv2d/kernel": None}, "no head/bias"),
    "a unit is missing": (
        {name: None for name in random_bit(50, 1) if name.startswith("block4/unit03")},
        "units in its blocks; expected one of R50x1",
    ),
    "one is twice": (
        {"root_block/standardized_conv2d_3/bias": np.zeros(1), "root_block/standardized_conv2d/bias": np.zeros(1)},
        "the same variable",
    ),
    "one is an object": ({"group_norm/beta": np.array([{}], object)}, "cannot be read"),
    "one is text": ({"group_norm/beta": np.array(["a"] * 2048)}, "expected numbers"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_variables_are_rejected(tmp_path, weights, case):
    changes, message = BAD[case]
    np.savez(tmp_path / "w.npz", **changed(weights, **changes))
    with pytest.raises(InputError, match=message):
        load(str(tmp_path / "w.npz"))


def test_checkpoint_of_another_architecture_is_rejected(tmp_path, weights):
    np.savez(tmp_path / "w.npz", **weights)
    with pytest.raises(InputError, match="weights of resnetv2_50x1_bit, not of resnetv2_101x1_bit"):
        load("resnetv2_101x1_bit", weights=tmp_path / "w.npz")
    np.savez(tmp_path / "vit.npz", **{"embedding/kernel": np.zeros(3)})
    with pytest.raises(InputError, match="has no BiT network"):
        load(str(tmp_path / "vit.npz"))


def test_files_that_are_not_npz_are_rejected(tmp_path, weights):
    path = tmp_path / "w.npz"
    with pytest.raises(InputError, match="no weights file"):
        load(str(path))
    path.write_bytes(b"not a zip")
    with pytest.raises(InputError, match=r"not an \.npz file"):
        load(str(path))
    np.savez(path, **weights)
    path.write_bytes(path.read_bytes()[:5_000_000])
    with pytest.raises(InputError, match=r"not an \.npz file"):
        load(str(path))


def test_flipped_byte_is_rejected(tmp_path, weights):
    path = tmp_path / "w.npz"
    np.savez(path, **weights)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="cannot be read"):
        load(str(path))


HEADERS = [
    "{'descr': '<f4', 'fortran_order': False, 'shape': (8,",
    "{'descr': '|O', 'fortran_order': False, 'shape': (8,), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (10000000000000,), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (), }",
    "{'descr': '|V2', 'fortran_order': False, 'shape': (), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (0,), }",
    "{'descr': '<U9', 'fortran_order': False, 'shape': (8,), }",
    "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (8,), }",
    "[" * 5000,
    *("no array", ""),
]
"""Headers of arrays that no BiT network has; the last two stand for members that are no arrays."""


def with_header(header: str) -> bytes:
    """Returns a `.npy` file of 64 zero bytes of content."""
    if header in ("no array", ""):
        return header.encode()
    return np.lib.format.magic(1, 0) + struct.pack("<H", len(header) + 1) + header.encode() + b"\n" + bytes(64)


def read_all(path: Path) -> None:
    origin = find_origin(str(path), {}, weights=None, side=None, inputs=None)
    assert origin
    assert isinstance(origin.weights, Lazily)
    for name in origin.weights:
        assert isinstance(origin.weights[name], torch.Tensor)


def test_damaged_arrays_in_a_file_are_one_message(tmp_path):
    # Arrays that are read to find out what the file holds are whole; the others have one number.
    shapes, needed = bit.layout((3, 4, 6, 3), 64, 8), (bit.STEM, "head/bias", "group_norm/gamma")
    members = {}
    for name, shape in shapes.items():
        file = io.BytesIO()
        np.save(file, np.zeros(shape if name in needed else 1, np.float32))
        members[name] = file.getvalue()
    path = tmp_path / "w.npz"

    def attempt(damaged: str, content: bytes) -> str:
        with zipfile.ZipFile(path, "w") as archive:
            for name, whole in members.items():
                archive.writestr(f"{name}.npy", content if name == damaged else whole)
        try:
            read_all(path)
        except InputError as error:
            return str(error)
        return ""

    assert not attempt("", b"")
    for header in HEADERS:
        assert str(path) in attempt("head/bias", with_header(header)), header
        assert str(path) in attempt(bit.STEM, with_header(header)), header
    refused = 0
    for seed in range(150):
        rng = random.Random(seed)
        name = rng.choice(needed)
        content = bytearray(members[name])
        for _ in range(rng.randint(1, 3)):
            content[rng.randrange(128)] = rng.randrange(256)
        message = attempt(name, bytes(content))
        assert not message or str(path) in message
        refused += bool(message)
    assert refused > 100


def test_timms_bit_weights_get_the_published_eps(monkeypatch):
    from funmatch.models import timm_models

    def without_network(architecture, kwargs, *, pretrained=False):
        assert pretrained
        return timm.create_model(architecture, **kwargs)

    monkeypatch.setattr(timm_models, "create", without_network)
    assert load("resnetv2_50x1_bit.goog_in21k").net.stem.conv.eps == PUBLISHED_EPS
    assert load("resnetv2_50x1_bit", pretrained=True).net.stem.conv.eps == PUBLISHED_EPS
    monkeypatch.undo()
    assert load("resnetv2_50x1_bit").net.stem.conv.eps == TIMM_EPS
