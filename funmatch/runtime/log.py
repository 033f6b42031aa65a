"""Prints messages, progress and tables: progress and messages to standard error, results to standard output."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from funmatch.errors import printable
from funmatch.runtime import env
from funmatch.runtime.text import duration, format_rate

T = TypeVar("T")

# Seconds between progress lines: a log file keeps every line, a notebook rewrites one.
PLAIN_LINE_SECONDS, LIVE_LINE_SECONDS = 10.0, 1.0

# Markup and emoji off: paths and class names may hold `[…]` or `:…:`, which rich would interpret.
# Quiet in all processes but the main one, so that callers need not check which process they are in.
err = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False, quiet=not env.is_main_process())
out = Console(highlight=False, markup=False, emoji=False, quiet=not env.is_main_process())


def info(message: str) -> None:
    """Prints a message to standard error."""
    err.print(printable(message))


def print_line(text: str) -> None:
    """Prints a line of a command's result to standard output; what would act on a terminal is escaped."""
    print(printable(text))


def info_loading(command: str, libraries: str) -> None:
    """Says that a command loads libraries that take seconds to import, PyTorch among them; nothing if it is there."""
    if "torch" not in sys.modules:
        info(f"{command}: loading {libraries} …")


def info_notes(model: str, notes: Iterable[str]) -> None:
    """Prints the notes on a model that was loaded, one a line."""
    for note in notes:
        info(f"{model}: {note}")


def track(items: Iterable[T], total: int, label: str) -> Iterator[T]:
    """Yields the items and shows progress: a bar on a terminal, a line every ten seconds elsewhere.

    Args:
        items: what is iterated over.
        total: how many they are.
        label: name of the work, shown beside the bar.
    """
    with ProgressBar(label, total) as bar:
        for done, item in enumerate(items, 1):
            # After the yield: an item counts when its consumer is done with it.
            yield item
            bar.update(done)


class NoteColumn(ProgressColumn):
    """Shows the note, cut where the terminal is narrow: the other columns, with the time left, keep their width."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["note"], no_wrap=True, overflow="ellipsis")


class ProgressBar:
    """Shows the progress of one piece of work, with its rate and the time left.

    Args:
        label: name of the work.
        total: its length in units, e.g. steps; None where it is not known.
        done: units finished before, as in a resumed run; they do not count for the rate.
    """

    def __init__(self, label: str, total: int | None, done: int = 0) -> None:
        self.label, self.total, self.first = _cell(label), total, done
        self.started = self.last_line = time.monotonic()
        self.noted = False
        self.display: Any = None  # handle of the line in a notebook
        self.columns = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=12), MofNCompleteColumn(),
            NoteColumn(table_column=Column(no_wrap=False)), TimeElapsedColumn(), TextColumn("left"),
            TimeRemainingColumn(), console=err,
        )  # fmt: skip
        self.task = self.columns.add_task(self.label, total=total, completed=done, note="")

    def __enter__(self) -> "ProgressBar":
        # Elsewhere rich would print nothing until the end, or control codes into a log file.
        if err.is_terminal:
            self.columns.start()
        return self

    def __exit__(self, *_: object) -> None:
        if err.is_terminal:
            self.columns.stop()

    def update(self, done: int, note: str | Callable[[], str] = "") -> None:
        """Shows that `done` units are finished.

        Args:
            note: what stands beside the bar or in the plain line; a function is called only when that is drawn, since
                it may wait for a device.
        """
        now = time.monotonic()
        rate = (done - self.first) / max(now - self.started, 1e-9)
        noted = note if callable(note) else lambda: note
        if err.is_terminal:
            # The loss before the rate, since a narrow terminal cuts the end.
            # rich draws ten times a second; the note may be a second old, but the first step has one.
            if now - self.last_line >= LIVE_LINE_SECONDS or not self.noted:
                self.last_line, self.noted = now, True
                self.columns.update(self.task, note=_cell(f"{noted()} {format_rate(rate)}".lstrip()))
            self.columns.update(self.task, completed=done)
        elif now - self.last_line >= (LIVE_LINE_SECONDS if err.is_jupyter else PLAIN_LINE_SECONDS):
            # From the last line, not the last update: steps may be far shorter or longer than the interval.
            self.last_line = now
            if self.total is None:
                self.line(" ".join(filter(None, (self.label, str(done), noted(), format_rate(rate)))))
                return
            # Before the first is done nothing is known of rate and time left.
            ahead = f"{format_rate(rate)}, {duration((self.total - done) / rate)} left" if rate else ""
            self.line(" ".join(filter(None, (self.label, f"{done}/{self.total}", noted(), ahead))))

    def line(self, text: str) -> None:
        """Prints a plain line; in a notebook it replaces the line before."""
        if not err.is_jupyter:
            info(text)
            return
        # Only here: IPython is present in notebooks alone.
        from IPython.display import display

        # As plain text through `display`, since a rich progress bar leaves one HTML block for each refresh.
        if self.display is None:
            self.display = display({"text/plain": printable(text)}, raw=True, display_id=True)
        else:
            self.display.update({"text/plain": printable(text)}, raw=True)


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Prints a table to standard output, the first column flush left and the others flush right.

    Args:
        title: printed above it.
        columns: heads of the columns.
        rows: the cells, as many in each row as there are columns.
    """
    grid = Table(title=Text(_cell(title)), title_justify="left")
    for i, column in enumerate(columns):
        grid.add_column(_cell(column), justify="left" if i == 0 else "right")
    for row in rows:
        grid.add_row(*map(_cell, row))
    out.print(grid)


def _cell(text: str) -> str:
    # A line break in a name would look like another row.
    return printable(text).replace("\n", "\\n")
