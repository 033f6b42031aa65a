"""Fixtures that tests share: small image files, finished runs, and the command line as a user calls it."""

import gc
import os
import shutil
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from io import BytesIO, TextIOWrapper
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from make_images import paint

# Before torch is imported: tests run side by side, one thread each, and sums in one order give the same bits.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # a name of the Hub must fail at once instead of reaching for the network


LESS_WORK = (
    ("funmatch.training.evaluation.scoring", "VIEWS", 16),  # scoring 256 would take a fifth of a run of few steps
    ("funmatch.shipping.quantize.scores", "RUNS", 5),  # from which a latency is taken that no test compares
)
"""Constants that cost time and decide nothing that is tested: module, name, and value in quick tests."""


def pytest_collection_finish(session):
    """Makes what tests do besides what they test cheaper, once all that they import is there.

    Objects of imported libraries, millions of them, are left out of garbage collection, which begins more rarely. Freed
    memory is kept for the next test, as a run keeps it for its next step. `LESS_WORK` is for quick tests alone: some of
    the slow ones compare records with those of processes of their own.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    if malloc := sys.modules.get("funmatch.runtime.malloc"):
        kept = malloc.keep_freed_memory(sys.modules["torch"].device("cpu"))
        kept.__enter__()
        session.config.add_cleanup(lambda: kept.__exit__(None, None, None))
    if session.config.option.markexpr == "not slow":
        for module, name, value in LESS_WORK:
            if module in sys.modules:
                setattr(sys.modules[module], name, value)


@pytest.fixture(autouse=True)
def cache_home(tmp_path_factory, monkeypatch) -> Path:
    """A cache folder that all tests of a session share, so that the embedded set is decoded once."""
    home = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("FUNMATCH_CACHE", str(home))
    return home


@pytest.fixture(scope="session")
def drawn_curves() -> dict[tuple, str]:
    """The plots that `curves_drawn_once` has drawn."""
    return {}


@pytest.fixture(autouse=True)
def curves_drawn_once(request, monkeypatch, drawn_curves):
    """Draws the curves of a run's page once for all runs that recorded the same kinds of events.

    Drawing takes a third of a processor's time for a run of a few steps. Tests of pages draw all of them.
    """
    run_plots = sys.modules.get("funmatch.reports.run_plots")  # imported with the first run, which draws its own
    if run_plots is None or request.path.parent.name == "reports":
        return
    draw = run_plots.plot

    def contents(run) -> tuple[int, frozenset]:
        ends = len(run_plots.extend.earlier_ends(run))
        return ends, frozenset(each["event"] for each in run.metrics.read())

    def plot(found, panel):
        key = panel, *map(contents, found)
        if key not in drawn_curves:
            drawn_curves[key] = draw(found, panel)
        return drawn_curves[key]

    monkeypatch.setattr(run_plots, "plot", plot)


@pytest.fixture(name="images")
def folder_of_images(tmp_path) -> Path:
    """train, val and test of three classes, in three formats and several sizes."""
    root = tmp_path / "images"
    for s, (split, count) in enumerate((("train", 5), ("val", 3), ("test", 4))):
        for c, name in enumerate(("ant", "bee", "cat")):
            for i in range(count):
                suffix = ("jpg", "png", "webp")[i % 3]
                paint(root / split / name / f"{i}.{suffix}", 100 * s + 10 * c + i, (24 + i, 20 + c))
    return root


@pytest.fixture(scope="session")
def run_templates() -> dict[str, Path]:
    """Folders of the runs that `finished_run` copies, by command and options."""
    return {}


@pytest.fixture
def finished_run(tmp_path_factory, run_templates):
    """Return a function that copies a finished run to `out`, training it only once per session for the same options.

    For tests of what comes after a run, such as evaluating, extending or damaging it.
    """
    import funmatch

    def run(out: Path, verb: str = "distill", **options) -> funmatch.Outcome:
        carry_out, key = getattr(funmatch, verb), repr((verb, sorted(options.items())))
        if key not in run_templates:
            run_templates[key] = carry_out(out=tmp_path_factory.mktemp("finished") / "run", **options).folder
        shutil.copytree(run_templates[key], out)
        return carry_out(out=out, **options)  # which trains nothing and reads the result

    return run


@pytest.fixture(name="funmatch")
def run_command_line(tmp_path, monkeypatch):
    """Run `funmatch …` in an empty folder.

    It runs in this process, where the libraries are loaded already: loading them takes five CPU seconds, most of what
    a short command takes. A test that needs a process of its own (signals, the exit of the interpreter, which modules
    a fresh one loads) starts one itself.
    """

    from funmatch import cli  # not at the top: libraries read the environment when they are imported

    def run(*argv: str | Path, check: int | None = 0, cwd: Path = tmp_path) -> CompletedProcess:
        arguments, out, err, code = [str(word) for word in argv], text_stream(), text_stream(), None
        with monkeypatch.context() as patch, warnings.catch_warnings(), redirect_stdout(out), redirect_stderr(err):
            patch.chdir(cwd)
            try:
                cli.main(arguments)
            except SystemExit as end:
                code = end.code
        stdout, stderr = (stream.buffer.getvalue().decode() for stream in (out, err))
        result = CompletedProcess(arguments, code, stdout, stderr)
        assert check is None or result.returncode == check, (
            f"exit {result.returncode}\n{result.stdout}\n{result.stderr}"
        )
        return result

    return run


def text_stream() -> TextIOWrapper:
    """A text stream like `sys.stdout` whose bytes can be read afterwards."""
    return TextIOWrapper(BytesIO(), encoding="utf-8", write_through=True)
