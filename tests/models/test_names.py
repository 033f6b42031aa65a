"""Model names: a user's functions and modules, the paper's files; listing and importing."""

import base64
import hashlib
import json
import math
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from make_images import FEW
from safetensors.torch import load_file, save_file
from test_bit import as_second_layout, assert_same, images, random_bit, reference
from test_distill import MINI, TEACHER

import funmatch
from funmatch.cli import merge_repeated
from funmatch.commands.networks import import_model, models
from funmatch.config import Distill, Import, Models, Report
from funmatch.errors import InputError
from funmatch.models.load import load
from funmatch.models.origins import download
from funmatch.models.timm_models import create_meta
from funmatch.runtime.disk.checksums import MANIFEST

MODULE = """
import torch
import funmatch

class Net(torch.nn.Module):
    def __init__(self, width, classes):
        super().__init__()
        self.body = torch.nn.Conv2d(3, width, 3, 2)
        self.head = torch.nn.Linear(width, classes)

    def forward(self, x):
        return self.head(self.body(x).relu().mean((2, 3)))

def small(num_classes=10, width=8):
    torch.manual_seed(0)
    return Net(width, num_classes)

def normalised():
    card = funmatch.Card("mine", 16, 0.9, (0.5,) * 3, (0.25,) * 3, ("a", "b"))
    return funmatch.Classifier(Net(4, 2), card, num_classes=2)

def broken():
    raise RuntimeError("no luck")

def other():
    return 3

def dense():
    return torch.nn.Conv2d(3, 4, 3)
"""


@pytest.fixture(name="module", autouse=True)
def user_module(tmp_path, monkeypatch):
    """A Python module in the current folder; its name differs in each test because Python caches imports."""
    name = f"own_{hashlib.md5(str(tmp_path).encode()).hexdigest()[:8]}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return name


def test_model_from_a_users_function(module):
    model = funmatch.load(f"{module}:small", options=("width=12",), classes=3, side=20)
    assert (model.num_classes, model.card.side, model.count_parameters()) == (3, 20, 12 * 27 + 12 + 3 * 12 + 3)
    views = torch.rand(2, 3, 20, 20)
    assert torch.equal(model(views), model.net(views)), "a plain module gets views in [0, 1]"
    other = funmatch.load(f"{module}:normalised")
    assert (other.card.classes, other.card.side, other.num_classes) == (("a", "b"), 16, 2)
    assert torch.equal(other(views), other.net((views - 0.5) / 0.25))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere:small", "cannot import nowhere"),
        ("MODULE:smal", "has no smal"),
        ("MODULE:broken", "fails with no arguments: no luck"),
        ("MODULE:other", r"returned int, expected a torch\.nn\.Module"),
        ("MODULE:dense", "is not a classifier"),
    ],
)
def test_functions_that_return_no_classifier_are_rejected(module, name, message):
    with pytest.raises(InputError, match=message):
        funmatch.load(name.replace("MODULE", module))


def test_user_student_is_trained_saved_and_reloaded(module):
    run = funmatch.distill(student=f"{module}:small", teacher=TEACHER, out="run", side=32, steps=3, **_mini())
    assert run.figures["parameters"] == 8 * 27 + 8 + 10 * 8 + 10
    weights = Path("run/student/model.safetensors")
    reloaded = funmatch.load(f"{module}:small", weights=weights)
    assert (reloaded.num_classes, reloaded.card.side) == (10, 32)
    state = load_file(weights)
    assert all(torch.equal(state[name], tensor) for name, tensor in reloaded.net.state_dict().items())
    metrics = funmatch.evaluate(f"{module}:small", weights=weights, data=FEW)
    assert metrics["top1"] == pytest.approx(run.top1)


