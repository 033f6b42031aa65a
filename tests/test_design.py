"""The house holds: imports only go down, rooms stay small, names say something."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "funmatch"
FILES = sorted(PACKAGE.rglob("*.py"))

# From the ground up. A module may import those before it in this list, and nothing else of ours.
LAYERS = [
    ["launch", "errors", "files", "crc32c", "protobuf", "spans", "native"],
    ["knobs", "strategies", "contradictions", "config", "recipes"],
    [
        "draws",
        "resample",
        "augment",
        "kernels",
        "mixing",
        "randaugment",
        "views",
        "norms",
        "distances",
        "metrics",
        "schedules",
        "hyperrule",
        "optim",
        "blocks",
        "shampoo",
        "optimizers",
        "slots",
    ],
    [
        "data.decode",
        "data.sources",
        "data.folders",
        "data.tfrecord",
        "data.patterns",
        "data.shards",
        "data.tars",
        "data.hub",
    ],
    [
        "data.layouts",
        "data.catalog",
        "data.doors",
        "data.survey",
        "data.cut",
        "data.pixels",
        "data.build",
        "data.cache",
    ],
    [
        "data.aboard",
        "data.export",
        "data.loader",
        "models.classifier",
        "models.weights",
        "models.fetch",
        "models.foreign",
        "models.groupnorm",
        "models.quick",
        "models.arithmetic",
        "models.build",
        "models.bundle",
        "models.nodes",
        "models.graph",
        "models.affine",
        "models.sight",
        "models.bit",
        "models.savedmodel",
        "models.load",
        "models.fold",
        "models.frozen",
        "models.classes",
        "models.teachers",
    ],
    [
        "devices",
        "transfers",
        "synchronised",
        "logs",
        "signals",
        "checkpoint",
        "runs",
        "ends",
        "heap",
        "fit",
        "memory",
        "tape",
    ],
    [
        "tasks.pictures",
        "tasks.judging",
        "tasks.teachers",
        "tasks.fastest",
        "tasks.resolved",
        "tasks.lesson",
        "tasks.delivery",
        "tasks.answers",
        "tasks.tapes",
        "tasks.profile",
        "tasks.standing",
        "tasks.losses",
        "tasks.keeping",
        "tasks.walk",
        "tasks.evaluate",
        "tasks.train",
        "tasks.finetune",
        "tasks.distill",
        "tasks.tape_check",
        "tasks.forecast",
        "tasks.several",
        "tasks.prepare",
        "tasks.shelf",
        "tasks.estimate",
        "tasks.spaces",
        "tasks.search",
        "tasks.optuna_study",
        "tasks.verdict",
        "tasks.tune",
        "tasks.figures",
        "tasks.plans",
        "tasks.study_files",
        "tasks.outcomes",
        "tasks.series",
    ],
    ["curves", "report", "search_plots", "search_page", "sheet", "charts", "findings"],
    ["shown", "demo", "notebook", "api", "words", "cli", "__main__", "__init__"],
]
ORDER = {
    f"funmatch.{name}".removesuffix(".__init__"): i for i, name in enumerate(name for layer in LAYERS for name in layer)
}
LAYER = {f"funmatch.{name}".removesuffix(".__init__"): i for i, layer in enumerate(LAYERS) for name in layer}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """The modules of ours that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in ORDER else node.module for name in inner]
        found |= {name for name in names if name.split(".")[0] == "funmatch"}
    return found


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_only_go_down(path):
    module = module_of(path)
    if path.name == "__init__.py" and module != "funmatch":
        assert not path.read_text().strip(), f"{path}: packages inside hold no code"
        return
    upward = {name for name in imports(path) if name != "funmatch" and ORDER[name] >= ORDER[module]}
    if module == "funmatch.api":
        upward -= {"funmatch.api"}
    assert not upward, f"{module} imports {upward}, which lie above it"


def test_only_tasks_and_what_stands_on_them_open_a_config():
    openers = {module_of(path) for path in FILES if "funmatch.config" in imports(path)}
    low = {name for name in openers if LAYER[name] < LAYER["funmatch.tasks.judging"]}
    told = "runs reads which knobs are compared, recipes are configurations; nobody else below the tasks knows a knob"
    assert low <= {"funmatch.runs", "funmatch.recipes"}, told


def test_math_knows_no_device_no_logger_and_no_file():
    for name in LAYERS[2]:
        source = (PACKAGE / f"{name}.py").read_text()
        for word in ("cuda", "logging", "print(", "open(", "pathlib"):
            assert word not in source, f"{name} mentions {word}"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_no_room_is_too_big(path):
    source = path.read_text()
    # A table of data may be longer: `config` has every knob of the program on one page.
    assert source.count("\n") <= (650 if module_of(path) == "funmatch.config" else 300), f"{path} is too long"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 50, f"{path}:{node.lineno} {node.name} is over 50 lines"


def test_names_say_something():
    assert not {path.stem for path in FILES} & {"utils", "common", "helpers", "misc", "base"}


def test_no_accelerator_is_hard_coded_and_nothing_is_unpickled():
    for path in FILES:
        tree = ast.parse(path.read_text())
        docs = {
            ast.get_docstring(node, clean=False)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        }
        strings = {
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert "cuda" not in strings - docs, path
        assert not {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names} & {
            "pickle",
            "joblib",
        }
