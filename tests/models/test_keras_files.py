"""Files of Keras: BiT networks in them are read without TensorFlow, anything else is rejected with a message."""

import io
import json
import struct
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from test_savedmodel import SAVED_MODELS, published, written_value

from funmatch.commands.networks import import_model
from funmatch.config import Import
from funmatch.errors import InputError
from funmatch.models import bit
from funmatch.models.keras import hdf5
from funmatch.models.keras.config import Layer
from funmatch.models.keras.layers import read_front
from funmatch.models.keras.network import open_keras
from funmatch.models.load import load
from funmatch.models.names import check_model_name
from funmatch.models.tensorflow.identify import other_network
from funmatch.models.tensorflow.nodes import Unclear
from funmatch.models.tensorflow.preprocessing import as_inputs

HALF = (0.5,) * 3, (0.5,) * 3


def hdf5_file(arrays: dict[str, np.ndarray], texts: dict[str, str] | None = None) -> bytes:
    """An HDF5 file of arrays by path, and of texts by the path of their group."""
    file = io.BytesIO()
    with h5py.File(file, "w") as opened:
        for name, values in arrays.items():
            opened.create_dataset(name, data=values)
        for place, text in (texts or {}).items():
            opened.require_group(place or "/").attrs["model_config" if not place else "name"] = text
    return file.getvalue()


def keras_file(path: Path, config: dict, weights: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("config.json", json.dumps(config))
        archive.writestr("model.weights.h5", weights)
    return path


# What Keras wrote, see `scripts/make_savedmodel.py`.


@pytest.mark.parametrize(
    ("name", "side"), [("keras2.keras", None), ("keras3.keras", 64), ("hub.h5", None)], ids=lambda each: str(each)
)
def test_every_variable_of_a_file_of_keras_is_read(name, side):
    saved = open_keras(SAVED_MODELS / name)
    assert {name: array.shape for name, array in saved.arrays.items()} == published((1, 1, 1, 1), 2, 3)
    for key, array in saved.arrays.items():
        np.testing.assert_array_equal(array, written_value(key, array.shape), key)
    assert saved.side == side
    if name == "keras3.keras":
        assert saved.inputs == HALF
        (note,) = saved.notes
        assert "for images of 64 × 64 pixels, which is used as its image size unless --side" in note
    elif name == "keras2.keras":
        images = np.random.default_rng(0).random((3, 64, 64, 3), dtype=np.float32) * np.array([1, 0.5, 0.25])
        np.testing.assert_allclose(saved.inputs, (images.mean((0, 1, 2)), images.std((0, 1, 2))), rtol=1e-4)
    else:
        assert saved.inputs is None
        assert "what its module" in saved.why


def functional(layers: list[dict]) -> dict:
    """The description of a model whose layers follow each other, in the notation of Keras 3."""
    for last, layer in zip([None, *layers], layers, strict=False):
        layer["name"] = layer.get("name") or layer["class_name"].lower()
        args = layer.pop("args", [])
        history = (
            {"class_name": "__keras_tensor__", "config": {"keras_history": [last["name"], 0, 0]}} if last else None
        )
        layer["inbound_nodes"] = [{"args": [history, *args], "kwargs": {}}] if last else []
    return {"class_name": "Functional", "config": {"name": "net", "layers": layers}}


def made(kind: str, args: tuple = (), **config) -> dict:
    return {"class_name": kind, "config": config, "args": list(args)}


IMAGE = made("InputLayer", batch_shape=[None, None, None, 3], dtype="float32")


def front(*layers: dict):
    config = functional([json.loads(json.dumps(each)) for each in (IMAGE, *layers, made("ResnetV2"))])
    return read_front(config, "layers/resnet_v2/layers/sequential/layers/standardized_conv2d/vars/0", lambda _: [])


PREPROCESSING = {
    "nothing": ([], ((0,) * 3, (1,) * 3), None),
    "rescaling": ([made("Rescaling", scale=2.0, offset=-1.0)], HALF, None),
    "rescaling of bytes": ([made("Rescaling", scale=1 / 127.5, offset=-1)], HALF, None),
    "by channel": (
        [made("Rescaling", scale=[1 / 0.25, 1 / 0.5, 1], offset=[-2, 0, 0])], ((0.5, 0, 0), (0.25, 0.5, 1)), None,
    ),
    "normalization": (
        [made("Normalization", axis=[-1], mean=[0.5, 0.4, 0.3], variance=[0.04, 0.09, 0.16])],
        ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)), None,
    ),
    "operations": ([made("TrueDivide", [0.5]), made("Subtract", [1])], HALF, None),
    "resizing and a crop": (
        [made("Resizing", height=160, width=160), made("CenterCrop", height=128, width=128),
         made("RandomFlip"), made("Rescaling", scale=1 / 255, offset=0)],
        ((0,) * 3, (1,) * 3), (128, 128),
    ),
    "integers": ([], ((0,) * 3, (1 / 255,) * 3), None),
}  # fmt: skip


