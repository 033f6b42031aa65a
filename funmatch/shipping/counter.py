"""Counts the images that a command has answered, shows the progress, and reports those that cannot be read."""

import sys
import time
from types import TracebackType
from typing import Self

from funmatch.errors import InputError
from funmatch.runtime.log import ProgressBar, info
from funmatch.runtime.text import counted


class Counter:
    """Counts images while they are answered.

    Args:
        label: name of the work.
        count: of the images; None where it is not known.
        beside_rows: whether rows are printed on standard output meanwhile.

    Attributes:
        images: how many have been answered.
        unreadable: how many of them cannot be read.
        seconds: that it took, once it has ended.
    """

    def __init__(self, label: str, count: int | None, *, beside_rows: bool = False) -> None:
        # On one terminal, a bar and the rows would overwrite each other.
        self.bar = None if beside_rows and sys.stdout.isatty() else ProgressBar(label, count)
        self.images, self.unreadable, self.example = 0, 0, ""
        self.began, self.seconds = time.monotonic(), 0.0

    def __enter__(self) -> Self:
        if self.bar:
            self.bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds = time.monotonic() - self.began
        if self.bar:
            self.bar.__exit__(kind, error, trace)

    def add(self, paths: list[str], reasons: list[str | None]) -> None:
        """Adds a batch: its images, and for each why it cannot be read, or None."""
        bad = [(path, reason) for path, reason in zip(paths, reasons, strict=True) if reason]
        self.images += len(paths)
        self.unreadable += len(bad)
        if bad and not self.example:
            self.example = ": ".join(bad[0])
        if self.bar:
            self.bar.update(self.images)

    def report(self, *, strict: bool) -> None:
        """Says how many images there were, and how many cannot be read; with `strict` as an `InputError`."""
        rate = self.images / max(self.seconds, 1e-9)
        info(f"{counted(self.images, 'image')} in {self.seconds:.1f} s, {rate:,.0f}/s")
        if not self.unreadable:
            return
        problem = f"{self.unreadable:,} of {counted(self.images, 'image')} cannot be read, e.g. {self.example}"
        if strict:
            raise InputError(f"{problem}; every image has its row, with the reason as error")
        info(f"WARNING: {problem}; each has its row, with the reason as error")
