"""The notebooks match their text sources, hold no logic, and run twice on a tiny data set in the published layout."""

import ast
import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jupytext
import nbformat
import pytest
import timm
from make_images import FEW
from nbclient import NotebookClient
from PIL import Image
from safetensors.torch import save_file
from test_catalog import write_flowers, write_food, write_pets

import funmatch
from funmatch import notebook
from funmatch.config.recipes import RECIPES
from funmatch.errors import InputError
from funmatch.notebook import hosts as notebook_hosts

ROOT = Path(__file__).parent.parent
TEXTS = sorted((ROOT / "notebooks").glob("*.py"))
NAMES = ["01_prepare_data", "02_finetune_teacher", "03_tune_teacher", "04_distill"]
LOGIC = (
    ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.For, ast.While, ast.If, ast.IfExp, ast.Try,
    ast.comprehension, ast.Match,
)  # fmt: skip
generated = runpy.run_path(str(ROOT / "scripts" / "notebooks.py"))["generated"]


def code_cells(text: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in jupytext.read(text, fmt="py:percent").cells if cell.cell_type == "code"]


def test_all_notebooks_exist():
    assert [text.stem for text in TEXTS] == NAMES


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.stem)
def test_notebook_matches_its_text_source(text):
    hint = "run `make notebooks` and commit the result"
    written = text.with_suffix(".ipynb")
    before = nbformat.read(written, as_version=4)
    assert written.read_text() == generated(text.read_text(), before), hint


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.stem)
def test_saved_outputs_show_images_and_nothing_of_the_machine(text):
    """Of cells whose code has changed since, the outputs are dropped: run `python scripts/notebooks.py --run`."""
    path = text.with_suffix(".ipynb")
    document = path.read_text()
    assert len(document) < 500_000
    outputs = [each for cell in nbformat.reads(document, 4).cells for each in cell.get("outputs", [])]
    kinds = {kind for each in outputs for kind in each.get("data", {})}
    assert kinds == {"image/png", "text/html", "text/plain"}
    assert not [each for each in outputs if each.output_type == "error"]
    # The folder above all others that holds this clone, too.
    assert not re.search(rf"/(?:tmp|root|{re.escape(ROOT.resolve().parts[1])})/|site-packages", document)
    code = [cell for cell in nbformat.reads(document, 4).cells if cell.cell_type == "code"]
    assert {cell.execution_count for cell in code} == {*range(1, len(code) + 1)}, "all cells in one run"


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.stem)
def test_notebooks_hold_no_logic(text):
    cells = code_cells(text)
    settings = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(settings) == 1
    assert 'DATA = "fashion-mini"' in settings[0].source
    assert "a folder of your own" in settings[0].source
    # Before it funmatch is not there, so its logic cannot be in funmatch.
    for cell in cells[1:]:
        code = "\n".join(line for line in cell.source.splitlines() if not line.startswith("%"))
        assert len(code.splitlines()) <= 8, code
        found = [type(node).__name__ for node in ast.walk(ast.parse(code)) if isinstance(node, LOGIC)]
        assert not found, f"{text.stem} has {found}: it belongs into the package\n{code}"


NETWORK = {"channels": [8, 8, 16, 16], "stem_width": 8}
SMALL = {"side": 32, "eval_resize": 36, "batch": 8, "threads": 1, "workers": 1}
MODEL = {"student": "resnet10t", "student_kwargs": NETWORK}
TRAINING = {**MODEL, **SMALL, "resize": 40, "steps": 4, "decay_steps": [2], "eval_every": 2, "micro_batch": 4}
STUDENT = {**MODEL, **SMALL, "steps": 4, "allow_weak_teacher": True}
SETTINGS = {
    "01_prepare_data": {"DATA": "pet37", "SIDE": 32, "SHARD_SIZE": 8},
    "02_finetune_teacher": {"DATA": "pet37", "OPTIONS": TRAINING, "MEASURE": False},
    "03_tune_teacher": {"DATA": "pet37", "OPTIONS": {**TRAINING, "steps": 8}, "TRIALS": 2, "PATIENCE": 2},
    "04_distill": {
        "DATA": "pet37",
        "OPTIONS": {**MODEL, **SMALL, "steps": 4, "allow_weak_teacher": True},
        "MEASURE": False,
    },
}


