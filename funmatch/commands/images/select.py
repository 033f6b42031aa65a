"""Chooses images from a pool by a teacher's confidence, and says how many of each class."""

from collections.abc import Mapping
from typing import Any

from funmatch.config import Select
from funmatch.reports.result import Result
from funmatch.runtime.log import print_line, print_table
from funmatch.runtime.text import counted, listed, number
from funmatch.shipping.selection import select

LISTED = 50
"""Classes up to which the table has a line for each; of more, those with too few images are named."""


def run(config: Select, given: Mapping[str, Any] | None = None) -> Result:
    """Chooses images; see `shipping.selection.select.run`."""
    return Result(None, select.run(config, given))


def show(result: Result) -> None:
    """Prints a line for each class, what was left out, and where the table is."""
    found = result.metrics
    classes = found["classes"]
    if len(classes) <= LISTED:
        rows = [
            [name, f"{each['chosen']:,}", f"{each['candidates']:,}", number(each["confidence"], 3)]
            for name, each in classes.items()
        ]
        print_table("chosen images", ["class", "chosen", "sure enough", "least confidence"], rows)
    for kind, of in (("kept_clear", "images to keep clear of"), ("repeated", "chosen images")):
        left = found[kind]
        if left["images"]:
            one, other = left["examples"][0]
            print_line(f"left out as near copies of {of}: {left['images']:,}, e.g. {one} of {other}")
    if found["unsure"]:
        print_line(f"left out as the teacher is not sure enough: {found['unsure']:,}")
    if short := found["short"]:
        few = [f"{name} ({classes[name]['chosen']})" for name in short]
        print_line(f"fewer than asked for in {len(short):,} of {len(classes):,} classes: {listed(few, 20)}")
    print_line(
        f"{found['chosen']:,} of {counted(found['images'], 'image')}: {found['out']}; pass --data csv:{found['out']}"
    )
