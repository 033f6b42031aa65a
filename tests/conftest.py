"""What tests share: small real files, and the command line as a person runs it."""

import os
import subprocess
import sys
from pathlib import Path

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


@pytest.fixture(name="funmatch")
def command_line(tmp_path):
    """Runs `funmatch …` in a process of its own, in an empty folder."""

    def run(*words: str | Path, check: int | None = 0, env=None, **options) -> subprocess.CompletedProcess:
        words = [sys.executable, "-m", "funmatch", *map(str, words)]
        done = subprocess.run(
            words, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, **(env or {})}, **options
        )
        assert check is None or done.returncode == check, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run
