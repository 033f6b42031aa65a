"""Finds in the configuration of a Keras model what its layers do to images before the network, and after it.

Layers are described by class and arguments, and none is built: the code of a `Lambda`, or of a user's own layer, is
not run. What a layer of a known class does is computed as for a graph, see `tensorflow.preprocessing`.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from funmatch.models.keras.config import Layer, all_layers, chain, plain_numbers
from funmatch.models.tensorflow.affine import AffineImage
from funmatch.models.tensorflow.nodes import Unclear

UNCHANGED = {
    "InputLayer", "Dropout", "SpatialDropout2D", "GaussianNoise", "GaussianDropout", "AlphaDropout", "RandomFlip",
    "RandomRotation", "RandomZoom", "RandomTranslation", "RandomContrast", "RandomBrightness", "ActivityRegularization",
    "Identity",
}  # fmt: skip
"""Layers that pass images on as they are when a model predicts."""
SIZES = {"Resizing", "CenterCrop", "RandomCrop"}
OPERATIONS = {
    "Multiply": np.multiply, "multiply": np.multiply, "Add": np.add, "add": np.add, "AddV2": np.add,
    "Subtract": np.subtract, "subtract": np.subtract, "TrueDivide": np.divide, "Divide": np.divide,
    "truediv": np.divide, "divide": np.divide, "sub": np.subtract, "mul": np.multiply,
}  # fmt: skip
"""Operations with a constant: layers of Keras 3, and last words of the functions that Keras 2 calls."""
HUB = "KerasLayer"
HUB_BIT = re.compile(r"https://(tfhub\.dev/google/|(www\.)?kaggle\.com/models/google/)(experts/)?bit/")


@dataclass(frozen=True)
class Front:
    """What is before the network.

    Attributes:
        image: images when they reach the network.
        network: the layer that holds it, or its first convolution.
        side: height and width to which the model itself brings images; None where it does not.
    """

    image: AffineImage
    network: Layer
    side: tuple[int, int] | None


def read_front(config: Mapping[str, Any], stem: str, read: Callable[[Layer], list[np.ndarray]]) -> Front:
    """Follows a model's layers from the images to the network.

    Args:
        config: of the model, as Keras writes it.
        stem: path in the file of the network's first kernel.
        read: returns the variables of a layer in order.

    Raises:
        Unclear: a layer before the network is of an unknown kind.
    """
    image, side = AffineImage(np.ones(3), np.zeros(3)), None
    layers = list(chain(config, 0))
    for i, layer in enumerate(layers):
        if layer.kind in SIZES:
            side = (_whole(layer.config.get("height")), _whole(layer.config.get("width")))
        elif layer.kind == "InputLayer":
            shape = layer.config.get("batch_shape") or layer.config.get("batch_input_shape") or ()
            if not i and isinstance(shape, list) and len(shape) == 4 and all(type(n) is int for n in shape[1:3]):
                side = (shape[1], shape[2])
            image = replace(image, is_integer=str(layer.config.get("dtype")).startswith(("int", "uint")))
        elif layer.kind not in UNCHANGED:
            if (found := _changed(layer, image, read)) is not None:
                image = found
                continue
            if not layer.holds(stem):
                raise Unclear(f"its layer {layer.kind} ({layer.name or 'without a name'}) changes images")
            if layer.kind == HUB:
                image = _of_hub(layer, image)
            return Front(image, layer, side)
    raise Unclear("its layers do not show where the network is")


def _changed(layer: Layer, image: AffineImage, read: Callable[[Layer], list[np.ndarray]]) -> AffineImage | None:
    """Returns images after a layer that scales, shifts or pads them; None if it is of another kind."""
    if layer.kind == "Rescaling":
        scale, offset = plain_numbers(layer.config.get("scale")), plain_numbers(layer.config.get("offset"))
        if scale is None or offset is None:
            raise Unclear(f"its layer {layer.name} has no valid scale and offset")
        return _affine(image, scale.reshape(-1), offset.reshape(-1), layer)
    if layer.kind == "Normalization":
        if layer.config.get("invert") or layer.config.get("axis") not in (-1, [-1], 3, [3]):
            raise Unclear(f"its layer {layer.name} normalises other axes than the channels, or inverts")
        mean, variance = (plain_numbers(layer.config.get(key)) for key in ("mean", "variance"))
        if mean is None or variance is None or layer.config.get("mean") is None:
            mean, variance = [np.asarray(each, float).reshape(-1) for each in [*read(layer), None, None][:2]]
        if mean.size not in (1, 3) or variance.size not in (1, 3) or not (np.isfinite(variance).all()):
            raise Unclear(f"its layer {layer.name} has no mean and variance by channel")
        # Keras divides by max(√variance, 1e-7).
        deviation = np.maximum(np.sqrt(np.maximum(variance.reshape(-1), 0)), 1e-7)
        return _affine(image, 1 / deviation, -mean.reshape(-1) / deviation, layer)
    if layer.kind == "ZeroPadding2D":
        return _padded(image, layer)
    if layer.kind in ("cast", "Cast"):
        return image
    if layer.kind in OPERATIONS and len(layer.values) == 2:
        return _operated(image, layer)
    return None


def _affine(image: AffineImage, scale: Any, offset: Any, layer: Layer) -> AffineImage:
    if any(image.border):
        raise Unclear(f"its layer {layer.name} changes images after they are padded")
    return replace(image, scale=image.scale * scale, offset=image.offset * scale + offset)


def _operated(image: AffineImage, layer: Layer) -> AffineImage:
    """Returns images after an operation with a constant."""
    operation = OPERATIONS[layer.kind]
    first, second = layer.values
    if first is None and second is not None:
        if operation in (np.add, np.subtract):
            return _affine(image, 1.0, operation(0.0, second), layer)
        return _affine(image, operation(1.0, second), 0.0, layer)
    if second is None and first is not None and operation is not np.divide:
        if operation is np.multiply:
            return _affine(image, first, 0.0, layer)
        return _affine(image, operation(0.0, 1.0), first, layer)
    raise Unclear(f"its layer {layer.kind} ({layer.name}) changes images")


def _padded(image: AffineImage, layer: Layer) -> AffineImage:
    padding = layer.config.get("padding")
    flat = [n for pair in padding if isinstance(pair, list) for n in pair] if isinstance(padding, list) else []
    if len(flat) != 4 or any(type(n) is not int or not 0 <= n < 1000 for n in flat):
        raise Unclear(f"its layer {layer.name} pads images by {padding}")
    top, bottom, left, right = (a + b for a, b in zip(image.border, flat, strict=True))
    return replace(image, border=(top, bottom, left, right))


def _of_hub(layer: Layer, image: AffineImage) -> AffineImage:
    """Returns images as they are inside of a module of TensorFlow Hub, whose code is not in the file."""
    handle = str(layer.config.get("handle"))
    if not HUB_BIT.match(handle):
        raise Unclear(f"what its module {handle} does to images is not in the file")
    # BiT's modules take images in [0, 1], as all of the Hub's do, and bring them to [-1, 1] themselves.
    return replace(image, scale=2 * image.scale, offset=2 * image.offset - 1)


def read_back(config: Mapping[str, Any], network: Layer, head: str) -> tuple[list[str], list[str]]:
    """Returns the layers between the network and its head, and what follows the head, both by class, in order.

    Args:
        config: of the model.
        network: of `Front`.
        head: path in the file of the head's kernel.
    """
    layers = list(all_layers(config, 0))
    start = next((i for i, layer in enumerate(layers) if layer == network), len(layers))
    end = next((i for i, layer in enumerate(layers) if i >= start and layer.holds(head)), start)
    return _effects(layers[start + 1 : end]), _effects([*layers[end + 1 :]], layers[end : end + 1])


def _effects(layers: list[Layer], head: list[Layer] | None = None) -> list[str]:
    """Returns the classes of layers, and the activations that they and the head have."""
    found: list[str] = []
    for layer in [*(head or []), *layers]:
        activation = layer.config.get("activation")
        is_head = head is not None and layer in head
        found += [layer.kind] if not is_head and layer.kind not in {"Activation", *UNCHANGED} else []
        found += [activation] if isinstance(activation, str) and activation != "linear" else []
    return found


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 < value < 1 << 14:
        raise Unclear(f"it resizes images to {value} pixels")
    return value
