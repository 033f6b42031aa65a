"""Runs a search and writes its page."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from funmatch.commands.tune import search, worker
from funmatch.config import Search
from funmatch.errors import WorkFailed
from funmatch.reports import run_page, tune_page
from funmatch.reports.result import Result
from funmatch.runtime.disk.files import write_atomically
from funmatch.runtime.log import print_line, print_table
from funmatch.training.teachers.loading import Modules

SHOWN = 20
"""Trials in the table on a terminal; the page has all."""


def run(config: Search, modules: Modules | None = None) -> Result:
    """Runs a search, or its part of one that other processes share, and writes its page.

    Args:
        modules: modules from Python, by the names that stand for them.

    Raises:
        WorkFailed: all trials failed.
    """
    metrics = worker.run(config, modules)
    return Result(Path(metrics["study"]), metrics, write_page(metrics))


def write_page(result: Mapping[str, Any]) -> Path:
    """Writes the page of a study, unless it is there, and that of its best run.

    Raises:
        WorkFailed: all trials failed.
    """
    folder = Path(result["study"])
    path, source = folder / "report.html", folder / "result.json"
    # A search that got more trials has a newer result than its page.
    if not path.is_file() or path.stat().st_mtime < source.stat().st_mtime:
        # Before the error below, so that the page of a search that failed shows all reasons.
        write_atomically(path, tune_page.page(result, search.record_folder(folder).read()))
    if result["best"] is None:
        why = next((trial["error"] for trial in result["trials"] if trial["error"]), "none finished")
        raise WorkFailed(f"all {len(result['trials'])} trials failed, the first so: {why}; {path} has them all")
    # Only of the best run; `funmatch report` writes those of the others.
    run_page.write_if_finished(Path(result["best_run"]))
    return path


def show(found: Result) -> None:
    """Prints the table of a search, and what to do next."""
    result = found.metrics
    rows = tune_page.trial_rows(result)
    more = f", the best {SHOWN} of {len(rows)}" if len(rows) > SHOWN else ""
    print_table(
        f"{Path(result['study']).name}: {tune_page.lead(result)}{more}", list(tune_page.columns(result)), rows[:SHOWN]
    )
    for name, value, spread in tune_page.best_rows(result):
        print_line(f"{name}: {value}{f' ± {spread}' if spread != '–' else ''}")
    if result["importance"]:
        print_line(
            "importance: " + ", ".join(f"{name} {100 * share:.0f} %" for name, share in result["importance"].items())
        )
    print_line(f"best run: {result['best_run']}")
    print_line(f"in full: {result['command']}")
    print_line(f"report: {found.page}")
