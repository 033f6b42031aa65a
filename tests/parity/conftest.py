"""Our numbers beside those of TensorFlow, JAX, flax and optax: `make parity` runs this in an environment of its own.

Each test states a largest difference, or a least p-value; what was reached is collected into a table, which the
variable FUNMATCH_PARITY_TABLE names a file for.
"""

import os
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest

HERE = Path(__file__).parent
ROWS = pytest.StashKey[list]()
ABOUT = """\
Logits, distances and gradients are differences from the other's, relative to the largest value; optimizers the largest
difference from its weights after all steps, in parts of the longest way that a weight went; views largest differences
in grey levels; crops the least p-value of four Kolmogorov-Smirnov tests (area, aspect, centre). The mean in bf16 is
that of optax run step by step: compiled for a CPU, XLA leaves out a rounding, and its weights are 0.6 % of the way
off."""
Record = Callable[..., None]


def pytest_configure(config):
    config.stash[ROWS] = []


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.slow)
            # Of the other libraries; ours are errors in all other tests.
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture
def record(request) -> Record:
    """Asserts that a figure keeps its bound, and adds it to the table."""

    def add(what: str, against: str, reached: float, *, at_most: float | None = None, at_least: float | None = None):
        bound = f"≤ {at_most:g}" if at_most is not None else f"≥ {at_least:g}"
        request.config.stash[ROWS].append((what, against, f"{reached:.1e}", bound))
        assert at_most is None or reached <= at_most, f"{what}: {reached} > {at_most}"
        assert at_least is None or reached >= at_least, f"{what}: {reached} < {at_least}"

    return add


@pytest.fixture(scope="session")
def tf():
    """TensorFlow; after timm, whose Triton fails to load once TensorFlow is there."""
    import timm  # noqa: F401

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("tensorflow")


@pytest.fixture(scope="session")
def jax():
    """JAX, and its libraries `flax` and `optax` beside it."""
    import timm  # noqa: F401

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return SimpleNamespace(
            jax=pytest.importorskip("jax"),
            np=pytest.importorskip("jax.numpy"),
            nn=pytest.importorskip("flax.linen"),
            optax=pytest.importorskip("optax"),
        )


def pytest_sessionfinish(session):
    rows, place = session.config.stash[ROWS], os.environ.get("FUNMATCH_PARITY_TABLE")
    if rows and place:
        names = ("torch", "timm", "tensorflow-cpu", "tf-keras", "keras", "jax", "flax", "optax")
        versions = ", ".join(f"{name} {version(name)}" for name in names)
        head = f"# Our numbers beside other implementations\n\n`make parity`, on a CPU, with {versions}.\n\n{ABOUT}\n\n"
        lines = ["| what | against | reached | bound |", "|---|---|---|---|"]
        Path(place).write_text(head + "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n")