def test_saved_file_cannot_choose_which_code_runs(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    config = {"architecture": "os:mkdir", "model_args": {"path": str(tmp_path / "harm")}, "num_classes": 2}
    (folder / "config.json").write_text(json.dumps(config | {"pretrained_cfg": {}}))
    save_file({"w": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(InputError, match="if you trust that code, name it yourself: os:mkdir"):
        load(str(folder))
    assert not (tmp_path / "harm").exists()


def test_modules_passed_from_python_are_not_changed():
    teacher, student = funmatch.load(TEACHER), load("resnet10t", options=TINY_OPTIONS, classes=10)
    before = {name: tensor.clone() for name, tensor in [*teacher.state_dict().items(), *student.state_dict().items()]}
    run = funmatch.distill(student=student, teacher=teacher, out="run", side=32, steps=3, ema=0.9, **_mini())
    after = dict([*teacher.state_dict().items(), *student.state_dict().items()])
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert student.training
    assert funmatch.load(run.folder).num_classes == 10
    config = json.loads(Path("run/config.json").read_text())["knobs"]
    assert (config["teacher"], config["student"]) == (["python:Classifier"], "python:Classifier-1")
    with pytest.raises(InputError, match="given from Python"):
        load("python:Classifier")
    with pytest.raises(InputError, match="a model is a name or a"):
        funmatch.evaluate(3)


TINY_OPTIONS = ("channels=(8,8,16,16)", "stem_width=8")


def _mini() -> dict:
    return {name: value for name, value in MINI.items() if name != "student"}


def test_ema_follows_its_formula_and_is_saved():
    run = funmatch.distill(teacher=TEACHER, out="run", steps=4, ema=0.5, save_every=1, **MINI | {"eval_every": 2})
    assert set(run.figures["ema"]) >= {"top1", "agreement", "kl"}
    average = load_file("run/student-ema/model.safetensors")
    student = load_file("run/student/model.safetensors")
    assert any(not torch.equal(average[name], student[name]) for name in student)
    checkpoints = sorted(Path("run/checkpoints").glob("step-*"))
    # The last two checkpoints hold the average after steps 3 and 4, and the student's weights after step 4.
    before, after = (load_file(folder / "average.safetensors") for folder in checkpoints)
    student_now = load_file(checkpoints[-1] / "student.safetensors")
    decay = min(0.5, (1 + 4) / (10 + 4))
    for name, tensor in after.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, decay * before[name] + (1 - decay) * student_now[name])
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "ema"] == [2, 4]
    assert funmatch.evaluate("run/student-ema", data=FEW)["top1"] == pytest.approx(run.figures["ema"]["top1"])


def test_student_from_weights_gets_a_zero_head_for_other_classes():
    torch.manual_seed(0)
    net = timm.create_model("resnet10t", num_classes=7, channels=(8, 8, 16, 16), stem_width=8)
    torch.save({"state_dict": {f"module.{name}": value for name, value in net.state_dict().items()}}, "w.pt")
    model = load("resnet10t", weights=Path("w.pt"), options=TINY_OPTIONS, classes=3)
    assert (model.num_classes, model.net.fc.weight.abs().sum(), model.net.fc.bias.abs().sum()) == (3, 0, 0)
    state = net.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.net.state_dict().items() if "fc" not in name)
    same = load("resnet10t", weights=Path("w.pt"), options=TINY_OPTIONS, classes=7)
    assert torch.equal(same.net.fc.weight, net.fc.weight), "a head that fits is kept"
    run = funmatch.distill(
        student="resnet10t", student_weights="w.pt", student_kwargs={"channels": (8, 8, 16, 16), "stem_width": 8},
        drop_rate=0.1, drop_path=0.1, side=32, teacher=TEACHER, out="run", steps=1, **_mini(),
    )  # fmt: skip
    config = json.loads((run.folder / "student" / "config.json").read_text())
    assert (config["model_args"]["drop_rate"], config["model_args"]["drop_path_rate"]) == (0.1, 0.1)


def test_evaluation_does_not_depend_on_the_batch_size():
    funmatch.distill(student="resnet10t", student_kwargs={"channels": (8, 8, 16, 16), "stem_width": 8}, side=32,
                     teacher=TEACHER, out="run", steps=3, **_mini())  # fmt: skip
    batched = funmatch.evaluate("run", split="val", batch=128)
    one_by_one = funmatch.evaluate("run", split="val", batch=1)
    assert batched["top1"] == one_by_one["top1"]
    assert batched["kl"] == pytest.approx(one_by_one["kl"], rel=1e-4)


