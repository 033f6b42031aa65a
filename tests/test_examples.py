"""The examples in the docstrings of the public functions run, and give what they show."""

import doctest

import pytest
import torch

import funmatch

FUNCTIONS = [name for name in funmatch.__all__ if name[0].islower() and name[0] != "_"]


SLOW = ("benchmark", "distill_several", "finetune", "train", "tune")
"""Functions whose examples take seconds."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in FUNCTIONS]
)
def test_examples_give_what_they_show(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name == "tune":
        pytest.importorskip("optuna")
    (found,) = doctest.DocTestFinder(recurse=False).find(
        getattr(funmatch, name), name, globs={"funmatch": funmatch, "torch": torch}
    )
    assert found.examples, f"{name} has no example"
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    report: list[str] = []
    runner.run(found, out=report.append)
    assert not runner.failures, "".join(report)
