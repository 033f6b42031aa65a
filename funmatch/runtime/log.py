"""What a run tells: a bar or plain lines for people on standard error, and `metrics.jsonl` as the truth."""

import time
from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from funmatch.runtime import env
from funmatch.runtime.text import duration

PLAIN_LINE_SECONDS, LIVE_LINE_SECONDS = 10.0, 1.0

err = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False, quiet=not env.is_main_process())
out = Console(highlight=False, markup=False, emoji=False, quiet=not env.is_main_process())


def info(message: str) -> None:
    """A line for people."""
    err.print(message)


def info_notes(model: str, notes: Iterable[str]) -> None:
    """What should be known of a model that was loaded, a line each."""
    for note in notes:
        info(f"{model}: {note}")


def track(things: Iterable, total: int, what: str) -> Iterator:
    """The same things, shown as progress: a bar on a terminal, now and then a line elsewhere."""
    with ProgressBar(what, total) as bar:
        for done, thing in enumerate(things, 1):
            yield thing
            bar.update(done)


class ProgressBar:
    """Progress of one piece of work, with its rate and the time left."""

    def __init__(self, what: str, total: int, done: int = 0) -> None:
        self.what, self.total, self.first = what, total, done
        self.started = self.last_line = time.monotonic()
        self.shown: Any = None  # the line in a notebook
        self.columns = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=err,
        )  # fmt: skip
        self.task = self.columns.add_task(what, total=total, completed=done, note="")

    def __enter__(self) -> "ProgressBar":
        if err.is_terminal:
            self.columns.start()
        return self

    def __exit__(self, *_: object) -> None:
        if err.is_terminal:
            self.columns.stop()

    def update(self, done: int, note: str = "") -> None:
        """Moves on to `done`; `note` stands beside the bar, or in the next plain line."""
        now = time.monotonic()
        rate = (done - self.first) / (now - self.started)
        if err.is_terminal:
            self.columns.update(self.task, completed=done, note=f"{rate:,.0f}/s {note}")
        elif now - self.last_line >= (LIVE_LINE_SECONDS if err.is_jupyter else PLAIN_LINE_SECONDS):
            self.last_line = now
            left = (self.total - done) / rate if rate else 0.0
            self.line(f"{self.what} {done}/{self.total} {note} {rate:.1f}/s, {duration(left)} left")

    def line(self, text: str) -> None:
        """A plain line; in a notebook, which keeps every line, one that is written anew."""
        if not err.is_jupyter:
            info(text)
            return
        from IPython.display import display

        if self.shown is None:
            self.shown = display({"text/plain": text}, raw=True, display_id=True)
        else:
            self.shown.update({"text/plain": text}, raw=True)


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table for people on standard output."""
    shown = Table(title=Text(title), title_justify="left")
    for i, column in enumerate(columns):
        shown.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        shown.add_row(*row)
    out.print(shown)
