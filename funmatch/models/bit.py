"""Converts published BiT checkpoints, `.npz` files of two layouts, to the state dict of timm's networks.

The older layout calls a kernel `resnet/block1/unit01/a/standardized_conv2d/kernel` (sometimes `standardized_conv2d_7`),
big_vision's own `block1/unit01/conv1/kernel`, often under `params/`. The canonical names are the first, without
`resnet/`.

The layout also says which code trained the network, and so how its first max-pool is padded: TensorFlow's code pads
with zeros, as timm does, big_vision's with −∞. The weights fit both, and the logits differ by some percent.
"""

import re
import zipfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.layers.std_conv import StdConv2d
from timm.models.resnetv2 import ResNetV2
from torch import Tensor, nn

from funmatch.errors import InputError, first_line
from funmatch.models.checkpoints import signatures
from funmatch.models.weights import Lazily

# This path is written into the `config.json` of saved models, so `network` must stay in `funmatch.models.bit`.
OWN = "funmatch.models.bit:network"
"""Architecture of a BiT network that timm cannot build: of another size, or with another padding."""

STEM_TYPES = {"zeros": "fixed", "-inf": ""}
"""Paddings of the first max-pool, and the `stem_type` of timm's `ResNetV2` that has them."""
WRITERS = {"zeros": "TensorFlow's code", "-inf": "big_vision"}
"""Code that pads so."""
PADDING = "pool_padding"
"""Argument of `network` that chooses one of them; accepted for every `.npz` file."""

PUBLISHED_EPS, TIMM_EPS = 1e-10, 1e-8
"""eps of the weight standardisation in BiT networks: as published, and as timm builds them."""

DEPTHS: dict[tuple[int, ...], int] = {(3, 4, 6, 3): 50, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152}
WIDTHS = {50: (1, 3), 101: (1, 3), 152: (2, 4)}
GROUPS = 32  # of GroupNorm
STEM = "root_block/standardized_conv2d/kernel"
HEAD = "head/kernel"
# Training state beside the weights, as big_vision and flax save it: the optimizer's copies have the same names.
STATE = re.compile(r"(^|/)((opt|opt_state|optimizer/state|extra|chrono)/|step$)")

# big_vision's names and the canonical ones, applied in this order.
RENAMED = (
    (r"^root_block/conv_root/", "root_block/standardized_conv2d/"),
    (r"^norm-pre-head/scale$", "group_norm/gamma"),
    (r"^norm-pre-head/bias$", "group_norm/beta"),
    (r"/conv_proj/", "/a/proj/standardized_conv2d/"),
    (r"/gn1/", "/a/group_norm/"),
    (r"/gn2/", "/b/group_norm/"),
    (r"/gn3/", "/c/group_norm/"),
    (r"/conv1/", "/a/standardized_conv2d/"),
    (r"/conv2/", "/b/standardized_conv2d/"),
    (r"/conv3/", "/c/standardized_conv2d/"),
    (r"/group_norm/scale$", "/group_norm/gamma"),
    (r"/group_norm/bias$", "/group_norm/beta"),
    (r"(standardized_conv2d|group_norm)_\d+/", r"\1/"),
    (r"^head/(conv2d|dense)(_\d+)?/", "head/"),
)


def read_npz(path: Path) -> tuple[str, dict[str, Any], Lazily[Tensor], str]:
    """Opens a published BiT checkpoint; arrays are read on access.

    Returns:
        architecture, arguments of its constructor, its state (see `assemble`), and the padding of its first max-pool in
        the code that wrote such files, one of `STEM_TYPES`.

    Raises:
        InputError: it is not an `.npz` file, or of another network.
    """
    try:
        # Checked by ourselves first: numpy leaves the file open if it is not a zip.
        with open(path, "rb") as opened, zipfile.ZipFile(opened):
            pass
        file = np.load(path, allow_pickle=False)
        names = list(file.files)
    except FileNotFoundError:
        raise InputError(f"there is no weights file {path}") from None
    except Exception as error:  # a damaged zip fails in many ways
        if what := signatures.describe(path):
            raise InputError(f"{path} is not an .npz file, but {what}") from None
        raise InputError(f"{path} is not an .npz file, or is damaged: {first_line(error)}") from error

    def read(name: str) -> np.ndarray:
        try:
            array = file[name]
            if not isinstance(array, np.ndarray):
                raise ValueError("it is not an array")
            return array
        except Exception as error:  # numpy evaluates the header as Python, so damage there raises nearly anything
            raise InputError(f"{path}: {name} cannot be read: {first_line(error)}") from error

    architecture, size, state = assemble(Lazily(names, read), str(path))
    # Published files have known sizes only; any other size means that a unit is missing from the file.
    if architecture == OWN:
        known = ", ".join(f"R{depth}x{width}" for depth, widths in WIDTHS.items() for width in widths)
        raise InputError(f"{path} is a network with {size['units']} units in its blocks; expected one of {known}")
    by_big_vision = any("conv_root/" in name for name in names)
    return architecture, size, state, "-inf" if by_big_vision else "zeros"


