"""Writes BiT networks for TensorFlow, from plain layers of Keras, and opens what was written.

The model takes images as TensorFlow's programs hold them, (n, height, width, 3) in [0, 1] or uint8. No code of its own
is needed to load it. Its layers have the names of the published checkpoints, with _ for /, by which it is read again.
"""

import os
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from timm.layers.norm_act import GroupNormAct
from timm.models.resnetv2 import PreActBottleneck, ResNetV2
from torch import Tensor, nn

from funmatch.errors import InputError, first_line
from funmatch.ops.tasks.task import MULTILABEL
from funmatch.runtime.disk.files import write_atomically
from funmatch.shipping.export.network import ExportNet, quiet
from funmatch.shipping.runtimes import Runtime, require

KERAS, SAVEDMODEL, TFLITE = "model.keras", "savedmodel", "model.tflite"
FILES = (KERAS, SAVEDMODEL, TFLITE)
LOWEST = -3.4e38
"""Below all activations: the border of a pooling that takes no zeros."""


class Unsupported(ValueError):
    """Raised for a part of a network that BiT does not have."""


def import_keras() -> Any:
    """Returns Keras 3 on TensorFlow, which then computes on the CPU.

    Raises:
        InputError: one of them is not installed, or Keras runs on another library.
    """
    # TensorFlow writes pages about the machine, and would take all of a GPU's memory beside PyTorch.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    with silent():
        tensorflow = require("tensorflow")
        keras = require("keras")
        with suppress(RuntimeError):  # it is in use already
            tensorflow.config.set_visible_devices([], "GPU")
    if int(keras.__version__.split(".")[0]) < 3 or keras.backend.backend() != "tensorflow":
        raise InputError(
            f"Keras {keras.__version__}, as it is set up, does not write models of TensorFlow; Keras 3 with "
            "KERAS_BACKEND=tensorflow does"
        )
    return keras


@contextmanager
def silent() -> Generator[None]:
    """Keeps what TensorFlow prints off the terminal; its C++ code writes past Python's `sys.stderr`."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        with quiet():
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


class Builder:
    """Builds the layers of a network in Keras, each with its values.

    Attributes:
        keras: the library.
        values: those of each layer that has some.
    """

    def __init__(self, keras: Any) -> None:
        self.keras, self.values = keras, list[tuple[Any, list[np.ndarray]]]()

    def layer(self, made: Any, x: Any, *values: Tensor) -> Any:
        """Applies a layer, and notes its values."""
        y = made(x)
        self.values.append((made, [value.detach().float().numpy() for value in values]))
        return y

    def conv(self, x: Any, conv: Any, place: str) -> Any:
        """Applies a convolution, with zeros around the images as torch has them; Keras's own padding is uneven."""
        if type(conv) is not nn.Conv2d or conv.bias is not None or conv.groups != 1 or conv.dilation != (1, 1):
            raise Unsupported(f"its {place} is not a plain convolution")
        layers = self.keras.layers
        if any(conv.padding):
            x = layers.ZeroPadding2D(conv.padding)(x)
        made = layers.Conv2D(
            conv.out_channels, conv.kernel_size, strides=conv.stride, use_bias=False,
            name=f"{place}_standardized_conv2d".replace("/", "_"),
        )  # fmt: skip
        return self.layer(made, x, conv.weight.permute(2, 3, 1, 0))

    def norm(self, x: Any, norm: Any, place: str) -> Any:
        """Applies a GroupNorm and a ReLU."""
        if not isinstance(norm, GroupNormAct) or not isinstance(norm.act, nn.ReLU) or norm.weight is None:
            raise Unsupported(f"its {place or 'last norm'} is {type(norm).__name__}")
        made = self.keras.layers.GroupNormalization(
            norm.num_groups, epsilon=norm.eps, name=f"{place and f'{place}_'}group_norm".replace("/", "_")
        )
        return self.keras.layers.ReLU()(self.layer(made, x, norm.weight, norm.bias))

    def stem(self, x: Any, stem: Any) -> Any:
        """Applies the first convolution and the pooling."""
        x = self.conv(x, stem.conv, "root_block")
        pool, pad = getattr(stem, "pool", None), getattr(stem, "pad", None)
        if not isinstance(pool, nn.MaxPool2d) or (pool.kernel_size, pool.stride) != (3, 2) or pool.ceil_mode:
            raise Unsupported("its stem has another pooling")
        if isinstance(pad, nn.ConstantPad2d) and pad.value == 0 and pool.padding == 0:
            x = self.keras.layers.ZeroPadding2D(pad.padding[0])(x)
        elif pad is None and pool.padding == 1:
            x = self.keras.ops.pad(x, [[0, 0], [1, 1], [1, 1], [0, 0]], constant_values=LOWEST)
        else:
            raise Unsupported("its stem has another pooling")
        return self.keras.layers.MaxPooling2D(3, 2)(x)

    def unit(self, x: Any, unit: Any, place: str) -> Any:
        """Applies a residual unit."""
        if not isinstance(unit, PreActBottleneck):
            raise Unsupported(f"its {place} is {type(unit).__name__}")
        before = self.norm(x, unit.norm1, f"{place}/a")
        if unit.downsample is not None:
            if not isinstance(getattr(unit.downsample, "norm", None), nn.Identity):
                raise Unsupported(f"its {place} has another shortcut")
            x = self.conv(before, unit.downsample.conv, f"{place}/a_proj")
        y = self.conv(before, unit.conv1, f"{place}/a")
        y = self.conv(self.norm(y, unit.norm2, f"{place}/b"), unit.conv2, f"{place}/b")
        y = self.conv(self.norm(y, unit.norm3, f"{place}/c"), unit.conv3, f"{place}/c")
        return self.keras.layers.Add()([y, x])


