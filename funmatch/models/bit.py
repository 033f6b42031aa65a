"""BiT checkpoints as they were published: `.npz` files of two layouts become the state of timm's networks.

The older layout calls a kernel `resnet/block1/unit01/a/standardized_conv2d/kernel` (sometimes `standardized_conv2d_7`),
big_vision's own `block1/unit01/conv1/kernel`, often under `params/`. Both are read as the first, without `resnet/`.
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
from funmatch.models.classifier import OTHER_SIZES, PUBLISHED_EPS, TIMM_EPS
from funmatch.models.weights import Lazily

DEPTHS: dict[tuple[int, ...], int] = {(3, 4, 6, 3): 50, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152}
WIDTHS = {50: (1, 3), 101: (1, 3), 152: (2, 4)}
GROUPS = 32  # of GroupNorm
STEM = "root_block/standardized_conv2d/kernel"
HEAD = "head/kernel"
NOT_WEIGHTS = ("opt/", "extra/", "chrono/")  # what big_vision keeps beside `params/` to go on training

# big_vision's names for the parts, as the older layout has them.
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


def read_npz(path: Path) -> tuple[str, dict[str, Any], Lazily[Tensor]]:
    """Opens a published BiT checkpoint; arrays are read when they are asked for.

    Returns:
        its architecture, what that is built with, and the state for it (see `assemble`).

    Raises:
        InputError: it is no `.npz`, or of another network.
    """
    try:
        with open(path, "rb") as opened, zipfile.ZipFile(opened):
            pass  # numpy leaves a file open that is no zip
        file = np.load(path, allow_pickle=False)
        names = list(file.files)
    except FileNotFoundError:
        raise InputError(f"no weights file {path}") from None
    except Exception as error:  # a damaged zip fails in many ways
        raise InputError(f"{path} is no .npz file, or is damaged: {first_line(error)}") from error

    def read(name: str) -> np.ndarray:
        try:
            return file[name]
        except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, NotImplementedError) as error:
            raise InputError(f"{path}: {name} cannot be read: {first_line(error)}") from error

    architecture, size, state = assemble(Lazily(names, read), str(path))
    if architecture == OTHER_SIZES:  # a file that has lost a unit would look like this, too
        known = ", ".join(f"R{depth}x{width}" for depth, widths in WIDTHS.items() for width in widths)
        raise InputError(f"{path} holds a network of {size['units']} units in its blocks, wanted one of {known}")
    return architecture, size, state


def assemble(arrays: Mapping[str, np.ndarray], where: str) -> tuple[str, dict[str, Any], Lazily[Tensor]]:
    """Variables of a BiT network by their published names to the state dict of timm's.

    Args:
        arrays: by name, of either layout, under any prefix. Kernels are (height, width, in, out).
        where: they come from, for messages.

    Returns:
        timm's name of the network, such as `resnetv2_101x3_bit`, or `OTHER_SIZES`; what its constructor needs beside
        `num_classes`; and its state by timm's names: all that is there, so that what is missing or too much can be
        told.

    Raises:
        InputError: it is no BiT network.
    """
    names = canonical(list(arrays), where)
    units = tuple(len({name.split("/")[1] for name in names if name.startswith(f"block{i}/")}) for i in (1, 2, 3, 4))
    stem = arrays[names[STEM]].shape
    if len(stem) != 4 or 0 in units or stem[-1] % GROUPS:
        raise InputError(
            f"{where} holds a network of {units} units in its blocks and a stem of shape {stem}; wanted some in each "
            f"of four blocks, and channels in {GROUPS} groups"
        )
    keys = {timm_name(name): published for name, published in names.items()}
    state = Lazily(keys, lambda key: as_torch(key, arrays[keys[key]]))
    depth = DEPTHS.get(units)
    if depth and stem[-1] / 64 in WIDTHS[depth]:
        return f"resnetv2_{depth}x{stem[-1] // 64}_bit", {}, state
    return OTHER_SIZES, {"units": units, "width": stem[-1]}, state


def layout(units: tuple[int, ...], width: int, classes: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a BiT network's variables by name, in the order of definition.

    Args:
        units: in each of the four blocks.
        width: channels of the stem.
        classes: outputs of the head.
    """
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


def network(units: Sequence[int], width: int, num_classes: int) -> nn.Module:
    """A BiT network of any size.

    Args:
        units: in each of the four blocks.
        width: channels of the stem, in 32 groups; 64 in an R50x1.
        num_classes: that it answers.
    """
    return ResNetV2(
        layers=list(units),
        channels=tuple(4 * width << block for block in range(4)),
        stem_chs=width,
        num_classes=num_classes,
        stem_type="fixed",
        conv_layer=partial(StdConv2d, eps=TIMM_EPS),
    )


def canonical(names: list[str], where: str) -> dict[str, str]:
    """The older layout's name of each variable, without `resnet/`, to the name that it has.

    Raises:
        InputError: there is no BiT network, or two variables have the same name.
    """
    roots = [
        name for name in names if re.search(r"(^|/)root_block/(conv_root|standardized_conv2d(_\d+)?)/kernel$", name)
    ]
    roots = [name for name in roots if not name.startswith(NOT_WEIGHTS)]
    if len(roots) != 1:
        held = f"{', '.join(sorted(names)[:3])}, …" if names else "nothing"
        raise InputError(f"{where} holds no BiT network, whose first kernel is root_block/…/kernel; it holds {held}")
    prefix = roots[0][: roots[0].index("root_block/")]
    found: dict[str, str] = {}
    for name in names:
        if prefix.startswith("params/") and name.startswith(NOT_WEIGHTS):
            continue
        inner = name.removeprefix(prefix)
        for pattern, new in RENAMED:
            inner = re.sub(pattern, new, inner)
        if inner in found:
            raise InputError(f"{where}: {name} and {found[inner]} are the same variable; wanted each once")
        found[inner] = name
    return found


def timm_name(name: str) -> str:
    """timm's name of a canonical one; a name that is none of a BiT network's stays as it is."""
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


def as_torch(key: str, array: np.ndarray) -> Tensor:
    """An array as timm's tensor: kernels (height, width, in, out) to (out, in, height, width), others to one axis.

    Kernels are only seen in another order, not copied: a big network should not need room for a second one.
    """
    if array.dtype == "V2":  # numpy has no bfloat16, which is the upper half of a float
        array = (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if array.dtype.kind not in "fiu":
        raise InputError(f"{key} holds {array.dtype}, wanted numbers")
    if key == "head.fc.weight" and array.ndim == 2:
        array = array[None, None]
    array = array.transpose(3, 2, 0, 1) if array.ndim == 4 and key.endswith("weight") else array
    if ("norm" in key or key.endswith("bias")) and array.size == max(array.shape, default=0):
        array = array.reshape(-1)  # some have axes of one element around
    return torch.from_numpy(array.astype(np.float32, copy=not array.flags.writeable))


def with_published_eps(net: nn.Module) -> nn.Module:
    """Sets the weight standardisation's eps to the published one: timm's changes logits where kernels are small."""
    for conv in net.modules():
        if isinstance(conv, StdConv2d):
            conv.eps = PUBLISHED_EPS
    return net