def run_notebook(name: str, folder: Path, **settings: object) -> nbformat.NotebookNode:
    """Run a notebook in a kernel, with settings inserted after its parameters cell, as papermill does."""
    document = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    (position,) = (i for i, cell in enumerate(document.cells) if "parameters" in cell.metadata.get("tags", []))
    assignments = "".join(f"{key} = {value!r}\n" for key, value in settings.items())
    document.cells.insert(position + 1, nbformat.v4.new_code_cell(assignments))
    client = NotebookClient(document, kernel_name="python3", timeout=120, resources={"metadata": {"path": str(folder)}})
    client.execute(env={**os.environ, "PYTHONPATH": str(ROOT)})
    if keep := os.environ.get("FUNMATCH_KEEP_NOTEBOOKS"):  # for debugging
        nbformat.write(document, Path(keep) / f"{name}.ipynb")
    return document


def output_text(document: nbformat.NotebookNode) -> str:
    """Output of all cells as text; no cell may have failed."""
    outputs = [output for cell in document.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    return "\n".join(str(output.get("text") or output.get("data")) for output in outputs)


def times_of_files(folder: Path) -> dict[str, int]:
    """Modification time of each file, except of those that every run writes: class names and the search's journal."""
    always_written = ("class.labels.txt", "journal.log")
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in always_written]
    return {str(path): path.stat().st_mtime_ns for path in files}


@pytest.mark.slow
def test_notebooks_run_in_order_and_a_second_time_repeat_nothing(tmp_path, monkeypatch):
    """On images in the layout of Oxford's archives; the second time every run is finished already."""
    monkeypatch.setenv("FUNMATCH_DATA", str(tmp_path / "data"))
    write_pets(tmp_path / "data")
    work = tmp_path / "work"
    work.mkdir()
    net = timm.create_model("resnet10t", num_classes=5, channels=(8, 8, 16, 16), stem_width=8)
    save_file(net.state_dict(), tmp_path / "pretrained.safetensors")
    pretrained = {"OPTIONS": {**TRAINING, "student_weights": str(tmp_path / "pretrained.safetensors")}}
    settings = {**SETTINGS, "02_finetune_teacher": {**SETTINGS["02_finetune_teacher"], **pretrained}}
    first = {name: output_text(run_notebook(name, work, **settings[name])) for name in NAMES}
    assert (work / "shards" / "pet37-32" / "train" / "train_pet37-00-8.tfrec").is_file()
    for run in ("tf-teacher-pet37", "tf-pet37-300"):
        assert (work / "runs" / run / "result.json").is_file()
    assert "random weights" not in first["02_finetune_teacher"]
    assert first["04_distill"].count("image/png") == 4, "the planned run, two views and the curves"
    before = times_of_files(work)
    second = {name: output_text(run_notebook(name, work, **settings[name])) for name in NAMES}
    assert times_of_files(work) == before
    for name in NAMES:
        assert "Warning" not in first[name] + second[name], name
    assert "nothing to do" in second["02_finetune_teacher"]
    assert "nothing to do" in second["04_distill"]


@pytest.mark.slow
@pytest.mark.parametrize(("data", "make"), [("flowers102", write_flowers), ("food101", write_food)])
def test_notebooks_run_for_other_data_sets(data, make, tmp_path, monkeypatch):
    """Runs the cells of all notebooks for another data set, in this process, since kernels start slowly."""
    monkeypatch.setenv("FUNMATCH_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "data")
    for text in TEXTS:
        names: dict[str, object] = {}
        for cell in code_cells(text):
            if not cell.source.startswith("%"):
                exec(cell.source, names)
            if "parameters" in cell.metadata.get("tags", []):
                names |= SETTINGS[text.stem] | {"DATA": data}
    assert {f"tf-teacher-{data}", names["STUDENTS"][data]} <= {path.name for path in (tmp_path / "runs").iterdir()}


def write_own(folder: Path) -> None:
    """A folder of `<class>/…` without splits."""
    for number, name in enumerate(("ant", "bee", "cat")):
        for i in range(12):
            path = folder / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 40), (80 * number, 10 * i, 90)).save(path)


@pytest.mark.slow
def test_notebooks_run_for_a_folder_of_images(tmp_path, monkeypatch):
    """Without splits: a tenth is held out, the same one for teacher and student."""
    monkeypatch.chdir(tmp_path)
    write_own(tmp_path / "my insects")
    names: dict[str, object] = {}
    for text in TEXTS:
        names = {}
        for cell in code_cells(text):
            exec(cell.source, names)
            if "parameters" in cell.metadata.get("tags", []):
                names |= SETTINGS[text.stem] | {"DATA": "my insects"}
    runs = {path.name for path in (tmp_path / "runs").iterdir()}
    assert runs == {"tf-teacher-my-insects", "tune-teacher-my-insects", "tf-my-insects-300"}
    for name in ("tf-teacher-my-insects", "tf-my-insects-300"):
        record = json.loads((tmp_path / "runs" / name / "config.json").read_text())
        assert record["knobs"]["val"] == "10%"
        assert record["facts"]["classes"] == ["ant", "bee", "cat"]


