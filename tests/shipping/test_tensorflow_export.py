"""BiT networks are written for TensorFlow: equal outputs there, and they are read again; others are refused."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from make_images import paint
from PIL import Image
from torch import nn

import funmatch
from funmatch.config import Export
from funmatch.models import bit
from funmatch.models.classifier import Card, Classifier
from funmatch.models.load import load
from funmatch.models.save import save
from funmatch.shipping.export import export, formats, sidecars, tensorflow
from funmatch.shipping.export.network import ExportNet
from funmatch.training.student.trained_model import open_trained_model

SIDE, CLASSES = 64, ("ant", "bee", "cat", "dog")
MEAN, STD = (0.5, 0.4, 0.3), (0.5, 0.25, 0.2)
FORMATS = ("keras", "savedmodel", "tflite")


def small_bit(padding: str = "zeros") -> nn.Module:
    """A BiT network with random values everywhere, and with kernels that are zero or tiny, as training leaves some."""
    generator = torch.Generator().manual_seed(0)
    net = bit.network((2, 1, 1, 1), 32, len(CLASSES), padding)
    with torch.no_grad():
        for parameter in net.parameters():
            scale = 0.05 if parameter.ndim == 4 else 0.3
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        net.get_submodule("stages.0.blocks.0.conv2").weight[3] = 0  # pyrefly: ignore
        net.get_submodule("stages.1.blocks.0.conv1").weight[2] *= 1e-5  # pyrefly: ignore
    return net


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    card = Card("bit", SIDE, SIDE / 80, MEAN, STD, CLASSES)
    place = tmp_path_factory.mktemp("models") / "bit"
    place.mkdir()
    classifier = Classifier(small_bit(), card, {"units": (2, 1, 1, 1), "width": 32}, 4, bit.OWN)
    save(classifier, place, card=card, about={})
    return place


@pytest.mark.parametrize("name", ["resnet10t", "resnetv2_50d_gn", "resnetv2_50"])
def test_other_networks_are_refused_before_tensorflow_is_imported(name):
    net = timm.create_model(name, num_classes=3)
    exported = ExportNet(Classifier(net, Card(name, 32, 1.0, MEAN, STD), {}, 3))
    with pytest.raises(
        funmatch.InputError, match=rf"{name} cannot be written for TensorFlow, as it .*resnetv2_50x1_bit"
    ):
        tensorflow.build(exported, 32, None)
    assert "tensorflow" not in sys.modules or find_spec("tensorflow")


def test_missing_tensorflow_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(funmatch.InputError, match=r"tensorflow is not installed; pip install 'funmatch\[tensorflow\]'"):
        tensorflow.import_keras()


def test_description_says_what_tensorflow_is_given():
    about = {"input": {"shape": ["n", 3, 8, 9], "order": "NCHW, RGB", "range": [0, 1]}}
    own = {"shape": ["n", 8, 9, 3], "order": "NHWC, RGB", "range": [0, 1]}
    assert sidecars.with_tensorflow(about, ["model.keras", "savedmodel"]) == {"input": own}
    assert sidecars.with_tensorflow(about, ["model.onnx", "model.tflite"]) == about | {"input_of_tensorflow": own}
    assert sidecars.with_tensorflow(about, ["model.onnx", "timm"]) == about


def by_torch(folder: Path, images: np.ndarray) -> np.ndarray:
    """Logits by torch's own layers, normalised here."""
    mean, std = (np.array(each, np.float32).reshape(3, 1, 1) for each in (MEAN, STD))
    with torch.inference_mode():
        return load(str(folder)).net.eval()(torch.from_numpy((images - mean) / std)).numpy()


def photos(folder: Path) -> Path:
    """Five images, in a folder with a split."""
    for i in range(5):
        paint(folder / "val" / "a" / f"{i}.png", i, (90, 80))
    return folder


@pytest.fixture(scope="module")
def needs_tensorflow():
    for module in ("tensorflow", "keras"):
        if find_spec(module) is None:
            pytest.skip(f"{module} is not installed")


