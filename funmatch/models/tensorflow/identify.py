"""Identifies the variables of a BiT network by their names and shapes, in any file of TensorFlow or Keras."""

import re
from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np

from funmatch.errors import InputError
from funmatch.models.bit import PUBLISHED_EPS, STEM, layout

BODY = re.compile(
    rf"{STEM}|(block[1-4]/unit\d\d/[abc]/)?group_norm/(gamma|beta)"
    r"|block[1-4]/unit\d\d/([abc]|a/proj)/standardized_conv2d/kernel"
)
NUMBERED = r"(standardized_conv2d|group_norm)_\d+/"
PLACES = {"gamma": "group_norm/gamma", "beta": "group_norm/beta", "kernel": "standardized_conv2d/kernel"}
SAVE_AGAIN = "in TensorFlow, load the model and save that network alone with tf.saved_model.save(network, folder)"
OWN_FUNCTION = (
    "write a function that returns it as a torch.nn.Module, by Keras on PyTorch or from ONNX (docs/models.md, "
    '"Other networks of Keras"), and pass package.module:function'
)
UNIT = {"_unit_a": "a", "_unit_a_conv": "a", "_unit_b": "b", "_unit_c": "c", "_proj": "a/proj"}
"""Attributes of the units of `bit_tf2.models.ResnetV2`, with the names of their variables."""

START = r"(?:^|/)"
OTHERS = (
    (rf"{START}conv2_block1_preact_bn", "ResNetV2"),
    (rf"{START}conv2_block1_0_relu|{START}pool2_bn", "a DenseNet"),
    (rf"{START}conv2_block1_1_conv", "ResNet"),
    (rf"{START}expanded_conv_\d+_squeeze_excite|{START}expanded_conv_squeeze_excite", "a MobileNetV3"),
    (rf"{START}expanded_conv_depthwise", "a MobileNetV2"),
    (rf"{START}conv_dw_1", "a MobileNet"),
    (rf"{START}block\da_dwconv2", "an EfficientNetV2"),
    (rf"{START}block1a_dwconv", "an EfficientNet"),
    (rf"{START}convnext_\w*stage_", "a ConvNeXt"),
    (rf"{START}block2_sepconv1", "an Xception"),
    (rf"{START}conv_7b_bn", "an InceptionResNetV2"),
    (rf"{START}(normal|reduction)_(conv_1|bn_1|left1|add_1)_", "a NASNet"),
    (rf"{START}block1_conv1", "a VGG"),
    (rf"{START}regnet[xy]\w*_stem", "a RegNet"),
    (rf"{START}batch_normalization_93", "an InceptionV3"),
)
"""Layers that the networks of Keras Applications have, the first pattern that is found, and the network."""

JOINED = re.compile(
    r"(?<![a-z0-9])(root_block|block[1-4]|unit\d\d|[abc]|proj|head)_"
    r"(?=unit\d\d|[abc]_(?:proj_)?(?:standardized|group)|proj_stand|standardized_conv2d|group_norm|dense)"
)
"""Parts of published names that are joined by _, as Keras 3 allows no / in the names of layers."""
FOLDED = 1e-3
"""How far the mean of a standardised kernel may be from 0, and its variance above 1."""


