"""Writes and reads `metrics.jsonl`: one JSON object a line, each with its `event` and `step`."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from funmatch.runtime import env
from funmatch.runtime.files import disk_errors, write_atomically
from funmatch.runtime.json_files import misfit, parse_json
from funmatch.runtime.log import info

FORM = {
    "folded?": bool, "precision?": {"fp32", "bf16", "fp16"}, "layout?": {"channels_last", "contiguous"},
    "compiled?": bool, "native?": bool,
}  # fmt: skip
"""A teacher's inference mode as it is recorded; older ones lack what is younger."""
SPLIT = {"split": str}
EVENTS: dict[str, dict[str, Any]] = {
    "step": {"loss": float},
    "eval": SPLIT, "ema": SPLIT, "views": {},
    "teacher": SPLIT | {"teacher": str, "form?": FORM, "beside_fp32?": {"kl": float, "agreement": float}},
}  # fmt: skip
"""What a record of an event holds besides numbers."""


class MetricsLog:
    """The records of a run; the main process writes them."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, event: str, step: int, **metrics: Any) -> None:
        """Adds a record, whole or not at all as far as a reader is concerned."""
        if not env.is_main_process():
            return
        line = json.dumps({"event": event, "step": step, **metrics})
        with disk_errors(self.path), open(self.path, "a") as file:
            file.write(line + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All records; a line that is damaged, as by a kill in the middle of it, is left out."""
        return [record for record in self._records() if record is not None]

    def count_damaged(self) -> int:
        """Counts the lines that are damaged and left out. The last one may just be being written."""
        return list(self._records()).count(None)

    def warn_of_damage(self) -> None:
        """Says how many lines are damaged and left out."""
        if count := self.count_damaged():
            info(f"{self.path}: {count:,} damaged lines are left out")

    def truncate(self, step: int) -> None:
        """Drops the records after `step`, whose steps will be taken again."""
        if not env.is_main_process():
            return
        self.warn_of_damage()
        kept = [record for record in self.read() if record["step"] <= step]
        write_atomically(self.path, "".join(json.dumps(record) + os.linesep for record in kept))

    def _records(self) -> Iterator[dict[str, Any] | None]:
        """The record of each line, None where it is damaged; none of an unfinished last line that is."""
        lines = self.path.read_text(errors="replace").split("\n") if self.path.is_file() else []
        for number, line in enumerate(lines, 1):
            record = _parse(line)
            if record is not None or (line and number < len(lines)):
                yield record


def _parse(line: str) -> dict[str, Any] | None:
    """The record in a line; None where it is not one."""
    try:
        record = parse_json(line, {"event": str, "step": int})
    except ValueError:
        return None
    known = EVENTS.get(record["event"])
    if known is None:
        return record  # of a later version: nothing reads it
    named = {name.removesuffix("?") for name in known} | {"event"}
    numbers = {name: value for name, value in record.items() if name not in named}
    return None if misfit(record, known) or misfit(numbers, dict[str, float | None]) else record
