"""What editors and type checkers know of the Python functions: the stub fits the tables, and mistakes are found."""

import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import funmatch
from funmatch.config import Benchmark, Distill, Evaluate, Export, Finetune, Prepare, SearchDistill, Study, Train

ROOT = Path(__file__).parent.parent
STUB = ROOT / "funmatch" / "api.pyi"
TREE = ast.parse(STUB.read_text())
CLASSES = {node.name: node for node in TREE.body if isinstance(node, ast.ClassDef)}


def test_stub_is_what_the_tables_give(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import write_stubs

    assert write_stubs.stub() == STUB.read_text(), "run python scripts/write_stubs.py"


def keys_of(name: str) -> dict[str, str]:
    """Sentences of the keys of a class, and of those that it inherits."""
    node, found = CLASSES[name], {}
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id in CLASSES:
            found |= keys_of(base.id)
    for key, below in zip(node.body, node.body[1:], strict=False):
        if isinstance(key, ast.AnnAssign):
            found[key.target.id] = " ".join(below.value.value.split())
    return found


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("TrainOptions", Train), ("FinetuneOptions", Finetune), ("DistillOptions", Distill),
        ("BenchmarkOptions", Benchmark), ("EvaluateOptions", Evaluate), ("ExportOptions", Export),
        ("PrepareOptions", Prepare), ("StudyOptions", Study),
        ("TuneOptions", SearchDistill),
    ],
)  # fmt: skip
def test_every_option_has_a_key_with_its_sentence(name, table):
    keys = keys_of(name)
    function = {arg.arg for node in TREE.body for arg in arguments_of(node, CLASSES[name])}
    named = {table.field_of(each) for each in (*keys, *function)}
    assert {*table.model_fields} - {"as_json"} <= named
    assert all(table.field_of(key) and sentence for key, sentence in keys.items())


def arguments_of(node: ast.stmt, options: ast.ClassDef) -> list[ast.arg]:
    """Named arguments of a function that takes this class of options."""
    if not isinstance(node, ast.FunctionDef) or node.args.kwarg is None:
        return []
    takes = options.name in ast.unparse(node.args.kwarg.annotation)
    return [*node.args.args, *node.args.kwonlyargs] if takes else []


def test_stub_has_every_function_with_its_arguments():
    stubs: dict[str, set[str]] = {}
    for node in TREE.body:
        if isinstance(node, ast.FunctionDef):
            names = {each.arg for each in (*node.args.args, *node.args.kwonlyargs)}
            stubs[node.name] = stubs.get(node.name, set()) | names
    functions = {
        name: getattr(funmatch, name) for name in funmatch.__all__ if inspect.isfunction(getattr(funmatch, name))
    }
    assert stubs.keys() == functions.keys()
    for name, function in functions.items():
        code = function.__code__
        own = {*code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]}
        assert stubs[name] - {"config", "recipe"} == own, name


