"""Exports are the same function as timm's network with its own normalisation, in the runtime that will compute them."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from make_images import FEW
from PIL import Image
from torch import nn

import funmatch
from funmatch import cli
from funmatch.config import Export
from funmatch.data.decode import decode
from funmatch.models.classifier import Card, Classifier
from funmatch.models.save import save
from funmatch.ops.view_spec import Preprocessing
from funmatch.shipping import runtimes
from funmatch.shipping.export import export, formats, sidecars, verify
from funmatch.shipping.export.network import ExportNet
from funmatch.training.student.trained_model import TrainedModel, open_trained_model

NAMES = ("tabby, cat", 'the "best" dog', "two\nlines", "<b>&amp;", "=1+1")
MEAN, STD, SIDE = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in timm's layout: standardised convolutions, odd class names."""
    torch.manual_seed(0)
    net = timm.create_model("test_nfnet", num_classes=len(NAMES))
    nn.init.normal_(net.get_submodule("head.fc").weight, std=0.5)
    card = Card("nf", SIDE, SIDE / 30, MEAN, STD, NAMES, resample="antialias")
    place = tmp_path_factory.mktemp("models") / "nf"
    place.mkdir()
    save(Classifier(net, card, {}, len(NAMES)), place, card=card, about={})
    return place


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Smooth images of several sizes, in two classes, as a folder with splits."""
    rng, place = np.random.default_rng(0), tmp_path_factory.mktemp("photos")
    for split, count in (("train", 3), ("val", 4)):
        for label in ("a", "b"):
            (place / split / label).mkdir(parents=True)
            for i in range(count):
                small = Image.fromarray(rng.integers(0, 256, (7, 9, 3), np.uint8))
                small.resize((60 + 9 * i, 50 + 5 * i), Image.Resampling.BICUBIC).save(
                    place / split / label / f"{i}.jpg"
                )
    return place


def views(count: int = 6) -> np.ndarray:
    return np.random.default_rng(1).random((count, 3, SIDE, SIDE), np.float32)


def by_timm(folder: Path, images: np.ndarray) -> np.ndarray:
    """Logits of timm's own network, normalised here."""
    net = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    mean, std = (np.array(each, np.float32).reshape(3, 1, 1) for each in (MEAN, STD))
    with torch.inference_mode():
        return net(torch.from_numpy((images - mean) / std)).numpy()


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.fixture(scope="module")
def exported(folder: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exports") / "all"
    with pytest.raises(SystemExit) as ended:
        cli.main(
            ["export", str(folder), "--data", str(photos), "--unlabelled", "--out", str(out), "--format", "onnx",
             "torch-export", "openvino", "timm"]
        )  # fmt: skip
    assert ended.value.code == 0
    return out


@pytest.mark.parametrize("name", ["model.onnx", "model.pt2", "model.xml"])
def test_files_compute_what_timm_computes(name, exported, folder):
    runtime = runtimes.open_runtime(exported / name)
    assert relative(runtime(views()), by_timm(folder, views())) < 1e-5
    assert relative(runtime(views(1)), by_timm(folder, views(1))) < 1e-5  # any number of images


def test_timms_format_is_a_folder_that_timm_loads(exported, folder):
    assert relative(by_timm(exported / "timm", views()), by_timm(folder, views())) < 1e-6


def test_what_is_beside_the_model_tells_all_that_is_needed(exported):
    about = json.loads((exported / "preprocessing.json").read_text())
    assert about["class_names"] == list(NAMES)
    assert about["preprocessing"]["short_side"] == 30
    assert about["normalization"]["mean"] == list(MEAN)
    assert (exported / "labels.txt").read_text().splitlines()[:3] == ["tabby, cat", 'the "best" dog', "two\\nlines"]
    checked = json.loads((exported / "verify.json").read_text())
    assert checked["images"] == {"split": "val", "count": 8}
    for each in checked["formats"].values():
        assert each["max_relative"] < 1e-5
        assert each["same_top1"] == 1


def test_onnx_metadata_holds_names_and_no_path_of_this_machine(exported):
    model = onnx.load(exported / "model.onnx")
    metadata = {each.key: each.value for each in model.metadata_props}
    assert json.loads(metadata["class_names"]) == list(NAMES)
    assert "site-packages" not in (exported / "model.onnx").read_bytes().decode(errors="replace")
    # Weight standardization is folded: nothing of it is computed again for each image.
    weights = sum(node.op_type == "Conv" for node in model.graph.node)
    net = timm.create_model("test_nfnet")
    assert weights == sum(isinstance(module, nn.Conv2d) for module in net.modules())


def test_the_example_runs_without_funmatch(exported, photos):
    paths = sorted(map(str, photos.rglob("*.jpg")))
    blocked = "import runpy, sys; sys.modules['funmatch'] = sys.modules['torch'] = None; sys.argv = sys.argv[1:]; "
    command = [sys.executable, "-W", "error", "-c", blocked + "runpy.run_path(sys.argv[0], run_name='__main__')"]
    found = subprocess.run([*command, str(exported / "example.py"), *paths], capture_output=True, text=True, check=True)
    expected = [line for path in paths for line in f"{path}: {best_of(exported, path)}".split("\n")]
    assert [line.rpartition(" (")[0] if "%)" in line else line for line in found.stdout.splitlines()] == expected


def best_of(exported: Path, path: str) -> str:
    model = open_trained_model(str(exported / "timm"))
    image = torch.from_numpy(decode(Path(path).read_bytes(), cap=512).copy())
    with torch.inference_mode():
        return NAMES[int(model.classifier(model.preprocessing.view(image)[None]).argmax())]


def example(tmp_path: Path, how: Preprocessing, cap: int = 512, *, uint8: bool = False) -> ModuleType:
    """The module that an example of this preprocessing is."""
    about = {
        "input": {"shape": ["n", 3, how.side, how.side], "type": "uint8" if uint8 else "float32"},
        "preprocessing": {"largest_short_side": cap, **vars(how)}, "output": "logits",
    }  # fmt: skip
    (tmp_path / "example.py").write_text(sidecars.example(about, "model.onnx"))
    spec = importlib.util.spec_from_file_location("example", tmp_path / "example.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_images(folder: Path) -> list[Path]:
    """JPEGs from small to above four caps, one turned by EXIF and one a strip; PNGs of other modes."""
    rng, paths = np.random.default_rng(2), []
    for i, size in enumerate([(60, 45), (45, 60), (640, 530), (700, 900), (2100, 2300), (300, 30), (33, 33)]):
        small = Image.fromarray(rng.integers(0, 256, (9, 11, 3), np.uint8))
        image = small.resize(size, Image.Resampling.BICUBIC)
        paths.append(folder / f"{i}.jpg")
        exif = Image.Exif()
        exif[0x0112] = 6 if i == 3 else 1
        image.save(paths[-1], quality=92, exif=exif)
    paths += [folder / "clear.png", folder / "grey.png", folder / "palette.png"]
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    image.save(paths[-3])
    image.convert("L").save(paths[-2])
    image.convert("RGB").quantize(16).save(paths[-1])
    return paths


@pytest.mark.parametrize(
    "resample", ["antialias", "bicubic", "area", "tf", "lanczos", "torchvision-bilinear", "torchvision-nearest"]
)
@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize("uint8", [False, True])
def test_the_example_sees_images_as_evaluation_does(resample, squash, uint8, tmp_path):
    # With uint8 corners are rounded down, which is no further loop: the two have nothing to do with each other.
    how = Preprocessing(side=28, short_side=32, squash=squash, resample=resample, floor=uint8)
    preprocess = example(tmp_path, how, uint8=uint8).preprocess
    for path in write_images(tmp_path):
        view = how.view(torch.from_numpy(decode(path.read_bytes(), cap=512).copy())).numpy() * 255
        found = preprocess(path)
        assert found.shape == (3, 28, 28)
        assert found.dtype == (np.uint8 if uint8 else np.float32)
        difference = np.abs(found * (1.0 if uint8 else 255.0) - view)
        # Of images that get much lower than narrower, newer versions of Pillow resize the columns first, which rounds
        # otherwise.
        exact = resample in ("tf", "area")
        rounding = 1.01 if squash and resample in ("antialias", "bicubic") else 0.51 if uint8 and exact else 0.01
        assert difference.max() < rounding, path.name
        assert (difference > 0.51).mean() < 0.3, path.name


@pytest.mark.parametrize("name", ["model.xml", pytest.param("model.pt2", marks=pytest.mark.slow)])
def test_examples_of_other_formats_give_the_same_probability(name, exported, photos, tmp_path):
    about = json.loads((exported / "preprocessing.json").read_text())
    (tmp_path / "example.py").write_text(sidecars.example(about, name))
    for each in ("preprocessing.json", name, "model.bin"):
        (tmp_path / each).write_bytes((exported / each).read_bytes())
    photo = str(photos / "val/a/3.jpg")
    commands = [[sys.executable, "-I", str(place / "example.py"), photo] for place in (tmp_path, exported)]
    found, expected = (subprocess.run(each, capture_output=True, text=True, check=True).stdout for each in commands)
    assert found == expected
    assert "%)" in found


def test_the_example_scales_large_images_down_as_the_run_did(folder, tmp_path):
    model = open_trained_model(str(folder))
    assert model.cap == 512
    run = replace(model, knobs={"cap": 96})
    about = sidecars.describe(run, uint8=False, probabilities=False, fixed_batch=None)
    assert about["preprocessing"]["largest_short_side"] == 96
    preprocess = example(tmp_path, run.preprocessing, run.cap).preprocess
    path = write_images(tmp_path)[2]
    view = run.preprocessing.view(torch.from_numpy(decode(path.read_bytes(), cap=96).copy())).numpy()
    assert np.abs(preprocess(path) - view).max() < 1e-5
    larger = run.preprocessing.view(torch.from_numpy(decode(path.read_bytes(), cap=512).copy())).numpy()
    assert np.abs(larger - view).max() > 1e-3


@pytest.mark.parametrize("name", ["model.onnx", "model.xml", "model.pt2", "model.keras", "model.tflite", "savedmodel"])
def test_every_example_is_ten_to_thirty_lines_of_python(name):
    about = {
        "input": {"shape": [4, 3, 8, 8], "type": "uint8"}, "output": "probabilities",
        "preprocessing": {
            "largest_short_side": 512, "side": 8, "short_side": 10, "squash": False, "resample": "antialias",
        },
    }  # fmt: skip
    text = sidecars.example(about, name)
    compile(text, "example.py", "exec")
    assert "funmatch" not in text.partition('"""')[2].partition('"""')[2]
    assert "repeat(4, 0)" in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize(
    "name",
    ["onnx", pytest.param("torch-export", marks=pytest.mark.slow), pytest.param("openvino", marks=pytest.mark.slow)],
)
def test_uint8_probabilities_and_a_fixed_batch(name, folder, photos, tmp_path):
    out = tmp_path / "out"
    model = open_trained_model(str(folder))
    options = Export(
        model=str(folder), data=(str(photos),), unlabelled=True, out=out, input="uint8", probabilities=True,
        fixed_batch=4, format=(name,),
    )  # fmt: skip
    found = export.export(options, model, export.data_for(options, model))
    images = (views(7) * 255).round().astype(np.uint8)
    logits = torch.from_numpy(by_timm(folder, images.astype(np.float32) / 255))
    runtime = runtimes.open_runtime(out / found["formats"][name]["file"])
    assert (runtime.batch, runtime.dtype) == (4, np.uint8)
    assert np.abs(runtime(images) - logits.softmax(-1).numpy()).max() < 1e-5
    if name != "onnx":
        return
    session = onnxruntime.InferenceSession(out / "model.onnx")
    assert session.get_inputs()[0].shape == [4, 3, SIDE, SIDE]
    assert [each.name for each in session.get_outputs()] == ["probabilities"]


def test_an_export_that_differs_is_refused_and_leaves_nothing(folder, photos, tmp_path, monkeypatch):
    write = formats.FORMATS["onnx"].write

    def write_wrong(job: formats.Job, place: Path) -> None:
        with torch.no_grad():
            job.net.classifier.get_submodule("net.head.fc").bias[2] += 30
        write(job, place)

    wrong = formats.Format("model.onnx", write_wrong, formats.FORMATS["onnx"].open)
    monkeypatch.setitem(formats.FORMATS, "onnx", wrong)
    options = Export(model=str(folder), data=(str(photos),), unlabelled=True, out=tmp_path / "out")
    model = open_trained_model(str(folder))
    with pytest.raises(funmatch.InputError, match=r"the onnx export differs .* \d have another class; e.g. image \d: "):
        export.export(options, model, export.data_for(options, model))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_module_from_which_on_a_file_differs_is_named(folder, photos, tmp_path, monkeypatch):
    write, touched = formats.FORMATS["onnx"].write, "stem.conv3"

    def write_wrong(job: formats.Job, place: Path) -> None:
        write(job, place)
        model = onnx.load(place / "model.onnx")
        (kernel,) = (each for each in model.graph.initializer if each.name.endswith(f"{touched}.weight"))
        kernel.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(kernel) * 1.5, kernel.name))
        onnx.save(model, place / "model.onnx")

    wrong = formats.Format("model.onnx", write_wrong, formats.FORMATS["onnx"].open)
    monkeypatch.setitem(formats.FORMATS, "onnx", wrong)
    options = Export(model=str(folder), data=(str(photos),), unlabelled=True, out=tmp_path / "out", batch=3)
    model = open_trained_model(str(folder))
    with pytest.raises(funmatch.InputError, match=rf"the first module that differs is {touched} \(Conv2d\). Nothing"):
        export.export(options, model, export.data_for(options, model))