class FileServer(BaseHTTPRequestHandler):
    content, claimed = b"", b""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.claimed)))
        digest = base64.b64encode(hashlib.md5(self.claimed).digest()).decode()
        self.send_header("x-goog-hash", "crc32c=AAAAAA==")
        self.send_header("x-goog-hash", f"md5={digest}")
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, *_):
        pass


@pytest.fixture(name="server")
def file_server(monkeypatch, tmp_path):
    monkeypatch.setenv("FUNMATCH_CACHE", str(tmp_path / "cache"))
    server = HTTPServer(("127.0.0.1", 0), FileServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(download, "BASE_URL", f"http://127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.usefixtures("server")
def test_published_file_is_downloaded_once_and_checked(tmp_path):
    weights = random_bit(50, 1)
    np.savez(tmp_path / "w.npz", **as_second_layout(weights))
    FileServer.content = FileServer.claimed = (tmp_path / "w.npz").read_bytes()
    model = load("bit:R50x1_160")
    assert (model.card.side, model.card.crop_fraction) == (160, 160 / 192)
    with torch.inference_mode():
        assert_same(model, reference(weights, images(), -math.inf))
    FileServer.content = b""
    load("bit:R50x1_160")
    assert not list((tmp_path / "cache").rglob("*.partial"))


@pytest.mark.usefixtures("server")
def test_damaged_download_is_removed(tmp_path):
    FileServer.claimed = b"what was sent"
    for FileServer.content in (b"what was sant", b"what"):
        with pytest.raises(InputError, match=r"is damaged|cannot download"):
            load("bit:R50x1_224")
    assert not list((tmp_path / "cache").rglob("*.npz*"))


def test_error_without_a_network_says_where_to_put_the_file(monkeypatch, tmp_path):
    monkeypatch.setenv("FUNMATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(
        InputError, match=r"cannot download .*R152x2_T_pet128.npz .*put it at .*weights/R152x2_T_pet128.npz"
    ):
        load("bit:R152x2_T_pet128")
    with pytest.raises(InputError, match="did you mean 'R152x2_T_pet128'"):
        load("bit:R152x2_T_pets128")


def test_import_writes_a_folder_that_loads_with_equal_logits(tmp_path):
    weights = random_bit(50, 1)
    np.savez(tmp_path / "w.npz", **as_second_layout(weights))
    (tmp_path / "names.txt").write_text("\n".join("abcde"))
    found = import_model.import_model(
        Import(model="w.npz", out=tmp_path / "out", side=128, crop_fraction=0.8, class_file=Path("names.txt"))
    ).metrics
    assert (found["classes"], found["side"], found["mean"]) == (5, 128, [0.5] * 3)
    model = load(str(tmp_path / "out"))
    assert (model.card.side, model.card.crop_fraction, model.card.classes) == (128, 0.8, tuple("abcde"))
    with torch.inference_mode():
        assert_same(model, reference(weights, images(), -math.inf))
    with pytest.raises(InputError, match="exists; choose another"):
        import_model.import_model(Import(model="w.npz", out=tmp_path / "out"))
    imported = import_model.import_model(Import(model="w.npz", out=tmp_path / "other", inputs="0..1")).metrics
    assert (imported["mean"], imported["std"]) == ([0.0] * 3, [1.0] * 3)
    (tmp_path / "names.txt").write_text("a\nb")
    with pytest.raises(InputError, match="2 distinct names, but the network has 5 classes"):
        import_model.import_model(Import(model="w.npz", out=tmp_path / "third", class_file=Path("names.txt")))
    assert not (tmp_path / "third").exists()


def test_models_are_listed_with_their_cost():
    found = {
        each["name"]: each
        for each in models.list_models(Models(pattern="resnetv2_50x1_bit", side=128)).metrics["models"]
    }
    assert found["resnetv2_50x1_bit"]["gflop"] == pytest.approx(2.67, abs=0.01)
    assert found["resnetv2_50x1_bit"]["parameters"] == 25_549_352
    tagged = models.list_models(Models(pattern="resnetv2_50x1_bit.goog_in21k*")).metrics["models"]
    assert [each["classes"] for each in tagged] == [21843, 1000]
    assert models.match_names("")[0] == "fashion-mini-teacher"
    assert "bit:R152x2_T_pet128" in models.match_names("pet128")
    with pytest.raises(InputError, match="did you mean"):
        models.list_models(Models(pattern="resnetv3"))


def test_many_names_are_listed_at_once_and_figures_take_no_memory(monkeypatch):
    """A pattern that matched a network of 4.4 billion parameters once built it, in 12 GB."""
    from funmatch.models import flops

    with monkeypatch.context() as changed:
        changed.setattr(flops, "gflop", None)  # nothing is counted
        listed = models.list_models(Models(pattern="resnet*")).metrics
    assert len(listed["models"]) > models.FEW
    assert not listed["counted"]
    assert {each["name"]: each for each in listed["models"]}["resnet50"] == {
        "name": "resnet50", "parameters": None, "gflop": None, "side": 224, "classes": 1000,
        "source": f"timm, {len(timm.list_pretrained('resnet50.*'))} with weights",
    }  # fmt: skip
    sizes = {name: (each.input_size[-1], each.num_classes) for name in timm.list_pretrained("vit_*")
             if (each := timm.get_pretrained_cfg(name))}  # fmt: skip
    assert {name: models._size(name) for name in sizes} == sizes
    (largest,) = models.list_models(Models(pattern="eva02_enormous_patch14_clip_224")).metrics["models"]
    assert largest["parameters"] == 4_350_556_928
    assert all(parameter.is_meta for parameter in create_meta("eva02_enormous_patch14_clip_224", {}).parameters())


def test_repeated_options_are_merged():
    argv = ["--teacher", "a", "--side", "3", "--teacher", "b", "c", "--out", "x", "--teacher=d", "--temperature", "-1"]
    assert merge_repeated(argv, Distill) == [
        "--teacher",
        "a",
        "b",
        "c",
        "d",
        "--side",
        "3",
        "--out",
        "x",
        "--temperature",
        "-1",
    ]
    assert merge_repeated(["one", "two", "--out", "x"], Report) == ["one", "two", "--out", "x"]
    assert merge_repeated(["--teacher-side", "3", "--teacher_side", "4"], Distill) == ["--teacher-side", "3", "4"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("w.pt", "holds only weights; pass the name of its architecture"),
        ("gone.npz", "no weights file gone.npz"),
        ("folder", "is a SavedModel of Keras; pass savedmodel:"),
        ("savedmodel:gone", "gone"),
    ],
)
def test_unusable_model_files_are_rejected(tmp_path, name, message):
    (tmp_path / "w.pt").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "saved_model.pb").write_bytes(b"")
    with pytest.raises(InputError, match=message):
        load(name)