RIGHT = """\
from pathlib import Path
from typing import assert_type

import numpy as np
import torch

import funmatch

run = funmatch.distill(["a", Path("b")], teacher=torch.nn.Flatten(), student="s", out=Path("o"), steps=4, lr=1)
assert_type(run, funmatch.Outcome)
assert_type(run.student(), funmatch.Classifier)
funmatch.distill(config="run.toml", temperature=2)
funmatch.distill(recipe="pet37-fast", out="o", batch_size=16, img_size=32, weights="w.npz", lr=np.float64(0.1))
funmatch.train("d", "s", "o", epochs=2.5, mixup=0, student_kwargs={"channels": [1, 2]}, on_event=print)
funmatch.finetune("d", run, "o", decay_steps=[1, 2], randaugment=(2, 9), clip_norm=None, precision="bf16")
funmatch.evaluate(run, split="val", teacher=["t", "u"])
funmatch.tune("distill", "o", space={"lr": [1e-3]}, trials=2, data="d", teacher="t", student="s", steps=1)
funmatch.recipe("pet37-fast", data="d", out=Path("o"))
funmatch.prepare("d", val=0.1, to="tfrecord")


def distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return (student - teacher).abs().sum(-1)


def augment(crops: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return crops * torch.rand(len(crops), 1, 1, 1, generator=generator)


funmatch.distill("d", "t", "s", "o", steps=4, distance=distance, augment=augment, optimizer=torch.optim.RAdam, lr=1)
assert_type(funmatch.load(run), funmatch.Classifier)
"""
WRONG = {
    'funmatch.distill("d", "t", "s", "o", temprature=2.0)': "temprature",
    'funmatch.distill("d", "t", "s", "o", steps="4")': "steps",
    'funmatch.distill("d", "t", "s", "o", precision="fp8")': "precision",
    'funmatch.distill("d", "t", "s", "o", strategy="same/cc")': "strategy",
    'funmatch.distill("d", "t", "s", "o", batch_size="4")': "batch_size",
    'funmatch.distill("d", "t", "s", steps=4)': "out",
    'funmatch.train("d", out="o", steps=4)': "student",
    'funmatch.train("d", "s", "o", teacher="t")': "teacher",
    'funmatch.train("d", "s", "o", lr="0.003")': "lr",
    'funmatch.train("d", "s", "o", mixup="yes")': "mixup",
    'funmatch.train("d", "s", None)': "out",
    'funmatch.finetune("d", out="o")': "model",
    "funmatch.evaluate()": "model",
    'funmatch.evaluate("m", steps=3)': "steps",
    'funmatch.distill("d", "t", "s", "o", distance=len)': "distance",
    'funmatch.train("d", "s", "o", augment=3)': "augment",
    'funmatch.train("d", "s", "o").accuracy': "accuracy",
}


def check_types(folder: Path, code: str) -> dict[int, str]:
    """The first error of each line of a file."""
    (folder / "code.py").write_text(code)
    (folder / "pyrefly.toml").write_text(f'project-includes = ["*.py"]\nsearch-path = ["{ROOT}"]\n')
    tool = Path(sys.executable).parent / "pyrefly"
    command = [tool, "check", "--output-format=json", f"--python-interpreter-path={sys.executable}"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, cwd=folder).stdout)
    return {error["line"]: error["description"] for error in reversed(found["errors"])}


@pytest.mark.skipif(not (Path(sys.executable).parent / "pyrefly").exists(), reason="needs pyrefly")
def test_right_calls_pass_and_wrong_ones_are_errors(tmp_path):
    assert check_types(tmp_path, RIGHT) == {}
    errors = check_types(tmp_path, "import funmatch\n\n" + "\n".join(WRONG))
    for number, (call, word) in enumerate(WRONG.items(), 3):
        # Of several signatures the closest is explained, which may miss the file instead of the argument.
        error = errors.get(number, "")
        assert word in error or "Missing argument" in error, f"{call}: {error}"


@pytest.mark.parametrize("name", ["distill", "train", "finetune", "evaluate", "prepare", "study", "tune", "recipe"])
def test_notebooks_complete_every_option(name):
    parameters = inspect.signature(getattr(funmatch, name)).parameters
    assert all(each.kind is not inspect.Parameter.VAR_KEYWORD for each in [*parameters.values()][:-1])
    wanted = {"distill": "label_weight", "tune": "trials", "study": "seeds", "evaluate": "split", "prepare": "to"}
    assert wanted.get(name, "clip_norm") in parameters
    ipython = pytest.importorskip("IPython.core.completer")
    word = wanted.get(name, "clip_norm")
    text = f"funmatch.{name}({word[:-1]}"
    completer = ipython.IPCompleter(use_jedi=False, namespace={"funmatch": funmatch})
    with ipython.provisionalcompleter():
        assert f"{word}=" in [each.text for each in completer.completions(text, len(text))]