@pytest.mark.slow
@pytest.mark.usefixtures("needs_tensorflow")
@pytest.mark.filterwarnings("ignore")
def test_exports_have_equal_outputs_and_are_read_again(folder, tmp_path):
    images, out = photos(tmp_path / "images"), tmp_path / "out"
    model = open_trained_model(str(folder))
    options = Export(model=str(folder), data=(str(images),), unlabelled=True, out=out, format=("onnx", *FORMATS))
    found = export.export(options, model, export.data_for(options, model))["formats"]
    assert {name: each["file"] for name, each in found.items() if name in FORMATS} == {
        "keras": "model.keras", "savedmodel": "savedmodel", "tflite": "model.tflite",
    }  # fmt: skip
    views = np.random.default_rng(0).random((5, 3, SIDE, SIDE), np.float32)
    expected = by_torch(folder, views)
    for name in FORMATS:
        assert found[name]["max_relative"] < 1e-4
        assert found[name]["same_top1"] == 1
        given = tensorflow.open_written(out / found[name]["file"])(views)
        assert np.abs(given - expected).max() < 1e-4 * np.abs(expected).max()
    about = json.loads((out / "preprocessing.json").read_text())
    assert about["input_of_tensorflow"]["shape"] == ["n", SIDE, SIDE, 3]
    for name in ("model.keras", "savedmodel"):
        again = load(f"savedmodel:{out / name}").eval()
        assert (again.card.mean, again.card.std, again.card.side) == (MEAN, STD, SIDE)
        with torch.inference_mode():
            assert np.abs(again(torch.from_numpy(views)).numpy() - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.slow
@pytest.mark.usefixtures("needs_tensorflow")
@pytest.mark.filterwarnings("ignore")
def test_bytes_probabilities_and_a_fixed_batch(folder, tmp_path):
    model = open_trained_model(str(folder))
    job = formats.make_job(model, uint8=True, probabilities=True, fixed_batch=2)
    views = np.random.default_rng(0).integers(0, 256, (3, 3, SIDE, SIDE), np.uint8)
    logits = torch.from_numpy(by_torch(folder, views.astype(np.float32) / 255))
    for name in FORMATS:
        formats.FORMATS[name].write(job, tmp_path)
        runtime = formats.FORMATS[name].open(job, tmp_path)
        assert (runtime.batch, runtime.dtype) == (2, np.uint8)
        assert np.abs(runtime(views) - logits.softmax(-1).numpy()).max() < 1e-4


@pytest.mark.slow
@pytest.mark.usefixtures("needs_tensorflow")
@pytest.mark.filterwarnings("ignore")
def test_padding_of_big_vision_is_written_and_read(tmp_path):
    classifier = Classifier(small_bit("-inf"), Card("bit", SIDE, 1.0, MEAN, STD), {}, len(CLASSES))
    views = np.random.default_rng(0).random((3, 3, SIDE, SIDE), np.float32)
    with torch.inference_mode():
        expected = classifier.eval()(torch.from_numpy(views)).numpy()
        zeros = Classifier(small_bit(), classifier.card, {}, 4).eval()(torch.from_numpy(views)).numpy()
    assert np.abs(zeros - expected).max() > 3e-3 * np.abs(expected).max()
    model = tensorflow.build(ExportNet(classifier), SIDE, None)
    for name in tensorflow.FILES:
        tensorflow.write(name, lambda: model, tmp_path)
        given = tensorflow.open_written(tmp_path / name)(views)
        assert np.abs(given - expected).max() < 1e-4 * np.abs(expected).max(), name
        if name != tensorflow.TFLITE:
            again = load(f"savedmodel:{tmp_path / name}").eval()
            with torch.inference_mode():
                assert np.abs(again(torch.from_numpy(views)).numpy() - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.slow
@pytest.mark.usefixtures("needs_tensorflow")
@pytest.mark.parametrize("name", FORMATS)
def test_examples_of_tensorflow_run_without_funmatch(name, folder, tmp_path):
    photo, out = paint(tmp_path / "photo.png", 0, (90, 80)), tmp_path / "out"
    options = Export(model=str(folder), out=out, format=(name,), verify=False)
    model = open_trained_model(str(folder))
    export.export(options, model, None)
    command = [sys.executable, "-P", "-W", "ignore", str(out / "example.py"), str(photo)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    view = model.preprocessing.view(torch.from_numpy(np.asarray(Image.open(photo)).copy()))
    logits = torch.from_numpy(by_torch(folder, view.numpy()[None])[0])
    shown = f"{CLASSES[int(logits.argmax())]} ({logits.softmax(-1).max():.1%})"
    assert shown in done.stdout