@pytest.mark.parametrize("name", PREPROCESSING)
def test_preprocessing_layers_become_mean_and_std(name, monkeypatch):
    layers, expected, side = PREPROCESSING[name]
    if name == "integers":
        monkeypatch.setitem(IMAGE["config"], "dtype", "uint8")
    found = front(*layers)
    np.testing.assert_allclose(as_inputs(found.image)[0], expected, atol=1e-6)
    assert found.side == side


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (made("Lambda", function={"class_name": "__lambda__", "config": {"code": "4wEAAAA"}}), "its layer Lambda"),
        (made("MyPreprocessing"), r"its layer MyPreprocessing \(mypreprocessing\) changes images"),
        (made("Normalization", axis=[1], mean=[0.5], variance=[1]), "other axes than the channels"),
        (made("ZeroPadding2D", padding=[[3, 3], "x"]), "pads images by"),
        (made("Resizing", height=-1, width=5), "resizes images to -1 pixels"),
        (made("Divide", ["x"]), "changes images"),
    ],
)
def test_layers_whose_effect_is_unknown_are_named(layer, message):
    with pytest.raises(Unclear, match=message):
        front(layer)


def test_operations_of_keras_2_are_read():
    rows = [
        {"class_name": "InputLayer", "config": {"name": "a"}, "name": "a", "inbound_nodes": []},
        {"class_name": "TFOpLambda", "config": {"function": "math.multiply"}, "name": "b",
         "inbound_nodes": [["a", 0, 0, {"y": 2, "name": None}]]},
        {"class_name": "TFOpLambda", "config": {"function": "__operators__.add"}, "name": "c",
         "inbound_nodes": [["b", 0, 0, {"y": -1}]]},
        {"class_name": "ResnetV2", "config": {}, "name": "d", "inbound_nodes": [[["c", 0, 0, {}]]]},
    ]  # fmt: skip
    found = read_front({"class_name": "Functional", "config": {"layers": rows}}, "d/x", lambda _: [])
    assert as_inputs(found.image)[0] == HALF
    assert found.network == Layer("ResnetV2", "d", {}, ())


@pytest.fixture(name="bit_file", scope="module")
def make_bit_file(tmp_path_factory):
    """An R50x1 in a `.h5` file with published names, and the network that it is."""
    net = bit.with_published_eps(bit.network((1, 1, 1, 1), 32, 5))
    generator, arrays = torch.Generator().manual_seed(0), {}
    state = net.state_dict()
    for name in bit.layout((1, 1, 1, 1), 32, 5):
        tensor = state[bit.timm_name(name)]
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1 + ("gamma" in name))
        array = tensor.permute(2, 3, 1, 0).numpy() if tensor.ndim == 4 else tensor.numpy()
        arrays[f"model_weights/keras_layer/resnet/{name}:0"] = array
    for leaf in ("kernel", "bias"):
        arrays[f"model_weights/dense/dense/{leaf}:0"] = arrays.pop(f"model_weights/keras_layer/resnet/head/{leaf}:0")
    hub = made("KerasLayer", handle="https://tfhub.dev/google/bit/m-r50x1/1")
    hub["name"] = "keras_layer"
    config = functional([IMAGE.copy(), made("Resizing", height=96, width=96), hub, made("Dense", activation="softmax")])
    path = tmp_path_factory.mktemp("bit") / "teacher.h5"
    path.write_bytes(hdf5_file(arrays, {"": json.dumps(config)}))
    return path, net.eval()


def test_h5_file_is_a_teacher_and_is_imported(bit_file, tmp_path, capsys):
    path, net = bit_file
    images = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    check_model_name(str(path))
    model = load(str(path)).eval()
    with torch.inference_mode():
        assert torch.allclose(model(images), net(2 * images - 1), rtol=1e-4, atol=1e-4)
    assert (model.card.side, model.card.side_known, model.card.mean) == (96, True, (0.5,) * 3)
    found = import_model.import_model(Import(model=str(path), out=tmp_path / "ours")).metrics
    assert (found["side"], found["classes"]) == (96, 5)
    said = capsys.readouterr().err
    assert "for images of 96 × 96 pixels" in said
    assert "applies softmax to the logits of its head" in said
    assert load(f"savedmodel:{path}").num_classes == 5


def test_file_that_does_not_tell_its_range_asks_for_it(bit_file, tmp_path):
    path, _ = bit_file
    with h5py.File(path) as whole, h5py.File(tmp_path / "w.h5", "w") as other:
        whole.copy("model_weights", other)
    with pytest.raises(InputError, match=r"unknown: it holds weights alone; give their range with `funmatch import"):
        load(str(tmp_path / "w.h5"))
    assert load(str(tmp_path / "w.h5"), inputs=HALF).card.mean == (0.5,) * 3


def test_missing_h5py_is_named(bit_file, monkeypatch):
    monkeypatch.setattr(hdf5, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"pip install 'funmatch\[keras\]'"):
        load(str(bit_file[0]))