class Cancelling(nn.Module):
    """A network whose outputs are small differences of large numbers, so that fp32 rounds them visibly."""

    num_classes = 3

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 256, 3, bias=False)
        self.fc = nn.Linear(256, 3)
        with torch.no_grad():
            kernel = torch.randn(128, 3, 3, 3, generator=torch.Generator().manual_seed(0))
            self.conv.weight.copy_(torch.cat([1e3 * kernel, 1e3 * kernel + 1e-2 * kernel.flip(0)]))
            head = torch.randn(3, 128, generator=torch.Generator().manual_seed(1))
            self.fc.weight.copy_(torch.cat([head, -head], 1))

    def forward(self, images):
        return self.fc(self.conv(images).mean((2, 3)))


def test_a_network_that_amplifies_rounding_is_judged_by_its_own(photos, tmp_path):
    model = open_trained_model("python:x", side=24, given={"python:x": Cancelling()})
    options = Export(model="python:x", data=(str(photos),), unlabelled=True, out=tmp_path / "out")
    found = export.export(options, model, export.data_for(options, model))["formats"]["onnx"]
    assert found["max_relative"] > verify.MAX_RELATIVE
    assert found["rounding"] > verify.MAX_RELATIVE / verify.ROUNDINGS
    assert found["max_relative"] <= verify.ROUNDINGS * found["rounding"]


