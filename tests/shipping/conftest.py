"""Fixtures for tests of finished students."""

import gc

import pytest


@pytest.fixture(scope="module")
def few_objects():
    """Leaves all objects out of garbage collections: one that looks through them, as timing begins, takes a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def tiny_run(images, tmp_path, finished_run):
    """A finished run on the painted images, of a few steps."""
    options = {
        "student": "resnet10t", "student_kwargs": {"channels": [8, 8, 8, 8], "stem_width": 8}, "side": 32, "batch": 8,
    }  # fmt: skip
    return finished_run(tmp_path / "run", "train", data=str(images), steps=3, device="cpu", **options)