def assemble(arrays: Mapping[str, np.ndarray], where: str) -> tuple[str, dict[str, Any], Lazily[Tensor]]:
    """Converts the variables of a BiT network to the state dict of timm's.

    Args:
        arrays: by published names, of either layout, under any prefix. Kernels are (height, width, in, out).
        where: source of the arrays, for messages.

    Returns:
        timm's name of the network, such as `resnetv2_101x3_bit`, or `OWN`; arguments of its constructor beside
        `num_classes`; and its state by timm's names, with all variables, so that missing and extra ones are noticed.

    Raises:
        InputError: it is not a BiT network.
    """
    names = canonical(list(arrays), where)
    units = tuple(len({name.split("/")[1] for name in names if name.startswith(f"block{i}/")}) for i in (1, 2, 3, 4))
    stem = arrays[names[STEM]].shape
    if len(stem) != 4 or 0 in units or stem[-1] % GROUPS:
        raise InputError(
            f"{where} is a network with {units} units in its blocks and a stem of shape {stem}; expected units in each "
            f"of four blocks, and channels in {GROUPS} groups"
        )
    keys = {timm_name(name): published for name, published in names.items()}
    state = Lazily(keys, lambda key: as_torch(key, arrays[keys[key]], where))
    depth = DEPTHS.get(units)
    if depth and stem[-1] / 64 in WIDTHS[depth]:
        return f"resnetv2_{depth}x{stem[-1] // 64}_bit", {}, state
    return OWN, {"units": units, "width": stem[-1]}, state


def layout(units: tuple[int, ...], width: int, classes: int) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a BiT network's variables by canonical name, in the order of definition.

    Args:
        units: in each of the four blocks.
        width: channels of the stem.
        classes: outputs of the head.
    """
    # The order matters: exports of Keras have no names, only this order (see `tensorflow.savedmodel`).
    shapes: dict[str, tuple[int, ...]] = {STEM: (7, 7, 3, width)}
    into = width
    for block, count in enumerate(units):
        middle = width << block
        for unit in range(1, count + 1):
            kernels = {"a": (1, 1, into, middle), "b": (3, 3, middle, middle), "c": (1, 1, middle, 4 * middle)}
            if unit == 1:
                kernels["a/proj"] = (1, 1, into, 4 * middle)
            for part, shape in kernels.items():
                place = f"block{block + 1}/unit{unit:02}/{part}"
                if part in ("a", "b", "c"):
                    shapes |= dict.fromkeys((f"{place}/group_norm/gamma", f"{place}/group_norm/beta"), shape[2:3])
                shapes[f"{place}/standardized_conv2d/kernel"] = shape
            into = 4 * middle
    shapes |= dict.fromkeys(("group_norm/gamma", "group_norm/beta"), (into,))
    return shapes | {"head/kernel": (into, classes), "head/bias": (classes,)}


def size_of(architecture: str) -> dict[str, Any]:
    """Returns the arguments with which `network` builds one of timm's BiT networks, e.g. `resnetv2_101x3_bit`."""
    depth, width = map(int, architecture.removeprefix("resnetv2_").removesuffix("_bit").split("x"))
    (units,) = (units for units, each in DEPTHS.items() if each == depth)
    return {"units": units, "width": 64 * width}


def network(
    units: Sequence[int], width: int, num_classes: int, pool_padding: str = "zeros", **options: Any
) -> nn.Module:
    """Builds a BiT network of any size, with either padding.

    Args:
        units: in each of the four blocks.
        width: channels of the stem, in 32 groups; 64 in an R50x1.
        num_classes: outputs of the head.
        pool_padding: of the first max-pool, `zeros` or `-inf`.
        options: further arguments of timm's `ResNetV2`, e.g. `drop_path_rate`.
    """
    # Saved models name this function as their architecture (`OWN`), so it must keep its name and arguments.
    return ResNetV2(
        layers=list(units),
        channels=tuple(4 * width << block for block in range(4)),
        stem_chs=width,
        num_classes=num_classes,
        stem_type=STEM_TYPES[pool_padding],
        conv_layer=partial(StdConv2d, eps=TIMM_EPS),
        **options,
    )