def test_comparison_counts_ties_and_not_a_number():
    reference = np.array([[1.0, 1.0 - 1e-6, 0], [3, 1, 0], [5, 2, 0]])
    near = reference + np.array([[-1e-6, 1e-6, 0], [0, 0, 0], [0, 0, 0]])
    found = verify.compare(reference, near)
    assert (found.ties, found.others, found.agrees) == (1, (), True)
    assert found.same_top1 == pytest.approx(2 / 3)
    far = reference.copy()
    far[1] = [0, 4, 0]
    assert verify.compare(reference, far).others == (1,)
    assert verify.compare(reference, far).max_relative == pytest.approx(1)
    broken = reference.copy()
    broken[2, 1] = np.nan
    assert not verify.compare(reference, broken).agrees
    with pytest.raises(funmatch.InputError, match="shape"):
        verify.compare(reference, reference[:2])


class Bessel(nn.Module):
    """An operator that ONNX and OpenVINO do not have."""

    num_classes = 3

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))

    def forward(self, images):
        return torch.special.bessel_j0(self.body(images))


class Branching(nn.Module):
    """Code that depends on the values of an image."""

    num_classes = 3

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(192, 3)

    def forward(self, images):
        logits = self.fc(images.flatten(1))
        return logits if images.mean() > 0 else -logits


