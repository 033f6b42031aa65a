"""Computes the features of images, and says where they are."""

from collections.abc import Mapping
from typing import Any

from funmatch.config import Embed
from funmatch.reports.result import Result
from funmatch.runtime.log import print_line
from funmatch.shipping import embed


def run(config: Embed, given: Mapping[str, Any] | None = None) -> Result:
    """Computes features; see `shipping.embed.run`."""
    return Result(None, embed.run(config, given))


def show(result: Result) -> None:
    """Prints where the features are."""
    found = result.metrics
    print_line(f"features: {found['out']}, {found['images']:,} × {found['features']:,}")
    if found["paths"]:
        print_line(f"paths: {found['paths']}")
