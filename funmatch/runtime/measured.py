"""Remembers what was measured on this machine, so that it is measured once and two runs alike are computed alike."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from funmatch.runtime.files import cache_home, write_atomically
from funmatch.runtime.json_files import Damaged, Shape, read_json
from funmatch.runtime.log import info


@dataclass(frozen=True)
class Measurement:
    """One measurement, kept under a digest of all that decides it.

    Attributes:
        kind: the folder in the cache.
        key: everything that decides the outcome, the machine among it, as text.
        subject: what is measured, for messages.
    """

    kind: str
    key: str
    subject: str

    @property
    def path(self) -> Path:
        digest = hashlib.blake2b(self.key.encode(), digest_size=12).hexdigest()
        return cache_home() / self.kind / f"{digest}.json"

    def read(self, shape: Shape) -> Any | None:
        """What was measured before; None where nothing was, or the file is damaged."""
        try:
            return read_json(self.path, shape)
        except (OSError, Damaged):
            return None

    def write(self, found: dict[str, Any]) -> None:
        """Keeps what was measured; a cache that cannot be written costs the next run the same time, nothing else."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, json.dumps(found))
        except OSError as error:
            folder = self.path.parent
            info(f"the next run will measure {self.subject} again: {folder} cannot be written ({error.strerror})")