def test_own_images_get_recipes_and_names(tmp_path):
    write_own(tmp_path / "insects")
    own = notebook.choose(tmp_path / "insects")
    assert (own.data, own.name, own.recipes) == (str(tmp_path / "insects"), "insects", "pet37")
    assert own.images == {"val": "10%"}
    assert own.is_own
    (tmp_path / "insects").rename(tmp_path / "train")
    (tmp_path / "split").mkdir()
    shutil.move(tmp_path / "train", tmp_path / "split" / "train")
    shutil.copytree(tmp_path / "split" / "train", tmp_path / "split" / "val")
    assert notebook.choose(tmp_path / "split").images == {}
    # The names of runs on a data set of the catalog must not be taken.
    (tmp_path / "split").rename(tmp_path / "pet37")
    assert notebook.choose(tmp_path / "pet37").name == "own-pet37"
    assert notebook.choose("cifar10").recipes == "pet37"
    assert notebook.choose("food101").recipes == "food101"
    with pytest.raises(InputError, match="nowhere"):
        notebook.choose(tmp_path / "nowhere")


def install_cells() -> list[str]:
    return [code_cells(text)[0].source for text in TEXTS]


def run_install_cell(monkeypatch, *, importable: bool, source: str = "", cell: str = "", code: int = 0) -> list[str]:
    """Runs an install cell with a pip that does nothing; returns pip's arguments, empty where it was not called."""
    calls: list[str] = []

    def pip(command: list[str], **options: object) -> subprocess.CompletedProcess:
        assert options == {"capture_output": True, "text": True}
        calls.extend(command)
        return subprocess.CompletedProcess(command, code, "", "no matching distribution")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if importable else None)
    monkeypatch.setattr(subprocess, "run", pip)
    exec((cell or install_cells()[0]).replace('SOURCE = ""', f"SOURCE = {source!r}"), {})
    return calls


def test_install_cells_are_the_same_but_for_the_search():
    first, second, third, fourth = install_cells()
    assert first == second == fourth
    assert third == first.replace('"funmatch"\n', '"funmatch[tune]"\n').replace('"timm")', '"timm", "optuna")')


