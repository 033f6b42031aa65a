"""Predicts the classes of images, and says where the rows are."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from funmatch.config import Predict
from funmatch.reports.result import Result
from funmatch.runtime.log import print_line
from funmatch.runtime.text import number, percent
from funmatch.shipping import predict


def run(config: Predict, given: Mapping[str, Any] | None = None) -> Result:
    """Predicts images; see `shipping.predict.run`."""
    return Result(None, predict.run(config, given))


def show(result: Result) -> None:
    """Prints where the rows are, unless they are on standard output themselves."""
    found = result.metrics
    if found["out"] is None:
        return
    if found["agreement"] is not None:
        print_line(f"agreement with {found['teacher']}: {percent(found['agreement'])}, KL {number(found['kl'])} nats")
    print_line(f"rows: {Path(found['out'])}")