@pytest.mark.parametrize(
    ("module", "name", "message"),
    [
        (Bessel, "onnx", "the operator aten.special_bessel_j0.default of .*; try another --opset"),
        (Bessel, "openvino", "the operator aten.special_bessel_j0.default of .*; try --format onnx"),
        (Branching, "onnx", r"cannot be exported at test_export.py:\d+ \(return logits if .* depends on the values"),
    ],
)
def test_what_cannot_be_exported_is_named(module, name, message, tmp_path, capfd):
    model = open_trained_model("python:x", side=8, given={"python:x": module()})
    options = Export(model="python:x", format=(name,), out=tmp_path / "out", verify=False)
    with pytest.raises(funmatch.InputError, match=message):
        export.export(options, model, None)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().out == ""


def test_attention_is_exported_as_matrix_products(tmp_path):
    net = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=3)
    card = Card("vit", 32, 1.0, MEAN, STD)
    model = open_trained_model("python:x", given={"python:x": Classifier(net, card, num_classes=3)})
    options = Export(model="python:x", out=tmp_path / "out", verify=False)
    export.export(options, model, None)
    images = np.random.default_rng(0).random((3, 3, 32, 32), np.float32)
    with torch.inference_mode():
        expected = model.classifier(torch.from_numpy(images)).numpy()
    assert relative(runtimes.open_runtime(tmp_path / "out/model.onnx")(images), expected) < 1e-5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "onxx"], "unknown format 'onxx'"),
        (["--logits", "--probabilities"], "exclude each other"),
        (["--dynamic", "--fixed-batch", "2"], "exclude each other"),
        ([], "is not a run, so pass --out"),
        (["--out", "OUT"], "is not a run, so pass --data, or --no-verify"),
        (["--out", "EXISTS", "--no-verify"], "exists; pass --overwrite"),
        (["--out", "EXISTS", "--no-verify", "--overwrite"], "is not an export, so it is not replaced"),
        (["--out", "FILE", "--no-verify"], "is a file; choose another --out"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(words, message, folder, tmp_path, capsys):
    (tmp_path / "exists").mkdir()
    (tmp_path / "exists/mine").write_text("mine")
    (tmp_path / "file").write_text("")
    places = {"OUT": "out", "EXISTS": "exists", "FILE": "file"}
    words = [str(tmp_path / places[each]) if each in places else each for each in words]
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", str(folder), *words])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exists", "file"]
    assert (tmp_path / "exists/mine").read_text() == "mine"