def build(exported: ExportNet, side: int, fixed_batch: int | None) -> Any:
    """Returns a network as a model of Keras, from images to logits or probabilities.

    Args:
        exported: the network.
        side: of its images, pixels.
        fixed_batch: number of images; None: any.

    Raises:
        InputError: it is not a BiT network, or Keras is not there.
    """
    classifier = exported.classifier
    net, card = classifier.net, classifier.card
    try:
        # Before TensorFlow is imported, which takes seconds.
        if not isinstance(net, ResNetV2) or len(card.mean) != 3:
            raise Unsupported(f"it is {type(net).__name__}")
        if not isinstance(net.norm, GroupNormAct) or not hasattr(net.stem, "conv"):
            raise Unsupported("it has BatchNorm or another stem")
        keras = import_keras()
        builder, largest = Builder(keras), 255 if exported.uint8 else 1
        dtype = "uint8" if exported.uint8 else "float32"
        images = keras.Input((side, side, 3), fixed_batch, dtype=dtype, name="images")
        std = [1 / (largest * each) for each in card.std]
        shift = [-mean / each for mean, each in zip(card.mean, card.std, strict=True)]
        x = builder.stem(keras.layers.Rescaling(std, shift)(images), net.stem)
        for b, stage in enumerate(net.stages, 1):
            for u, unit in enumerate(stage.get_submodule("blocks").children(), 1):
                x = builder.unit(x, unit, f"block{b}/unit{u:02}")
        x = keras.layers.GlobalAveragePooling2D()(builder.norm(x, net.norm, ""))
        x = _head(builder, x, net)
    except Unsupported as error:
        raise InputError(
            f"{card.name} cannot be written for TensorFlow, as {error}; of timm's networks, those of BiT can be "
            "(resnetv2_50x1_bit … resnetv2_152x4_bit); for others try --format onnx"
        ) from None
    if exported.probabilities:
        sigmoid = exported.task is MULTILABEL
        x = (keras.layers.Activation("sigmoid") if sigmoid else keras.layers.Softmax())(x)
    model = keras.Model(images, x)
    # Last, since layers have variables only once they are applied.
    for layer, values in builder.values:
        layer.set_weights(values)
    return model


def _head(builder: Builder, x: Any, net: ResNetV2) -> Any:
    head: Any = net.head
    fc, pooling = getattr(head, "fc", None), getattr(head, "global_pool", None)
    if not isinstance(fc, nn.Conv2d | nn.Linear) or getattr(pooling, "pool_type", "") != "avg" or fc.bias is None:
        raise Unsupported("it has another head")
    weight = fc.weight.reshape(fc.weight.shape[0], -1)
    return builder.layer(builder.keras.layers.Dense(len(weight), name="head"), x, weight.T, fc.bias)


def write(name: str, build_model: Callable[[], Any], folder: Path) -> None:
    """Writes a model in one of TensorFlow's formats.

    Args:
        name: one of `FILES`.
        build_model: makes the model.
        folder: to write into.

    Raises:
        InputError: TensorFlow cannot convert it.
    """
    model = build_model()
    try:
        with silent():
            if name == KERAS:
                model.save(folder / name)
            elif name == SAVEDMODEL:
                # By itself it would leave the number of images open.
                (given,) = model.inputs
                spec = require("keras").InputSpec(shape=tuple(given.shape), dtype=given.dtype, name="images")
                model.export(str(folder / name), verbose=False, input_signature=[spec])
            else:
                converter = require("tensorflow").lite.TFLiteConverter.from_keras_model(model)
                write_atomically(folder / name, converter.convert())
    except (OSError, InputError):
        raise
    except Exception as error:  # converters raise types of their own
        raise InputError(f"TensorFlow cannot write {name}: {first_line(error)}; try --format onnx") from error


def open_written(path: Path) -> Runtime:
    """Opens what `write` wrote in its runtime; it takes images as PyTorch holds them.

    Args:
        path: of the file, or of the folder of a SavedModel.

    Raises:
        InputError: TensorFlow cannot read it.
    """
    keras, tensorflow = import_keras(), require("tensorflow")
    try:
        with silent():
            if path.name == KERAS:
                model = keras.saving.load_model(path, compile=False)
                given, name = model.inputs[0], f"Keras {keras.__version__}"
                compute: Any = tensorflow.function(lambda images: model(images, training=False))
                shape, dtype = given.shape, given.dtype
            elif path.name == SAVEDMODEL:
                loaded = tensorflow.saved_model.load(str(path))
                # Not `loaded.serve` itself, which does not keep the variables alive.
                compute, name = lambda images: loaded.serve(images), f"TensorFlow {tensorflow.__version__}"
                (_, given), *_ = loaded.signatures["serving_default"].structured_input_signature[1].items()
                shape, dtype = given.shape, given.dtype.name
            else:
                runner = tensorflow.lite.Interpreter(str(path)).get_signature_runner()
                ((key, given),) = runner.get_input_details().items()
                name = f"TFLite of TensorFlow {tensorflow.__version__}"
                dtype, shape = given["dtype"], given["shape_signature"]
                runner(**{key: np.zeros([abs(n) for n in shape], dtype)})  # it prints when it is first used
                compute = lambda images: next(iter(runner(**{key: images}).values()))  # noqa: E731
    except Exception as error:  # of a type of its own
        raise InputError(f"{path} cannot be opened by TensorFlow: {first_line(error)}") from error

    def outputs(images: np.ndarray) -> np.ndarray:
        return np.asarray(compute(np.ascontiguousarray(images.transpose(0, 2, 3, 1))), dtype=np.float32)

    batch = None if shape[0] in (None, -1) else int(shape[0])
    return Runtime(name, path, outputs, batch, np.dtype(dtype))