def test_install_cell_does_nothing_where_funmatch_is_installed(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert run_install_cell(monkeypatch, importable=True) == []


def test_install_cell_installs_the_clone_around_the_notebook(monkeypatch):
    monkeypatch.chdir(ROOT / "notebooks")
    command = run_install_cell(monkeypatch, importable=False, cell=install_cells()[2])
    assert command == [sys.executable, "-m", "pip", "install", "-q", f"funmatch[tune] @ {ROOT.as_uri()}"]
    assert not {"-U", "--upgrade"} & set(command), "the host's PyTorch stays"


def test_install_cell_takes_a_wheel_or_an_address(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    wheel = tmp_path / "funmatch-0.1.0-py3-none-any.whl"
    for source, url in ((wheel.name, wheel.as_uri()), ("git+https://host/me/funmatch", "git+https://host/me/funmatch")):
        command = run_install_cell(monkeypatch, importable=False, source=source)
        assert command[-1] == f"funmatch @ {url}"


def test_install_cell_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="set SOURCE above to the path of a clone or of a wheel"):
        run_install_cell(monkeypatch, importable=False)
    with pytest.raises(RuntimeError, match="no matching distribution"):
        run_install_cell(monkeypatch, importable=False, source="/somewhere", code=1)


def test_recipes_named_in_notebooks_exist():
    for text in TEXTS:
        source = text.read_text()
        named = set(re.findall(r'"((?:tf-)?teacher-[^"]*)"', source))
        assert {name.format(data) for name in named for data in ("pet37", "flowers102", "food101")} <= RECIPES.keys()
        assert set(re.findall(r'"(tf-\w+-\d+)"', source)) <= RECIPES.keys()


@pytest.fixture(name="hosts")
def fake_hosts(tmp_path, monkeypatch) -> Path:
    """Redirect the folders of Kaggle and Colab into `tmp_path` and clear their environment variables."""
    for name in ("KAGGLE_KERNEL_RUN_TYPE", "COLAB_RELEASE_TAG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FUNMATCH_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(notebook_hosts, "KAGGLE", tmp_path / "kaggle")
    monkeypatch.setattr(notebook_hosts, "COLAB", tmp_path / "content")
    monkeypatch.setattr(notebook_hosts, "DRIVE", tmp_path / "content" / "drive" / "MyDrive")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_place_on_a_local_machine(hosts):
    here = notebook.place("pet37")
    assert (here.host, here.data, here.runs, here.hours) == ("local", hosts / "data", hosts / "runs", None)
    assert notebook.bring_runs(here) == []
    assert "no limit" in here._repr_html_()


def test_place_on_colab_with_and_without_drive(hosts, monkeypatch, capsys):
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab-external")
    here = notebook.place("pet37")
    assert (here.host, here.runs, here.hours) == ("colab", hosts / "content" / "runs", 12)
    assert "drive.mount" in capsys.readouterr().err
    (hosts / "content" / "drive" / "MyDrive").mkdir(parents=True)
    assert notebook.place("pet37").runs == hosts / "content" / "drive" / "MyDrive" / "funmatch" / "runs"
    assert not capsys.readouterr().err


def test_place_on_kaggle_finds_the_data_set_among_its_inputs(hosts, monkeypatch):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    monkeypatch.setenv("COLAB_RELEASE_TAG", "their images are Colab's")
    here = notebook.place("pet37")
    assert (here.host, here.data, here.runs) == ("kaggle", hosts / "data", hosts / "kaggle" / "working" / "runs")
    inputs = hosts / "kaggle" / "input"
    for name in ("images", "annotations"):
        (inputs / "another-with-boxes" / name).mkdir(parents=True)
    source = write_pets(hosts / "made")
    source.rename(inputs / "the-pets")
    here = notebook.place("pet37")
    assert here.data == inputs / "the-pets"
    assert funmatch.prepare("pet37", data_dir=here.data)["splits"]["test"]["pictures"] == 30
    assert notebook.place("flowers102").data == hosts / "data"


TINY = {"data": FEW, "student": "resnet10t", "student_kwargs": NETWORK, "side": 28, "batch": 8, "threads": 1}


def test_runs_of_earlier_sessions_are_copied_and_resumed(hosts, monkeypatch):
    """The copy with the most steps is used, inputs may be read-only, and a local run is not replaced."""
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    here = notebook.place("pet37")
    run = funmatch.train(**TINY, steps=2, log_every=1, out=here.runs / "mine").folder
    inputs, document = hosts / "kaggle" / "input", (run / "metrics.jsonl").read_text()
    for name, lines in (("a", 1), ("b", None), ("c", 1)):
        copy = inputs / "owner" / name / "runs" / "mine"
        shutil.copytree(run, copy)
        (copy / "metrics.jsonl").write_text("".join(document.splitlines(keepends=True)[:lines]))
        (copy / "result.json").chmod(0o444)
    assert notebook.bring_runs(here) == []
    shutil.rmtree(run)
    assert notebook.bring_runs(here) == ["mine"]
    assert (run / "metrics.jsonl").read_text() == document
    assert not (run / "checkpoints").exists(), "not needed of a finished run"
    assert (run / "result.json").stat().st_mode & 0o200
    before = times_of_files(run)
    assert funmatch.train(**TINY, steps=2, log_every=1, out=run).figures["step"] == 2
    assert times_of_files(run) == before


@pytest.mark.slow
def test_session_ends_before_the_hosts_limit(hosts, monkeypatch):
    monkeypatch.setattr(notebook_hosts, "BEGAN", time.monotonic())
    here = notebook.Place("kaggle", hosts / "data", hosts, notebook_hosts.MARGIN_HOURS + 4 / 3600)
    with here.session():
        funmatch.train(**TINY, steps=100_000, out=here.runs / "long")
    steps = [int(path.name.partition("-")[2]) for path in (here.runs / "long" / "checkpoints").glob("step-*")]
    assert 0 < max(steps) < 100_000
    assert "not finished" in repr(notebook.judged(here.runs / "long"))
    assert "of 100,000" in repr(notebook.figures(here.runs / "long"))
    assert notebook.curves(here.runs / "long").width > 1000
    with notebook.Place("local", hosts, hosts).session():
        pass
    with pytest.raises(KeyboardInterrupt), notebook.Place("kaggle", hosts, hosts, 12).session():
        raise KeyboardInterrupt


def test_input_errors_show_only_their_message_in_notebooks():
    assert InputError("what to do")._render_traceback_() == ["funmatch: what to do"]


def test_folder_of_a_search_stands_for_its_best_run(tmp_path):
    here = notebook.Place("local", tmp_path, tmp_path)
    study = here.runs / "tune-teacher"
    study.mkdir(parents=True)
    (study / "study.json").write_text("{}")
    with pytest.raises(InputError, match="no best run yet"):
        here.run("tune-teacher")
    (study / "result.json").write_text('{"best_run": "/elsewhere/runs/tune-teacher/trials/0002/0"}')
    assert here.run("tune-teacher") == study / "trials" / "0002" / "0"
    assert here.run("teacher") == here.runs / "teacher"