class Variable(Protocol):
    """A variable in a file, not read yet."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        ...

    @property
    def is_weight(self) -> bool:
        """Whether it may be a weight of a network."""
        ...


def by_full_names(weights: Mapping[str, str], variables: Mapping[str, Variable], where: str) -> dict[str, str] | None:
    """Identifies the variables of the one network whose variables have the published names, under any prefix.

    Args:
        weights: names by key.
        variables: by key.
        where: source of the model, for messages.

    Returns:
        the keys by published name; None if no variables have such names.

    Raises:
        InputError: there are two such networks, or two variables of one name.
    """
    names = {key: JOINED.sub(r"\1/", name.removesuffix(":0")) for key, name in weights.items()}
    names = {key: re.sub(NUMBERED, r"\1/", name) for key, name in names.items()}
    prefixes = {name.removesuffix(STEM) for name in names.values() if f"/{name}".endswith(f"/{STEM}")}
    if not any(f"{prefix}block1/unit01/a/{PLACES['kernel']}" in names.values() for prefix in prefixes):
        return None
    if len(prefixes) > 1:
        raise InputError(f"{where} holds {len(prefixes)} BiT networks, {some(prefixes)}; expected one: {SAVE_AGAIN}")
    return _by_names(names, prefixes.pop(), variables, where)


def _by_names(names: dict[str, str], prefix: str, variables: Mapping[str, Variable], where: str) -> dict[str, str]:
    """Identifies the variables of a network by their full names, and those of its head by their ranks."""
    # The head is a layer of the user's own, with any name.
    body = {key: name.removeprefix(prefix) for key, name in names.items() if name.startswith(prefix)}
    body = {key: name for key, name in body.items() if BODY.fullmatch(name)}
    rest = {key: name for key, name in names.items() if key not in body}
    pairs = [(name, key) for key, name in body.items()]
    for leaf, ranks in (("kernel", (2, 4)), ("bias", (1,))):
        of_head = [key for key, name in rest.items() if name.split("/")[-1] == leaf]
        pairs += [(f"head/{leaf}", key) for key in of_head if len(variables[key].shape) in ranks]
    return check_unique(pairs, where)


def check_unique(pairs: list[tuple[str, str]], where: str) -> dict[str, str]:
    """Returns the keys by name, or raises `InputError` if two variables have the same name."""
    keys: dict[str, str] = {}
    for name, key in pairs:
        if name in keys:
            raise InputError(f"{where} holds two variables for {name}: {keys[name]} and {key}; {SAVE_AGAIN}")
        keys[name] = key
    return keys


def check_shapes(keys: dict[str, str], variables: Mapping[str, Variable], where: str) -> dict[str, tuple[int, ...]]:
    """Returns the shapes by name, or raises `InputError` unless they are those of a complete BiT network."""
    entries = {name: variables[key] for name, key in keys.items()}
    positions = [(int(m[1]), int(m[2])) for name in keys if (m := re.match(r"block(\d)/unit(\d+)/", name))]
    units = tuple(max((unit for block, unit in positions if block == b), default=1) for b in (1, 2, 3, 4))
    width, classes = (entries[name].shape[-1:] if name in entries else () for name in (STEM, "head/bias"))
    expected = layout(units, *width or (64,), *classes or (1,))
    problems = [f"{name} is missing" for name in expected if name not in keys]
    problems += [f"{key} has no counterpart in BiT" for name, key in keys.items() if name not in expected]
    for name, entry in entries.items():
        # Axes of one element do not matter: some heads are convolutions, some norms have four axes.
        if name in expected and [n for n in entry.shape if n != 1] != [n for n in expected[name] if n != 1]:
            problems.append(f"{name} has shape {entry.shape}, expected {expected[name]}")
        elif not entry.is_weight:
            problems.append(f"{name} is not of floats")
    if problems:
        raise InputError(f"{where} is not a complete BiT network: {some(problems)}; {SAVE_AGAIN}")
    return expected


def no_network(where: str, names: Iterable[str]) -> InputError:
    """Builds the error for a model in which no BiT network was found: what it is, or which variables it has.

    Args:
        where: source of the model, for messages.
        names: of its variables, or of its layers.
    """
    names = list(names)
    if kind := other_network(names):
        return InputError(f"{where} is {kind} of Keras, and of such files BiT networks alone are read; {OWN_FUNCTION}")
    return InputError(
        f"{where} has no recognizable BiT network; its variables are {some(names)}; expected a module of "
        f"TensorFlow Hub with a Dense head, or a bit_tf2.models.ResnetV2; if it holds one, {SAVE_AGAIN}; of any other "
        f"network, {OWN_FUNCTION}"
    )


def other_network(names: Iterable[str]) -> str:
    """Returns which network of Keras Applications has layers of some names; empty if none."""
    text = "\n".join(names)
    kind = next((kind for pattern, kind in OTHERS if re.search(pattern, text, re.MULTILINE)), "")
    if kind.startswith("ResNet"):
        deepest = {int(n) for n in re.findall(r"conv4_block(\d{1,3})_", text)}
        depth = {6: "50", 23: "101", 36: "152"}.get(max(deepest, default=0), "")
        return f"a ResNet{depth}{kind.removeprefix('ResNet')}"
    return kind


def some(words: Iterable[str]) -> str:
    """Lists the first few of some words, sorted."""
    first, *rest = sorted(words) or ["none"]
    return ", ".join([first, *rest[:3]]) + (f" … and {len(rest) - 3} more" if len(rest) > 3 else "")


def unfolded(kernel: np.ndarray, what: str) -> np.ndarray:
    """Returns a kernel that is this one once it is standardised.

    Raises:
        InputError: no kernel is, since this one has another mean or a larger variance.
    """
    exact = kernel.astype(np.float64)
    mean, variance = exact.mean((0, 1, 2)), exact.var((0, 1, 2))
    if not (np.abs(mean) <= FOLDED).all() or not (variance <= 1 + FOLDED).all():
        raise InputError(f"{what} is not standardised, so this is a ResNetV2 of another kind than BiT")
    # w / √(σ² + eps) has the variance σ² / (σ² + eps): with the published eps, small kernels stay small.
    short = np.maximum(1 - variance, 0)
    scale = np.where(short > 1e-5, np.sqrt(PUBLISHED_EPS / np.maximum(short, 1e-30)), 1.0)
    return (exact * scale).astype(np.float32)
