"""Saves small BiT networks with TensorFlow in the usual ways, as inputs for the tests of the SavedModel reader.

    pip install tensorflow-cpu tf_keras tensorflow_hub
    python scripts/make_savedmodel.py                     # the committed ones, tests/models/savedmodels
    python scripts/make_savedmodel.py FOLDER [--ways …]   # others, each with its images and logits

A variable's values depend only on its published name, so that a test knows the expected values. The committed folders
lack everything that the reader does not open: graphs are far larger than weights, so one `saved_model.pb` keeps only
the served function, and the others are removed.
"""

import argparse
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["TF_USE_LEGACY_KERAS"] = "1"  # of tensorflow_hub, which knows Keras 2 alone
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"  # its gradients of kernels with two channels write outside of their memory
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras as keras3  # pyrefly: ignore[missing-import]
import numpy as np
import tensorflow as tf  # pyrefly: ignore[missing-import]
import tensorflow_hub as hub  # pyrefly: ignore[missing-import]
import tf_keras as keras2  # pyrefly: ignore[missing-import]
from tensorflow.core.protobuf import saved_model_pb2  # pyrefly: ignore[missing-import]

COMMITTED = Path(__file__).parent.parent / "tests" / "models" / "savedmodels"
KEPT = {
    "hub": "hub",
    "module": "module-255",
    "student": "student-fitted",
    "keras3": "keras3",
    "keras3-export": "keras3-export",
    "keras2.keras": "student-normalized-255.keras",
    "keras3.keras": "keras3-resized-255.keras",
    "hub.h5": "hub-functional.h5",
}
READ = {"f", "value", "dtype", "DstT", "strides", "padding", "explicit_paddings", "data_format"}  # of attributes
WITH_GRAPH = ("module",)
EPS = 1e-10  # of weight standardisation