def edited_network() -> torch.nn.Module:
    """A timm network in which every ReLU was replaced afterwards."""
    net = timm.create_model("resnet10t", num_classes=10, channels=(8, 8, 16, 16), stem_width=8)
    for owner in list(net.modules()):
        for name, module in owner.named_children():
            if isinstance(module, torch.nn.ReLU):
                setattr(owner, name, torch.nn.Tanh())
    return net


def unserializable_network() -> torch.nn.Module:
    """A timm network built with an argument that JSON cannot hold."""
    return timm.create_model("resnet10t", num_classes=10, channels=(8, 8, 16, 16), act_layer=torch.nn.SiLU)


@pytest.mark.parametrize("make", [edited_network, unserializable_network])
def test_edited_timm_network_is_not_saved_under_a_timm_name(make):
    funmatch.distill(student=make(), teacher=TEACHER, out="run", side=32, steps=2, **_mini())
    assert json.loads(Path("run/student/config.json").read_text())["architecture"].startswith("python:")
    with pytest.raises(InputError, match="given from Python"):
        load("run")


def test_unchanged_timm_network_is_saved_under_its_timm_name():
    net = timm.create_model("resnet10t", num_classes=10, in_chans=1)
    run = funmatch.distill(student=net, teacher=TEACHER, out="run", side=32, steps=2, **_mini())
    assert load("run").net.pretrained_cfg["architecture"] == "resnet10t"
    assert funmatch.evaluate("run")["kl"] == pytest.approx(run.figures["kl"], rel=1e-4)