def test_an_export_is_replaced_only_when_asked(folder, tmp_path):
    model = open_trained_model(str(folder))
    options = Export(model=str(folder), out=tmp_path / "out", verify=False, format=("torch-export",))
    export.export(options, model, None)
    other = options.model_copy(update={"format": ("timm",)})
    with pytest.raises(funmatch.InputError, match="exists"):
        export.export(other, model, None)
    export.export(other.model_copy(update={"overwrite": True}), model, None)
    assert not (tmp_path / "out/model.pt2").exists()
    assert (tmp_path / "out/timm/model.safetensors").exists()


def test_a_repeated_export_finds_itself_done(folder, photos, tmp_path, capsys):
    words = ["export", str(folder), "--out", str(tmp_path / "out"), "--data", str(photos), "--unlabelled", "--json"]

    def run(*more: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main([*words, *more])
        return (ended.value.code, *capsys.readouterr())

    first = run("--format", "timm", "torch-export")
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    half = tmp_path / ".out.old.partial"
    half.mkdir()  # a kill after the new folder had its name
    code, printed, said = run("--format", "timm", "torch-export")
    assert code == 0
    results = [json.loads(each) for each in (first[1], printed)]
    assert all(results[0][key] == results[1][key] for key in ("out", "model", "run", "formats", "quantized"))
    assert "is there already" in said
    assert not half.exists()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == written
    assert "--format; pass --overwrite" in run("--format", "torch-export")[2]
    # The images are compared by their content, which --no-verify leaves unread.
    assert "--verify, images; pass --overwrite" in run("--format", "timm", "torch-export", "--no-verify")[2]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == written
    code, _, said = run("--format", "timm", "torch-export", "--overwrite")
    assert code == 0
    assert "is there already" not in said


@pytest.mark.parametrize("name", ["timm/model.safetensors", "labels.txt", "export.json"])
def test_an_export_with_a_changed_file_is_not_taken_for_done(name, folder, tmp_path):
    model = open_trained_model(str(folder))
    options = Export(model=str(folder), out=tmp_path / "out", verify=False, format=("timm",))
    export.export(options, model, None)
    path = tmp_path / "out" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(funmatch.InputError, match=rf"{name}.*; pass --overwrite"):
        export.export(options, model, None)
    assert path.read_bytes() == bytes(content)
    export.export(options.model_copy(update={"overwrite": True}), model, None)
    export.export(options, model, None)


def test_an_export_of_other_weights_is_not_taken_for_done(folder, tmp_path):
    model = open_trained_model(str(folder))
    options = Export(model=str(folder), out=tmp_path / "out", verify=False, format=("timm",))
    export.export(options, model, None)
    with torch.no_grad():
        next(model.classifier.net.parameters()).mul_(1.001)
    with pytest.raises(funmatch.InputError, match="exported with other model; pass --overwrite"):
        export.export(options, model, None)


def test_a_runtime_that_is_missing_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(funmatch.InputError, match=r"openvino is not installed; pip install 'funmatch\[openvino\]'"):
        runtimes.require("openvino")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(funmatch.InputError, match=r"onnxruntime is not installed; pip install 'funmatch\[ship\]'"):
        runtimes.open_runtime(tmp_path / "model.onnx")


@pytest.mark.parametrize("name", ["model.onnx", "model.pt2", "model.xml"])
def test_a_damaged_file_is_an_error_with_its_path(name, tmp_path):
    (tmp_path / name).write_bytes(b"damaged")
    with pytest.raises(funmatch.InputError, match=name):
        runtimes.open_runtime(tmp_path / name)


def test_a_run_is_exported_into_its_own_folder_and_says_what_it_is_of(tmp_path):
    options: dict = {"steps": 2, "device": "cpu", "compile": "off", "eval_every": 2, "eval_data": FEW}
    run = funmatch.distill("fashion-mini", "fashion-mini-teacher", "fashion-mini-student", tmp_path / "run", **options)
    model = open_trained_model(str(run.folder))
    assert isinstance(model, TrainedModel)
    config = Export(model=str(run.folder), images=20)
    found = export.export(config, model, export.data_for(config, model))
    about = json.loads((run.folder / "export/preprocessing.json").read_text())
    assert about["source"]["step"] == 2
    assert about["source"]["data"] == ["fashion-mini"]
    assert "MIT" in str(about["source"]["licence_of_data"])
    assert about["preprocessing"]["resample"] == model.preprocessing.resample
    assert found["formats"]["onnx"]["images"] == 20
    assert ExportNet(model.classifier).classifier is not model.classifier
