"""What can be known without torch is refused before it is imported: all problems at once, a line each."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from make_images import FEW

import funmatch as package
from funmatch.commands import verbs
from funmatch.commands.networks import models
from funmatch.config import Models
from funmatch.models import names
from funmatch.models.names import check_architecture, check_model_name, current_name
from funmatch.reports.result import Result

RUN = ["distill", "--data", FEW, "--teacher", "fashion-mini-teacher", "--student", "fashion-mini-student"]
END = ["--steps", "2", "--out", "o"]
ALONE = """
import json, sys
from funmatch.cli import main
for words in json.loads(sys.argv[1]):
    try:
        main(words)
    except SystemExit as ended:
        print(ended.code, "torch" in sys.modules, "timm" in sys.modules)
"""


def test_wrong_names_and_places_need_no_torch(tmp_path):
    names.timm_names()  # kept in the cache, which the process below shares
    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "other" / "mine.txt").touch()
    commands = {
        "no weights file nope.pt": [*RUN, *END, "--student-weights", "nope.pt"],
        "unknown model 'restnet18'; did you mean 'resnet18'": [*RUN, "--student", "restnet18", *END],
        "there is no folder ./nopics": [*RUN, "--data", "./nopics", *END],
        "file is a file; choose another folder": [*RUN, "--steps", "2", "--out", "file/run"],
        "file exists and is not a run": [*RUN, *END[:-1], "file"],
        "other exists and is not a run": [*RUN, "--steps", "2", "--out", "other"],
        "unknown model 'nowhere'": ["evaluate", "nowhere", "--data", "fashion-mini"],
        "pass hf-hub:google/vit": ["evaluate", "google/vit", "--data", "fashion-mini"],
        "cannot write to --out /proc/run": [*RUN, "--steps", "2", "--out", "/proc/run"],
        "empty is empty; expected <split>/<class>/*.jpg": [*RUN, "--data", "empty", *END],
        "text.pt is a text file, not weights; it begins with 'hello'": [*RUN, *END, "--student-weights", "text.pt"],
        "unknown device 'gpu'; for a GPU of NVIDIA or AMD pass --device cuda": [*RUN, *END, "--device", "gpu"],
        "unknown device '1'; for a GPU of NVIDIA or AMD pass --device cuda:1": [*RUN, *END, "--device", "1"],
        "for the weights of the model itself, pass --weights": [
            "evaluate", "resnet18", "--data", "fashion-mini", "--teacher-weights", "text.pt",
        ],
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", ALONE, json.dumps(list(commands.values()))],
        capture_output=True, text=True, cwd=tmp_path, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["2 False False"] * len(commands)
    for message in commands:
        assert message in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "other", "text.pt"]


@pytest.mark.parametrize("name", verbs.VERBS)
def test_what_is_loaded_is_said_before_it_is(name, monkeypatch, capsys):
    def load(function):
        if function == verbs.VERBS[name].run:
            said.append(capsys.readouterr())
            return lambda _options: Result(None, {})
        return verbs_load(function)

    said, verbs_load = [], verbs.load_function
    monkeypatch.setattr(verbs, "load_function", load)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    verbs.run_verb(name, Models.checked())
    silent = name in ("config", "cache", "models")
    libraries = "PyTorch" if name in ("data", "prepare") else "PyTorch and timm"
    assert said[0].err == ("" if silent else f"{name}: loading {libraries} …\n")
    assert said[0].out == ""


def test_what_says_nothing_loads_nothing_that_takes_seconds():
    silent = [verb.run for verb in verbs.VERBS.values() if not verb.loads]
    lines = "import sys; from funmatch.commands.verbs import load_function"
    lines += f"; [load_function(each) for each in {silent}]; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", lines], check=True)


def test_models_with_figures_say_what_is_loaded(monkeypatch, capsys):
    names.timm_names()  # of an empty cache they would be listed first, which loads timm and says so
    capsys.readouterr()
    monkeypatch.setattr(models, "_figures", lambda *_: dict.fromkeys(("parameters", "gflop")))
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    models.list_models(Models.checked(pattern="fashion-mini-teacher"))
    assert "models: loading PyTorch and timm …" in capsys.readouterr().err
    models.list_models(Models.checked(pattern="resnet"))
    assert "loading" not in capsys.readouterr().err


def test_all_problems_come_at_once(funmatch):
    words = [*RUN, "--data", "./nopics", "--teacher-weights", "nope.pt", *END]
    done = funmatch(*words, check=2)
    assert "3 problems:\n" in done.stderr or "2 problems:\n" in done.stderr
    assert "  there is no folder ./nopics" in done.stderr
    assert "  no weights file nope.pt" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch", "4"], "batch: 8 in the run, 4 now"),
        (["--steps", "9"], "steps: 2 in the run, 9 now (only runs of --schedule wsd can be extended)"),
        (["--lr", "0.5"], "lr: 0.003 in the run, 0.5 now"),
        (["--distance", "l2"], "distance: kl in the run, l2 now"),
    ],
)
def test_another_run_is_refused_before_anything_is_loaded(funmatch, finished_run, tmp_path, words, message):
    options = {"data": FEW, "teacher": "fashion-mini-teacher", "student": "fashion-mini-student"}
    finished_run(tmp_path / "run", **options, steps=2, batch=8)
    done = funmatch(*RUN, "--steps", "2", "--batch", "8", *words, "--out", tmp_path / "run", check=2)
    assert message in done.stderr
    run = tmp_path / "run"
    longer = (
        f"  funmatch distill --config {run}/config.json --student {run} --schedule wsd --steps 7 --out {run}-longer"
    )
    assert (longer in done.stderr) == ("--steps" in words)
    assert "loading" not in done.stderr


def test_the_same_run_passes(funmatch, finished_run, tmp_path):
    options = {"data": FEW, "teacher": "fashion-mini-teacher", "student": "fashion-mini-student"}
    finished_run(tmp_path / "run", **options, steps=2, batch=8)
    done = funmatch(*RUN, "--steps", "2", "--batch", "8", "--lr", "3e-3", "--side", "32", "--out", tmp_path / "run")
    assert "is finished at step 2" in done.stderr


def test_timms_earlier_names_mean_what_they_mean_now():
    """Those of the paper among them: `resnetv2_50x1_bitm` is what the paper calls BiT-M R50x1."""
    renamed = names.timm_names()["renamed"]
    assert len(renamed) > 100
    assert current_name("resnetv2_50x1_bitm") == "resnetv2_50x1_bit.goog_in21k_ft_in1k"
    for old, new in renamed.items():
        check_model_name(old)
        assert check_architecture(old, old) == new


@pytest.mark.parametrize("pretrained", [False, True])
def test_an_earlier_name_builds_the_network(pretrained, monkeypatch):
    from funmatch.models import timm_models
    from funmatch.models.load import load

    built = []

    def create(architecture: str, kwargs: dict, *, pretrained: bool = False):
        built.append((architecture, pretrained))
        return original(architecture.partition(".")[0], kwargs)

    original = timm_models.create
    monkeypatch.setattr(timm_models, "create", create)  # published weights need the network
    classifier = load("vit_tiny_patch16_224_in21k", options=("depth=1",), classes=3, pretrained=pretrained)
    name = names.timm_names()["renamed"]["vit_tiny_patch16_224_in21k"]
    assert built == [(name, True) if pretrained else (name.partition(".")[0], False)]
    assert classifier.notes == (f"timm calls vit_tiny_patch16_224_in21k {name} now",)
    assert classifier.num_classes == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("w.pth", "holds only weights; pass the name of its architecture"),
        ("model.onnx", "is a model of ONNX, which cannot be loaded"),
        ("net.keras", "is missing; expected a file of Keras"),
        ("./nowhere", "is missing; expected the folder of a run or of a model"),
        ("timm/resnet18.a1_in1k", "pass hf-hub:timm/resnet18.a1_in1k"),
        ("bit:R50x9", "unknown file of the paper 'R50x9'"),
        ("resnet18.nope", "unknown pretrained tag 'resnet18.nope'; did you mean 'resnet18."),
        ("savedmodel:nowhere", "nowhere is missing"),
    ],
)
def test_what_a_name_leads_to_is_said(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    for file in ("w.pth", "model.onnx"):
        Path(file).touch()
    with pytest.raises(package.InputError, match=message.replace(".", r"\.")):
        check_model_name(name)
    Path("resnet18").mkdir()
    check_model_name("resnet18")  # timm's, though there is such a folder
    check_model_name("./resnet18")
    Path("bit.npz").touch()
    check_model_name("bit.npz")


def test_a_run_in_use_is_refused_before_anything_is_loaded(funmatch, finished_run, tmp_path):
    options = {"data": FEW, "teacher": "fashion-mini-teacher", "student": "fashion-mini-student"}
    finished_run(tmp_path / "run", **options, steps=2, batch=8)
    code = (
        "import fcntl, sys; file = open(sys.argv[1]); fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('ready', flush=True); sys.stdin.read()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "run" / "config.json"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert other.stdout
    assert other.stdout.readline() == "ready\n"
    words = [*RUN, "--steps", "2", "--batch", "8", "--out", tmp_path / "run"]
    if Path("/proc/locks").is_file():
        done = funmatch(*words, check=2)
        assert f"another process (PID {other.pid}) is using {tmp_path / 'run'}; wait for it or choose" in done.stderr
        assert "loading" not in done.stderr
    other.communicate()
    assert "nothing to do" in funmatch(*words).stderr


def test_a_link_to_nothing_is_no_place_for_a_run(funmatch, tmp_path):
    (tmp_path / "run").symlink_to(tmp_path / "gone")
    words = ["--data", "fashion-mini", "--student", "fashion-mini-student", "--steps", "1", "--out", tmp_path / "run"]
    said = " ".join(funmatch("train", *words, check=2).stderr.split())
    assert f"it is a link to {tmp_path / 'gone'}, which does not exist" in said