def value(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The values of the variable with a published name, float32."""
    noise = np.random.RandomState(zlib.crc32(name.encode())).normal(size=shape) / 10  # the same in every numpy
    return (noise + name.endswith("gamma")).astype(np.float32)


def images(side: int) -> np.ndarray:
    return np.random.default_rng(0).random((3, side, side, 3), dtype=np.float32)


def standardised(kernel: Any) -> Any:
    mean, variance = tf.nn.moments(kernel, [0, 1, 2], keepdims=True)
    return (kernel - mean) / tf.sqrt(variance + EPS)


def padded(x: Any, by: int) -> Any:
    return tf.pad(x, [[0, 0], [by, by], [by, by], [0, 0]])


class Body:
    """The function of a feature extractor of TensorFlow Hub, and its variables."""

    def __init__(self, units: list[int], width: int, groups: int, numbered: bool) -> None:
        self.units, self.width, self.groups, self.numbered = units, width, groups, numbered
        self.named: dict[str, Any] = {}
        self.features(tf.zeros([1, 64, 64, 3]))

    def module(self) -> Any:
        """The saved object: it has the function and lists, but no attribute for any variable."""
        module = tf.train.Checkpoint()
        module.variables = list(self.named.values())
        module.trainable_variables = list(self.named.values())
        module.regularization_losses = []
        module.__call__ = tf.function(self.features, input_signature=[tf.TensorSpec([None, None, None, 3])])
        return module

    def variable(self, name: str, shape: tuple[int, ...]) -> Any:
        if name in self.named:
            return self.named[name]
        layer, leaf = name.rsplit("/", 1)
        number = f"_{len(self.named)}" if self.numbered and leaf == "kernel" and self.named else ""
        self.named[name] = tf.Variable(value(name, shape), name=f"resnet/{layer}{number}/{leaf}")
        return self.named[name]

    def conv(self, x: Any, layer: str, size: int, out: int, stride: int = 1) -> Any:
        kernel = self.variable(f"{layer}/standardized_conv2d/kernel", (size, size, x.shape[-1], out))
        return tf.nn.conv2d(padded(x, size // 2), standardised(kernel), stride, "VALID")

    def norm(self, x: Any, layer: str) -> Any:
        gamma, beta = (self.variable(f"{layer}group_norm/{leaf}", (x.shape[-1],)) for leaf in ("gamma", "beta"))
        shape = tf.shape(x)
        grouped = tf.reshape(x, [shape[0], -1, self.groups, x.shape[-1] // self.groups])
        mean, variance = tf.nn.moments(grouped, [1, 3], keepdims=True)
        return tf.nn.relu(tf.reshape((grouped - mean) / tf.sqrt(variance + 1e-5), shape) * gamma + beta)

    def unit(self, x: Any, name: str, middle: int, stride: int, is_first: bool) -> Any:
        y = self.norm(x, f"{name}/a/")
        shortcut = self.conv(y, f"{name}/a/proj", 1, 4 * middle, stride) if is_first else x
        y = self.norm(self.conv(y, f"{name}/a", 1, middle), f"{name}/b/")
        y = self.norm(self.conv(y, f"{name}/b", 3, middle, stride), f"{name}/c/")
        return self.conv(y, f"{name}/c", 1, 4 * middle) + shortcut

    def features(self, x: Any) -> Any:
        x = self.conv(2 * x - 1, "root_block", 7, self.width, 2)
        x = tf.nn.max_pool2d(padded(x, 1), 3, 2, "VALID")
        for b, count in enumerate(self.units):
            for u in range(count):
                stride = 2 if b and not u else 1
                x = self.unit(x, f"block{b + 1}/unit{u + 1:02}", self.width << b, stride, not u)
        return tf.reduce_mean(self.norm(x, ""), [1, 2])


def student(keras: Any, units: list[int], width: int, groups: int, classes: int) -> Any:
    """A network with the attributes and names of `bit_tf2.models.ResnetV2`, of either Keras, with its values."""
    layers = keras.layers
    slash = "_" if keras is keras3 else "/"  # Keras 3 allows none in names

    class Pad(layers.Layer):
        def __init__(self, by: int, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.by = by

        def call(self, x: Any) -> Any:
            return padded(x, self.by)

    class StandardizedConv2D(layers.Conv2D):
        def convolution_op(self, inputs: Any, kernel: Any) -> Any:
            return super().convolution_op(inputs, standardised(tf.convert_to_tensor(kernel)))

    def conv(out: int, size: int, stride: int = 1, name: str = "standardized_conv2d") -> Any:
        return StandardizedConv2D(out, size, strides=stride, use_bias=False, name=name.replace("/", slash))

    def norm() -> Any:
        return layers.GroupNormalization(groups, epsilon=1e-5, name="group_norm")

    class Unit(layers.Layer):
        def __init__(self, middle: int, stride: int, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.middle, self.stride = middle, stride
            self._proj = None
            self._unit_a = keras.Sequential([norm(), layers.ReLU()], name="a")
            self._unit_a_conv = conv(middle, 1, name="a/standardized_conv2d")
            self._unit_b = keras.Sequential([norm(), layers.ReLU(), Pad(1), conv(middle, 3, stride)], name="b")
            self._unit_c = keras.Sequential([norm(), layers.ReLU(), conv(4 * middle, 1)], name="c")

        def build(self, shape: Any) -> None:
            if self.stride > 1 or shape[-1] != 4 * self.middle:
                self._proj = conv(4 * self.middle, 1, self.stride, name="a/proj/standardized_conv2d")
            self.built = True

        def call(self, x: Any) -> Any:
            y = self._unit_a(x)
            shortcut = x if self._proj is None else self._proj(y)
            return self._unit_c(self._unit_b(self._unit_a_conv(y))) + shortcut

    class ResnetV2(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            pool = layers.MaxPooling2D(3, 2, "valid")
            self._root = keras.Sequential([Pad(3), conv(width, 7, 2), Pad(1), pool], name="root_block")
            self._blocks = []
            for b, count in enumerate(units):
                row = [Unit(width << b, 2 if b and not u else 1, name=f"unit{u + 1:02}") for u in range(count)]
                self._blocks.append(keras.Sequential(row, name=f"block{b + 1}"))
            self._pre_head = [norm(), layers.ReLU(), layers.GlobalAveragePooling2D()]
            self._head = layers.Dense(classes, name=f"head{slash}dense")

        def call(self, x: Any) -> Any:
            x = self._root(x)
            for layer in [*self._blocks, *self._pre_head]:
                x = layer(x)
            return self._head(x)

    net = ResnetV2()
    net(np.zeros((1, 64, 64, 3), np.float32))
    for name, variable in published(net):
        variable.assign(value(name, tuple(variable.shape)))
    return net


def published(net: Any) -> Iterator[tuple[str, Any]]:
    """The variables of a `ResnetV2` by their published names."""

    def of(layer: Any, place: str) -> Iterator[tuple[str, Any]]:
        for inner in getattr(layer, "layers", [layer]):
            kind = "group_norm" if hasattr(inner, "gamma") else "standardized_conv2d"
            for leaf in ("gamma", "beta", "kernel"):
                if hasattr(inner, leaf):
                    yield f"{place}{kind}/{leaf}", getattr(inner, leaf)

    yield from of(net._root, "root_block/")
    for b, block in enumerate(net._blocks, 1):
        for u, unit in enumerate(block.layers, 1):
            place = f"block{b}/unit{u:02}"
            for part, layer in (
                ("a", unit._unit_a),
                ("a", unit._unit_a_conv),
                ("b", unit._unit_b),
                ("c", unit._unit_c),
            ):
                yield from of(layer, f"{place}/{part}/")
            if unit._proj is not None:
                yield f"{place}/a/proj/standardized_conv2d/kernel", unit._proj.kernel
    yield from of(net._pre_head[0], "")
    yield from (("head/kernel", net._head.kernel), ("head/bias", net._head.bias))


def teacher(body: Any, head: Any) -> Any:
    """A module with a head in a Keras model, as people fine-tune one."""

    class MyBiTModel(keras2.Model):
        def __init__(self) -> None:
            super().__init__()
            self.head = head
            self.bit_model = body

        def call(self, x: Any) -> Any:
            return self.head(self.bit_model(x))

    return MyBiTModel()


def fitted(model: Any, optimizer: Any) -> Any:
    """The model after a training step with learning rate 0, which adds the optimizer's state and metrics."""
    x = images(64)
    labels = np.zeros(len(x), int)
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(x, labels, verbose=0)
    return model


class Served(tf.Module):
    """A body and its head without Keras, with a mean and a standard deviation as preprocessing."""

    def __init__(self, body: Body, classes: int) -> None:
        super().__init__()
        self.named = list(body.named.values())
        features = 32 * body.width
        self.kernel = tf.Variable(value("head/kernel", (features, classes)), name="resnet/head/kernel")
        self.bias = tf.Variable(value("head/bias", (classes,)), name="resnet/head/bias")
        self.features = body.features

    @tf.function(input_signature=[tf.TensorSpec([None, None, None, 3])])
    def __call__(self, x: Any) -> Any:
        x = (x / 255.0 - tf.constant([0.485, 0.456, 0.406])) / tf.constant([0.229, 0.224, 0.225])
        return tf.matmul(self.features((x + 1) / 2), self.kernel) + self.bias  # the body rescales [0, 1] to [-1, 1]


def behind(net: Any, *fronts: Any) -> Any:
    """A Keras model after preprocessing layers."""
    keras = keras3 if isinstance(net, keras3.Model) else keras2
    inputs = x = keras.Input((None, None, 3))
    for front in fronts:
        x = front(x)
    return keras.Model(inputs, net(x))


def normalization(keras: Any, largest: float) -> Any:
    """A normalisation layer adapted to images whose channels differ."""
    layer = keras.layers.Normalization(axis=-1)
    layer.adapt(images(64) * largest * np.array([1, 0.5, 0.25], np.float32))
    return layer


def hub_model(way: str, folder: Path, args: argparse.Namespace) -> Any:
    """A module, saved and loaded again, with a head."""
    body = Body(args.units, args.width, args.groups, way == "hub-numbered")
    tf.saved_model.save(body.module(), str(folder / "module"))
    head = keras2.layers.Dense(args.classes)
    layer = hub.KerasLayer(str(folder / "module"), trainable=True)
    if way.startswith(("hub-sequential", "hub-softmax")):
        model = keras2.Sequential([layer, head])
    elif way.startswith("hub-functional"):
        inputs = keras2.Input((None, None, 3))
        model = keras2.Model(inputs, head(layer(inputs)))
    else:
        model = teacher(tf.saved_model.load(str(folder / "module")) if way == "hub-loaded" else layer, head)
    model(images(64))
    for name, variable in zip(("head/kernel", "head/bias"), head.variables, strict=True):
        variable.assign(value(name, tuple(variable.shape)))
    return model


def export(model: Any, folder: str) -> None:
    model.export(folder, verbose=False) if isinstance(model, keras3.Model) else model.export(folder)


WAYS: dict[str, tuple[Callable[[Any], Any], Callable[[Any, str], Any]]] = {
    "hub": (lambda net: fitted(net, keras2.optimizers.legacy.SGD(0.0, momentum=0.9)), lambda net, to: net.save(to)),
    "hub-numbered": (lambda net: fitted(net, keras2.optimizers.AdamW(0.0)), lambda net, to: net.save(to)),
    "hub-sequential": (lambda net: net, lambda net, to: net.save(to)),
    "hub-functional": (lambda net: net, tf.saved_model.save),
    "hub-loaded": (lambda net: net, lambda net, to: net.save(to)),
    "hub-export": (lambda net: net, export),
    "hub-sequential-255": (
        lambda net: keras2.Sequential([keras2.layers.Rescaling(1 / 255), *net.layers]),
        lambda net, to: net.save(to),
    ),
    "hub-normalized": (lambda net: behind(net, normalization(keras2, 1)), lambda net, to: net.save(to)),
    "hub-softmax": (
        lambda net: keras2.Sequential([*net.layers, keras2.layers.Softmax()]),
        lambda net, to: net.save(to),
    ),
    "module-255": (lambda net: net, tf.saved_model.save),
    "student-nested": (lambda net: keras2.Sequential([net]), lambda net, to: net.save(to)),
    "student-rescaled": (lambda net: behind(net, lambda x: x * 2 - 1), lambda net, to: net.save(to)),
    "student-rescaled-export": (lambda net: behind(net, keras2.layers.Rescaling(2.0, -1.0)), export),
    "student-lambda-255": (
        lambda net: behind(net, keras2.layers.Lambda(lambda x: x / 127.5 - 1)),
        tf.saved_model.save,
    ),
    "student-normalized-255": (
        lambda net: behind(net, normalization(keras2, 255)),
        lambda net, to: net.save(to),
    ),
    "student-normalized-export": (lambda net: behind(net, normalization(keras2, 1)), export),
    "keras3-rescaled": (lambda net: behind(net, keras3.layers.Rescaling(2.0, -1.0)), tf.saved_model.save),
    "keras3-rescaled-255-export": (lambda net: behind(net, keras3.layers.Rescaling(1 / 127.5, -1.0)), export),
    "keras3-normalized-255-export": (lambda net: behind(net, normalization(keras3, 255)), export),
    "student": (lambda net: net, lambda net, to: net.save(to)),
    "student-fitted": (lambda net: fitted(net, keras2.optimizers.Adam(0.0)), lambda net, to: net.save(to)),
    "student-low": (lambda net: fitted(net, keras2.optimizers.legacy.Adam(0.0)), tf.saved_model.save),
    "student-export": (lambda net: net, export),
    "hub-functional.h5": (lambda net: net, lambda net, to: net.save(to)),
    "student.keras": (lambda net: net, lambda net, to: net.save(to)),
    "student-normalized-255.keras": (
        lambda net: behind(net, normalization(keras2, 255)),
        lambda net, to: net.save(to),
    ),
    "keras3-fitted.keras": (lambda net: fitted(net, keras3.optimizers.Adam(0.0)), lambda net, to: net.save(to)),
    "keras3-resized-255.keras": (
        lambda net: behind(net, keras3.layers.Resizing(64, 64), keras3.layers.Rescaling(1 / 127.5, -1.0)),
        lambda net, to: net.save(to),
    ),
    "keras3-rescaled.h5": (lambda net: behind(net, lambda x: x * 2 - 1), lambda net, to: net.save(to)),
    "keras3.weights.h5": (lambda net: net, lambda net, to: net.save_weights(to)),
    "keras3": (lambda net: net, tf.saved_model.save),
    "keras3-fitted": (lambda net: fitted(net, keras3.optimizers.Adam(0.0)), tf.saved_model.save),
    "keras3-export": (lambda net: net, export),
    "keras3-fitted-export": (lambda net: fitted(net, keras3.optimizers.Adam(0.0)), export),
}
"""How a network is built and saved, by name; the name begins with the architecture.

A network with 255 in its name takes images in 0 … 255."""


def make(way: str, folder: Path, args: argparse.Namespace) -> None:
    """Saves a network in one of these ways as `folder`, with its images and logits next to it."""
    if way.startswith("module"):
        model = Served(Body(args.units, args.width, args.groups, False), args.classes)
    elif way.startswith("hub"):
        model = hub_model(way, folder.parent, args)
    else:
        keras = keras3 if way.startswith("keras3") else keras2
        model = student(keras, args.units, args.width, args.groups, args.classes)
    prepare, save = WAYS[way]
    model = prepare(model)
    model(images(64))
    save(model, str(folder))
    x = images(args.side)
    shown = x * np.float32(255) if "255" in way else x
    np.savez(folder.with_name(f"{folder.name}.npz"), images=x, logits=np.asarray(model(shown)))


def pruned(content: bytes) -> bytes:
    """A `saved_model.pb` reduced to the parts of the served and the restoring function that the reader opens."""
    model = saved_model_pb2.SavedModel.FromString(content)
    meta = model.meta_graphs[0]
    meta.ClearField("object_graph_def")
    meta.meta_info_def.ClearField("stripped_op_list")
    graph = meta.graph_def
    saving = meta.saver_def.save_tensor_name.split(":")[0]
    kept = [node for node in graph.node if node.name != saving and not node.name.endswith("Read/ReadVariableOp")]
    functions = {function.signature.name: function for function in graph.library.function}
    called: dict[str, Any] = {}
    waiting = list(kept)
    while waiting:
        node = waiting.pop()
        name = node.attr["f"].func.name if "f" in node.attr else ""
        if name and name not in called:
            called[name] = functions[name]
            for unread in ("arg_attr", "control_ret", "resource_arg_unique_id"):
                called[name].ClearField(unread)
            waiting += called[name].node_def
        for attribute in set(node.attr) - READ:
            del node.attr[attribute]
        inputs = [each for each in node.input if not each.startswith("^")]
        del node.input[:]
        node.input.extend(inputs)
    for field, values in ((graph.node, kept), (graph.library.function, called.values())):
        values = [type(value).FromString(value.SerializeToString()) for value in values]
        del field[:]
        field.extend(values)
    return model.SerializeToString(deterministic=True)


def strip(folder: Path) -> None:
    """Removes all files of a SavedModel that are not read, except the one that marks it."""
    path = folder / "saved_model.pb"
    path.write_bytes(pruned(path.read_bytes()) if folder.name in WITH_GRAPH else b"")
    for path in folder.iterdir():
        if path.name == "assets":
            path.rmdir()
        elif path.name not in ("saved_model.pb", "variables"):
            path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="a new one; default: the committed ones are made again")
    parser.add_argument("--ways", nargs="*", metavar="WAY", help=f"of {', '.join(WAYS)}; default: all")
    parser.add_argument("--units", type=int, nargs=4, default=[2, 1, 1, 1])
    parser.add_argument("--width", type=int, default=2, help="channels of the stem")
    parser.add_argument("--groups", type=int, default=2, help="of the norms; BiT has 32")
    parser.add_argument("--classes", type=int, default=3)
    parser.add_argument("--side", type=int, default=64, help="of the images, pixels")
    args = parser.parse_args()
    if args.folder:
        args.folder.mkdir(parents=True)
        for way in args.ways or WAYS:
            make(way, args.folder / way, args)
        return
    work = COMMITTED.with_name("savedmodels.partial")
    for name, way in KEPT.items():
        args.units = [1, 1, 1, 1] if name in WITH_GRAPH or "." in name else [2, 1, 1, 1]
        make(way, work / name, args)
        if (work / name).is_dir():
            strip(work / name)
        shutil.rmtree(COMMITTED / name, ignore_errors=True)
        shutil.move(work / name, COMMITTED / name)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