def canonical(names: list[str], where: str) -> dict[str, str]:
    """Maps the canonical name of each variable to the name that it has.

    Raises:
        InputError: there is no BiT network, or two variables have the same canonical name.
    """
    # The first kernel is found first: what stands before its name is the prefix of all variables.
    roots = [
        name for name in names if re.search(r"(^|/)root_block/(conv_root|standardized_conv2d(_\d+)?)/kernel$", name)
    ]
    roots = [name for name in roots if not STATE.search(name)]
    if len(roots) != 1:
        present = f"{', '.join(sorted(names)[:3])}, …" if names else "nothing"
        raise InputError(
            f"{where} has no BiT network, whose first kernel would be root_block/…/kernel; it has {present}"
        )
    prefix = roots[0][: roots[0].index("root_block/")]
    originals: dict[str, str] = {}
    for name in names:
        # The optimizer's state and counters: `fill` would refuse the file for holding more than the network.
        if STATE.search(name):
            continue
        inner = name.removeprefix(prefix)
        for pattern, new in RENAMED:
            inner = re.sub(pattern, new, inner)
        if inner in originals:
            raise InputError(f"{where}: {name} and {originals[inner]} are the same variable; expected each once")
        originals[inner] = name
    return originals


def timm_name(name: str) -> str:
    """Converts a canonical name to timm's; a name that no BiT network has stays as it is."""
    whole = {
        STEM: "stem.conv.weight",
        "group_norm/gamma": "norm.weight",
        "group_norm/beta": "norm.bias",
        HEAD: "head.fc.weight",
        "head/bias": "head.fc.bias",
    }
    parts = re.fullmatch(r"block([1-4])/unit(\d+)/(?:([abc])/(\w+)/(\w+)|a/proj/standardized_conv2d/(kernel))", name)
    if parts is None:
        return whole.get(name, name)
    block = f"stages.{int(parts[1]) - 1}.blocks.{int(parts[2]) - 1}"
    if parts[6]:
        return f"{block}.downsample.conv.weight"
    kinds = {
        ("group_norm", "gamma"): "norm{}.weight",
        ("group_norm", "beta"): "norm{}.bias",
        ("standardized_conv2d", "kernel"): "conv{}.weight",
    }
    kind = kinds.get((parts[4], parts[5]))
    return f"{block}.{kind.format('abc'.index(parts[3]) + 1)}" if kind else name


def as_torch(key: str, array: np.ndarray, where: str) -> Tensor:
    """Converts an array to timm's tensor: kernels (height, width, in, out) to (out, in, height, width), others to (n,).

    Kernels are views with another order of axes, not copies, so that a large network is not in memory twice.
    """
    # numpy has no bfloat16 and reads it as two opaque bytes: the upper half of a float32.
    if array.dtype == "V2":
        array = (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if array.dtype.kind not in "fiu":
        raise InputError(f"{where}: {key} has {array.dtype}, expected numbers")
    if key == "head.fc.weight" and array.ndim == 2:
        array = array[None, None]
    array = array.transpose(3, 2, 0, 1) if array.ndim == 4 and key.endswith("weight") else array
    if ("norm" in key or key.endswith("bias")) and array.size == max(array.shape, default=0):
        array = array.reshape(-1)  # some files have extra axes of one element
    # Copied only where torch would warn about read-only memory.
    # As an array again: numpy turns what has no axes into plain numbers on the way.
    return torch.from_numpy(np.asarray(array.astype(np.float32, copy=not np.asarray(array).flags.writeable)))


def with_published_eps(net: nn.Module) -> nn.Module:
    """Sets the eps of the weight standardisation to the published one, and returns the network."""
    # timm's eps of 1e-8 changes the logits where kernels are small.
    for conv in net.modules():
        if isinstance(conv, StdConv2d):
            conv.eps = PUBLISHED_EPS
    return net


@torch.no_grad()
def rescale_for_timm(net: nn.Module) -> None:
    """Scales standardised kernels so that they are the same function with timm's eps as with the published one.

    (c·w − c·μ) / √(c²·σ² + eps) is (w − μ) / √(σ² + eps / c²), so c² is the ratio of the two.
    """
    for conv in net.modules():
        # Only with the published eps, so that a network that is saved twice is scaled once.
        if isinstance(conv, StdConv2d) and conv.eps == PUBLISHED_EPS:
            conv.weight.mul_((TIMM_EPS / PUBLISHED_EPS) ** 0.5)
            conv.eps = TIMM_EPS