OTHERS = {
    "a ResNet50": ("conv1_conv/kernel", "conv2_block1_1_conv/kernel", "conv4_block6_3_conv/kernel"),
    "a ResNet152V2": ("conv2_block1_preact_bn/gamma", "conv4_block36_3_conv/kernel"),
    "a MobileNetV2": ("Conv1/kernel", "expanded_conv_depthwise/depthwise_kernel"),
    "an EfficientNet": ("stem_conv/kernel", "block1a_dwconv/depthwise_kernel"),
    "": ("layer/kernel", "dense/bias"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_networks_of_keras_are_named(kind, tmp_path):
    assert other_network(OTHERS[kind]) == kind
    path = tmp_path / "net.h5"
    path.write_bytes(hdf5_file({name: np.ones((3, 3), np.float32) for name in OTHERS[kind]}))
    message = f"{kind} of Keras, and of such files BiT networks alone" if kind else "no recognizable BiT network"
    message += ".*write a function that returns it as a torch.nn.Module"
    with pytest.raises(InputError, match=message):
        load(str(path))


def test_variables_by_number_alone_are_refused(tmp_path):
    arrays = {f"layers/keras_layer/vars/{i}": np.ones((7, 7, 3, 2) if not i else 2, np.float32) for i in range(4)}
    path = keras_file(tmp_path / "x.keras", {"class_name": "M", "config": {}}, hdf5_file(arrays))
    with pytest.raises(InputError, match="by number, and not by name"):
        open_keras(path)


# Files that are damaged, or made to do harm.


def test_damaged_files_are_refused(tmp_path):
    whole = (SAVED_MODELS / "keras3.keras").read_bytes()
    at = whole.index(written_value("head/bias", (3,)).tobytes())
    for content, message in (
        (whole[: len(whole) // 2], "is damaged"),
        (whole[:at] + b"\0" + whole[at + 1 :], "checksum of its model.weights.h5 differs"),
        (b"", "an empty file"),
        (b"<html>", "a web page"),
        (hdf5_file({"a": np.ones(2)})[:200], "is damaged"),
    ):
        path = tmp_path / "x.keras"
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            open_keras(path)
    with pytest.raises(InputError, match=r"gone\.keras is missing; expected a file of Keras"):
        check_model_name(str(tmp_path / "gone.keras"))


def test_crash_of_the_library_is_an_error_of_ours(tmp_path, monkeypatch):
    path = tmp_path / "x.h5"
    path.write_bytes(hdf5_file({"a": np.ones(2)}))
    program = tmp_path / "crash.py"
    program.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    monkeypatch.setattr(hdf5.Path, "with_name", lambda *_: program)
    with pytest.raises(InputError, match="HDF5's library fails on it"):
        hdf5.open_hdf5(path)


def test_zip_bombs_are_not_unpacked(tmp_path):
    path = tmp_path / "x.keras"
    keras_file(path, {"class_name": "M", "config": {}}, bytes(1 << 20), zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match="compressed or encrypted, as Keras writes none"):
        open_keras(path)


def test_arrays_outside_of_the_file_are_not_read(tmp_path):
    secret = tmp_path / "secret.bin"
    secret.write_bytes(np.ones(6, np.float32).tobytes())
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["values"] = np.ones(3, np.float32)
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("external", (6,), "f4", external=[(str(secret), 0, 24)])
        file["linked"] = h5py.ExternalLink("other.h5", "values")
        file["soft"] = h5py.SoftLink("/plain")
        layout = h5py.VirtualLayout((3,), "f4")
        layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "values", (3,))
        file.create_virtual_dataset("virtual", layout)
        file.create_dataset("huge", (1 << 40,), "f4")
        file.create_dataset("packed", (1 << 20,), "f4", data=np.zeros(1 << 20), compression="gzip")
        file["plain"] = np.arange(3, dtype=np.float32)
    found = hdf5.open_hdf5(path)
    assert {name: array.why for name, array in found.arrays.items()} == {
        "external": "its values are in another file",
        "virtual": "its values are in another file",
        "huge": "it has no values",
        "packed": "it is stored in chunks, as Keras writes none",
        "plain": "",
    }
    np.testing.assert_array_equal(found.read("plain"), [0, 1, 2])
    with pytest.raises(InputError, match="external cannot be read: its values are in another file"):
        found.read("external")


def test_zip_whose_parts_lie_is_refused(tmp_path):
    whole = bytearray((SAVED_MODELS / "keras3.keras").read_bytes())
    # The local header of the weights, whose length of the name decides where they begin.
    at = whole.rindex(b"PK\3\4")
    whole[at + 26 : at + 28] = struct.pack("<H", 9)
    path = tmp_path / "x.keras"
    path.write_bytes(bytes(whole))
    with pytest.raises(InputError, match=r"checksum of its model\.weights\.h5 differs"):
        open_keras(path)
