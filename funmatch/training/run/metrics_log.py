"""Writes and reads `metrics.jsonl`, the record of a run."""

import json
import os
from pathlib import Path
from typing import Any

from funmatch.runtime import env
from funmatch.runtime.files import disk_errors, write_atomically


class MetricsLog:
    """The records of a run: one JSON object a line, each with its `event` and `step`; the first process writes them."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, event: str, step: int, **figures: Any) -> None:
        """Adds a record, whole or not at all as far as a reader is concerned."""
        if not env.is_main_process():
            return
        line = json.dumps({"event": event, "step": step, **figures})
        with disk_errors(self.path), open(self.path, "a") as file:
            file.write(line + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All records; a line that is damaged, as by a kill in the middle of it, is left out."""
        records = []
        if self.path.exists():
            for line in self.path.read_text(errors="replace").splitlines():
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                if isinstance(record, dict) and isinstance(record.get("step"), int) and "event" in record:
                    records.append(record)
        return records

    def truncate(self, step: int) -> None:
        """Forgets what was recorded after `step`, which will be walked again."""
        if not env.is_main_process():
            return
        kept = [record for record in self.read() if record["step"] <= step]
        write_atomically(self.path, "".join(json.dumps(record) + os.linesep for record in kept))
