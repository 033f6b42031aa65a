"""Exports a model for other runtimes."""

from collections.abc import Mapping
from typing import Any

from funmatch.config import Export
from funmatch.reports.result import Result
from funmatch.runtime.log import print_line, print_table
from funmatch.runtime.text import percent
from funmatch.shipping.export import export
from funmatch.training.student.trained_model import open_described_model

SHOWN = 5
"""Most sensitive layers that are printed."""


def run(config: Export, given: Mapping[str, Any] | None = None) -> Result:
    """Exports a model in one or several formats.

    Args:
        given: modules from Python, by the names that stand for them.

    Returns:
        as of `export.export`.

    Raises:
        InputError: the model cannot be loaded or exported, or an export differs from PyTorch.
    """
    config.check()
    model = open_described_model(config, config.model, given)
    export.place_of(config, model)  # before anything is computed
    return Result(metrics=export.export(config, model, export.data_for(config, model)))


def show(result: Result) -> None:
    """Prints a row for each file."""
    found = result.metrics
    rows = [
        [
            name, f"{each['bytes'] / 1e6:.2f}",
            f"{each['max_relative']:.1e}" if "max_relative" in each else "not checked",
            percent(each["same_top1"]) if "same_top1" in each else "–",
        ]
        for name, each in found["formats"].items()
    ]  # fmt: skip
    print_table(found["out"], ["format", "size (MB)", "difference from PyTorch", "same top-1"], rows)
    if found.get("quantized"):
        _show_smaller(found["quantized"])
    print_line("beside them: labels.txt, preprocessing.json, and example.py, which needs no funmatch")


def _show_smaller(found: Mapping[str, Any]) -> None:
    """Prints what the quantised file loses and gains."""
    before, after = found["before"], found["after"]
    shares = {
        "accuracy": "top1",
        "mAP": "map",
        "agreement with the teacher": "agreement",
        "agreement with fp32": "same",
    }
    rows = [
        [text, *(percent(each[name]) for each in (before, after))]
        for text, name in shares.items()
        if after.get(name) is not None
    ]
    rows += [
        ["size (MB)", *(f"{each['bytes'] / 1e6:.2f}" for each in (before, after))],
        ["one image (ms)", *(f"{each['milliseconds']:.2f}" for each in (before, after))],
    ]
    print_table(f"{found['file']}, on {found['images']:,} images of {found['split']}", ["", "fp32", "quantised"], rows)
    low, high = found["drop_interval"]
    print(f"lost: {found['drop']:.2f} points (95 % interval {low:.2f} … {high:.2f}); at most {found['max_drop']:g}")
    if found["method"]:
        print_line(f"ranges by {found['method']}, from {found['calibration']:,} images of {found['calibrated_on']}")
    if found["fp32"]:
        print_line(f"in fp32: {len(found['fp32'])} of {found['layers']} layers: {', '.join(found['fp32'])}")
    for each in found["sensitivity"][:SHOWN]:
        print_line(f"most sensitive: {each['layer']} (KL {each['kl']:.1e} if only it is quantised)")
