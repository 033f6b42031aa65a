"""Checks the design: imports follow the order of packages; folders, files and functions stay small."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "funmatch"
FILES = sorted(PACKAGE.rglob("*.py"))
ORDER = [
    "errors",
    "version",
    "runtime",
    "config",
    "ops",
    "data",
    "models",
    "training",
    "shipping",
    "reports",
    "commands",
]
"""A package imports only packages before it in this list. Modules in the root may import all of them."""


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


def rank(module: str) -> int:
    name = [*module.split("."), ""][1]
    return ORDER.index(name) if name in ORDER else len(ORDER)


def imports(path: Path, *, at_top: bool = False) -> set[str]:
    """The modules of ours that a file imports, anywhere in it or `at_top` only."""
    tree, found = ast.parse(path.read_text()), set()
    for node in tree.body if at_top else ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in inner]
        found |= {name for name in names if name.split(".")[0] == "funmatch"}
    return found


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_packages_import_only_packages_below(path):
    module = module_of(path)
    if rank(module) == len(ORDER):
        return
    own = module.split(".")[1]
    upward = {name for name in imports(path) if name.split(".")[1:2] != [own] and rank(name) >= rank(module)}
    assert not upward, f"{module} imports {upward}, which lie above it"


def test_imports_have_no_cycles():
    graph = {module: imports(path) - {module} for module, path in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"circle: {' > '.join([*trail[trail.index(module) :], module])}"
        if module not in done:
            for other in sorted(graph.get(module, ())):
                if other != "funmatch":  # `funmatch/__init__.py` imports the API, and nothing below imports it back
                    visit(other, (*trail, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def test_folders_are_small():
    for folder in {path.parent for path in FILES}:
        modules = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(modules) <= (8 if folder == PACKAGE else 15), f"{folder} has {len(modules)} modules"
    packages = {path.parent for path in FILES if path.parent.parent == PACKAGE}
    assert len(packages) <= 10


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_files_and_functions_are_small(path):
    source = path.read_text()
    assert source.count("\n") <= 300, f"{path} is too long"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 50, f"{path}:{node.lineno} {node.name} is over 50 lines"


def test_no_module_has_a_catch_all_name():
    assert not {path.stem for path in FILES} & {"utils", "common", "helpers", "misc", "base"}


def test_ops_use_no_device_logger_or_file():
    for path in (PACKAGE / "ops").rglob("*.py"):
        if path.parent.name == "native":  # kernels are compiled into a cache
            continue
        for word in ("cuda", "logging", "print(", "open(", "pathlib"):
            assert word not in path.read_text(), f"{path} mentions {word}"


def test_config_does_not_import_torch():
    for path in (PACKAGE / "config").rglob("*.py"):
        words = path.read_text()
        assert "import torch" not in words, path
        assert "import timm" not in words, path


def test_no_accelerator_is_hard_coded_and_no_pickle_is_used():
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


def test_training_step_names_no_kind_of_accelerator():
    """The step, and all that it imports, runs on whatever `torch.accelerator` offers; one module may know the kinds."""
    step, new = set(), {"funmatch.training.loop", "funmatch.training.distill", "funmatch.training.trainer"}
    while new:
        step |= new
        new = {name for module in new for name in imports(MODULES[module]) & MODULES.keys()} - step
    # The parts of a step: batches, mixing, networks, distance, optimizer.
    parts = {"data.loader", "ops.mixing", "models.classifier", "ops.distances", "ops.optim.factory", "runtime.devices"}
    assert {f"funmatch.{part}" for part in parts} <= step
    for module in sorted(step - {"funmatch.runtime.devices"}):
        found = {name for node in ast.walk(ast.parse(MODULES[module].read_text())) for name in words_of(node)}
        assert not found & CUDA_WORDS, module


CUDA_WORDS = {"cuda", "is_cuda", "cudnn", "nccl"}


def words_of(node: ast.AST) -> set[str]:
    """The names in a node of code, and the word with which a device string begins (`cuda:1`)."""
    if isinstance(node, ast.Attribute):
        return {node.attr}
    if isinstance(node, ast.Name):
        return {node.id}
    if isinstance(node, ast.Import | ast.ImportFrom):
        modules = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
        return {part for module in modules for part in module.split(".")}
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return {node.value.partition(":")[0]}
    return set()


@pytest.mark.parametrize(
    "code",
    [
        "torch.cuda.synchronize()",
        "x.cuda()",
        "from torch.cuda import Stream",
        "import torch.backends.cudnn",
        "'cuda:0'",
    ],
)
def test_names_of_cuda_are_found(code):
    assert {name for node in ast.walk(ast.parse(code)) for name in words_of(node)} & CUDA_WORDS
