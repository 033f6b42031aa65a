"""A few cases of every fuzzer, always the same ones; `python -m tests.fuzz` runs more."""

import pytest

from .harness import fuzz
from .targets import TARGETS

CASES = {"pages": 2, "table-paths": 3, "model-config": 4, "savedmodel": 6, "keras-file": 4, "command-line": 4}
"""Cases of the slow targets; the others have 25."""


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_damaged_files_end_in_our_own_error(target, tmp_path):
    if target.name == "table-paths":
        pytest.importorskip("datasets")  # an extra
    found = fuzz(target, tmp_path, CASES.get(target.name, 25), seed=0)
    assert not found.failures, found.examples