def test_resuming_with_another_module_is_refused():
    def student(width):
        return load("resnet10t", options=(f"channels=({width},{width},16,16)", "stem_width=8"), classes=10)

    funmatch.distill(student=student(8), teacher=TEACHER, out="run", side=32, steps=1, **_mini())
    with pytest.raises(InputError, match="the student's content"):
        funmatch.distill(student=student(12), teacher=TEACHER, out="run", side=32, steps=1, **_mini())


def test_options_that_conflict_with_a_module_are_rejected():
    net = load("resnet10t", options=TINY_OPTIONS, classes=10)
    with pytest.raises(InputError, match=r"a module is used as it is; leave out drop_rate=0\.5"):
        funmatch.distill(student=net, teacher=TEACHER, out="run", side=32, steps=1, drop_rate=0.5, **_mini())
    with pytest.raises(InputError, match="num_classes=5 conflicts with the data's 10"):
        load("resnet10t", options=(*TINY_OPTIONS, "num_classes=5"), classes=10)


def test_class_count_comes_from_the_actual_head():
    net = timm.create_model("resnet10t", num_classes=1000, channels=(8, 8, 16, 16))
    net.fc = torch.nn.Linear(16, 10)
    assert load(net).num_classes == 10
    features = timm.create_model("resnet10t", num_classes=0, channels=(8, 8, 16, 16))
    assert load(features).num_classes == 0
    features.fc = torch.nn.Linear(16, 10)
    assert load(features).num_classes == 10


def test_evaluation_does_not_change_a_module():
    model = funmatch.load(TEACHER).train()
    name = model.card.name
    funmatch.evaluate(model, data=FEW, split="val")
    assert model.training
    assert model.card.name == name
    assert all(parameter.requires_grad for parameter in model.parameters())


class TiedWeights(torch.nn.Module):
    """Two layers share one tensor, which safetensors would refuse to write twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        self.head = torch.nn.Linear(3, 10)

    def forward(self, x):
        return self.head(self.second(self.first(x.mean((2, 3)))))


def test_tied_weights_are_saved():
    funmatch.distill(student=TiedWeights(), teacher=TEACHER, out="run", side=32, steps=2, save_every=1, **_mini())
    state = load_file("run/student/model.safetensors")
    assert torch.equal(state["first.weight"], state["second.weight"])


@pytest.mark.parametrize(
    "change",
    [
        {"crop_pct": -1}, {"input_size": [3, 0, 0]}, {"std": [0, 0, 0]}, {"mean": None}, {"mean": "abc"},
        {"mean": [0.5], "std": [0.5]},
    ],
)  # fmt: skip
def test_invalid_cards_are_rejected(finished_run, change):
    finished_run(Path("run"), teacher=TEACHER, steps=1, **MINI)
    path = Path("run/student/config.json")
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"pretrained_cfg": config["pretrained_cfg"] | change}))
    path.with_name(MANIFEST).unlink()  # as the message about changed files says
    with pytest.raises(InputError, match=r"is not valid|cannot build"):
        load("run")


def test_weights_of_unusable_types_are_rejected():
    state = timm.create_model("resnet10t", num_classes=3, channels=(8, 8, 16, 16), stem_width=8).state_dict()

    def assert_refused(message, **changes):
        torch.save(state | changes, "w.pt")
        with pytest.raises(InputError, match=message):
            load("resnet10t", weights="w.pt", options=TINY_OPTIONS)

    assert_refused("not finite", **{"fc.weight": state["fc.weight"].double() * 1e300})
    assert_refused("not a dense tensor", **{"fc.weight": state["fc.weight"].to(torch.complex64)})
    assert_refused(r"fc.weight has shape \(\)", **{"fc.weight": torch.tensor(1.0)})
    torch.save({1: torch.zeros(1)}, "w.pt")
    with pytest.raises(InputError, match="expected a dict of tensors by name"):
        load("resnet10t", weights="w.pt")


def test_empty_and_unexpandable_names_are_rejected(funmatch):
    argv = ["--data", "fashion-mini", "--teacher", "", "--student", "resnet10t", "--steps", "1", "--out", "r"]
    result = funmatch("distill", *argv, check=2)
    assert "teacher is empty" in result.stderr
    result = funmatch("evaluate", "~nosuchuser/x", "--data", "fashion-mini", check=2)
    assert "user name that does not exist" in result.stderr
