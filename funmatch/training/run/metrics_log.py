"""Writes and reads `metrics.jsonl`: one JSON object a line, each with its `event` and `step`."""

import json
import os
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

from funmatch.runtime import env
from funmatch.runtime.disk.files import disk_errors, write_atomically
from funmatch.runtime.disk.json_files import misfit, parse_json
from funmatch.runtime.log import info

RECORDED_MODE = {
    "folded?": bool, "precision?": {"fp32", "bf16", "fp16"}, "layout?": {"channels_last", "contiguous"},
    "compiled?": bool, "native?": bool, "fp32_layers?": list[str],
}  # fmt: skip
"""Shape of a recorded inference mode of a teacher; earlier versions did not have all of its keys."""
RECORDED_TEACHER = {"form": RECORDED_MODE, "batches?": [int]}
"""Shape of what is recorded of a frozen teacher; `batches` are the sizes for which it was compiled."""
SPLIT = {"split": str}
EVENTS: dict[str, dict[str, Any]] = {
    "step": {"loss": float},
    "eval": SPLIT, "ema": SPLIT, "views": {},
    "nonfinite": {"action": {"skip", "rewind"}},
    "teacher": SPLIT
    | {"teacher": str, "form?": RECORDED_MODE, "beside_fp32?": dict.fromkeys(("kl", "agreement"), float | None)}
    | {"batches?": [int]},
}  # fmt: skip
"""Keys of an event's record whose values are not numbers."""


class MetricsLog:
    """The records of a run; the main process writes them."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, event: str, step: int, **metrics: Any) -> None:
        """Appends a record; readers see it whole or not at all."""
        if not env.is_main_process():
            return
        line = json.dumps({"event": event, "step": step, **metrics})
        # Closed after each line, so that a kill loses at most the line that is being written, which `read` skips.
        with disk_errors(self.path), open(self.path, "a") as file:
            file.write(line + "\n")

    def read(self) -> list[dict[str, Any]]:
        """Returns all records, without damaged lines, such as one that a kill cut short."""
        return [record for record in self._records() if record is not None]

    def count_damaged(self) -> int:
        """Counts the damaged lines, except an unfinished last one, which may be being written."""
        return self._records().count(None)

    def warn_of_damage(self) -> None:
        """Reports the number of damaged lines, which are left out."""
        if count := self.count_damaged():
            info(f"{self.path}: {count:,} damaged lines are left out")

    def digest(self) -> tuple[int, int]:
        """Returns the length of the file in bytes, and its CRC-32; 0 and 0 where it is missing."""
        content = self.path.read_bytes() if self.path.is_file() else b""
        return len(content), zlib.crc32(content)

    def has_changed(self, length: int | None, crc: int | None) -> bool:
        """Returns whether the file no longer begins as it did when it had this length and CRC-32; None: unknown."""
        if length is None:
            return False
        content = self.path.read_bytes() if self.path.is_file() else b""
        return len(content) < length or zlib.crc32(content[:length]) != crc

    def warn_of_change(self) -> None:
        """Says that the file is not as a checkpoint says."""
        info(f"WARNING: {self.path} was damaged or changed; its records may be missing or wrong")

    def truncate(self, step: int) -> None:
        """Removes the records after `step`, whose steps will be taken again."""
        if not env.is_main_process():
            return
        self.warn_of_damage()
        kept = [record for record in self.read() if record["step"] <= step]
        # Rewritten even if nothing is removed: the next record would be appended to a line that a kill cut short.
        write_atomically(self.path, "".join(json.dumps(record) + os.linesep for record in kept))

    def _records(self) -> tuple[dict[str, Any] | None, ...]:
        """Returns the record of each line, None where it is damaged; nothing for an unfinished last line."""
        if not self.path.is_file():
            return ()
        stat = self.path.stat()
        return _parse_file(self.path, (stat.st_ino, stat.st_size, stat.st_mtime_ns))


# A page looks at the records of a run some thirty times, and a long run has many.
@lru_cache(maxsize=16)
def _parse_file(path: Path, _state: tuple[int, ...]) -> tuple[dict[str, Any] | None, ...]:
    """Parses a file in a state of it, by which it is known again."""
    # Bytes that are not UTF-8 damage their own line, and must not make the whole file unreadable.
    lines = path.read_text(errors="replace").split("\n")
    records = [(_parse(line), line and number < len(lines)) for number, line in enumerate(lines, 1)]
    return tuple(record for record, complete in records if record is not None or complete)


def _parse(line: str) -> dict[str, Any] | None:
    """Returns the record in a line, or None if it is not one."""
    try:
        record = parse_json(line, {"event": str, "step": int})
    except ValueError:
        return None
    shape = EVENTS.get(record["event"])
    if shape is None:
        return record  # an event of a later version, which nothing here reads
    # All other values are numbers, or None for a metric that was not finite.
    named = {name.removesuffix("?") for name in shape} | {"event"}
    numbers = {name: value for name, value in record.items() if name not in named}
    return None if misfit(record, shape) or misfit(numbers, dict[str, float | None]) else record
