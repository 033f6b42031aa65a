"""What tests share: small real files, and the command line as a person runs it."""

import os
import shutil
import warnings
from contextlib import redirect_stderr, redirect_stdout
from io import BytesIO, TextIOWrapper
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from make_images import paint

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True)
def cache_home(tmp_path_factory, monkeypatch) -> Path:
    """A cache folder that all tests of a session share, so that the embedded set is decoded once."""
    home = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("FUNMATCH_CACHE", str(home))
    return home


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
def finished_runs() -> dict[str, Path]:
    """The runs that `finished` copies."""
    return {}


@pytest.fixture
def finished(tmp_path_factory, finished_runs):
    """Gives a run as `funmatch.distill(out=out, …)` ends it: made once for all tests that ask for the same, and copied.

    It is for tests of what comes after, whatever is done to the copy.
    """
    import funmatch

    def run(out: Path, verb: str = "distill", **options) -> funmatch.Outcome:
        carry_out, key = getattr(funmatch, verb), repr((verb, sorted(options.items())))
        if key not in finished_runs:
            finished_runs[key] = carry_out(out=tmp_path_factory.mktemp("finished") / "run", **options).folder
        shutil.copytree(finished_runs[key], out)
        return carry_out(out=out, **options)  # which finds it finished, and reads its figures

    return run


@pytest.fixture(name="funmatch")
def command_line(tmp_path, monkeypatch):
    """Runs `funmatch …` in an empty folder.

    It runs in this process, where libraries are loaded already: loading them takes five seconds of a processor, most of
    what a short command takes. What needs a process of its own (signals, how the interpreter ends, what a fresh one
    holds) starts one itself.
    """

    from funmatch import cli  # not at the top: libraries read the environment when they are imported

    def run(*words: str | Path, check: int | None = 0, cwd: Path = tmp_path) -> CompletedProcess:
        arguments, out, err, code = [str(word) for word in words], written(), written(), None
        with monkeypatch.context() as changed, warnings.catch_warnings(), redirect_stdout(out), redirect_stderr(err):
            changed.chdir(cwd)
            try:
                cli.main(arguments)
            except SystemExit as ended:
                code = ended.code
        stdout, stderr = (stream.buffer.getvalue().decode() for stream in (out, err))
        done = CompletedProcess(arguments, code, stdout, stderr)
        assert check is None or done.returncode == check, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run


def written() -> TextIOWrapper:
    """A stream such as an interpreter has, of which all is kept."""
    return TextIOWrapper(BytesIO(), encoding="utf-8", write_through=True)
