"""Supports notebooks: paths on Kaggle and Colab, stopping before a session ends, and tables and plots for cells.

Hosted sessions end. The same call resumes a run as long as its folder exists, so `place` finds a folder that outlasts
the session, `bring_runs` copies runs of an earlier session, and `Place.session` stops in time to save.
"""

import importlib.util
import os
import shutil
import signal
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from html import escape
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from PIL import Image

from funmatch.commands import data as data_command
from funmatch.commands import prepare, recipes
from funmatch.commands.tune import summary
from funmatch.commands.verbs import run_verb
from funmatch.config import Data, Evaluate, Recipes
from funmatch.data.readers import catalog
from funmatch.errors import InputError
from funmatch.reports import run_tables, run_views, tune_page, tune_plots
from funmatch.reports.display import Shown, html_panels, html_table, show_message, show_table
from funmatch.reports.result import Result
from funmatch.reports.run_plots import build_panels as plotted
from funmatch.runtime.json_files import read_json
from funmatch.runtime.log import info
from funmatch.runtime.text import percent
from funmatch.training import datasets
from funmatch.training.run import folder as run_folder

KAGGLE, COLAB = Path("/kaggle"), Path("/content")
DRIVE = COLAB / "drive" / "MyDrive"
HOURS = {"kaggle": 9.0, "colab": 12.0, "local": None}
"""Maximum length of a session in hours. Kaggle's limit has been 9 and 12 hours; the shorter one is safe with both."""
MARGIN_HOURS = 1 / 3
"""Reserved for the last checkpoint, and for the host to save the output."""
BEGAN = time.monotonic()
"""Start of the session, approximately: notebooks import this module first."""
LEVELS = 5
"""Maximum depth of data sets and runs below the inputs of a Kaggle notebook."""


@dataclass(frozen=True)
class Place:
    """The environment of a notebook.

    Attributes:
        host: kaggle, colab or local.
        data: the folder of data sets, or the data set found among the notebook's inputs.
        work: the folder for output, which outlasts the session if the host has such a folder.
        hours: maximum length of the session; None for no limit.
    """

    host: Literal["kaggle", "colab", "local"]
    data: Path
    work: Path
    hours: float | None = None

    @property
    def runs(self) -> Path:
        """The folder of run folders."""
        return self.work / "runs"

    @property
    def shards(self) -> Path:
        """The folder of TFRecord shards, with one folder per data set."""
        return self.work / "shards"

    def run(self, name: str) -> Path:
        """Finds the folder of a run, or of the best run of a search.

        Raises:
            InputError: the search has no best run yet.
        """
        folder = self.runs / name
        if not (folder / "study.json").is_file():
            return folder
        try:
            best = read_json(folder / summary.FILE, {"best_run": str})["best_run"]
            return folder / Path(best).relative_to(Path(best).parents[2])  # the search may have been moved
        except (OSError, ValueError, IndexError):
            raise InputError(
                f"the search {folder} has no best run yet; continue it, or give the name of a run"
            ) from None

    @contextmanager
    def session(self) -> Generator[None]:
        """Stops and saves the run inside shortly before the session ends; the notebook then continues."""
        left = None if self.hours is None else 3600 * (self.hours - MARGIN_HOURS) - (time.monotonic() - BEGAN)
        if left is None:
            yield
            return
        over = threading.Event()

        def end() -> None:
            # First: the signal may be handled at once, and the handler below must know whose it is.
            over.set()
            # As Ctrl-C does: training finishes its step and saves. A timer's thread cannot raise in the main thread.
            os.kill(os.getpid(), signal.SIGINT)

        timer = threading.Timer(max(0.0, left), end)
        # Python would otherwise not end before the timer does, hours later.
        timer.daemon = True
        timer.start()
        try:
            yield
        except KeyboardInterrupt:
            if not over.is_set():  # the user's own interrupt
                raise
            info(
                f"the session's {self.hours:g} hours are nearly over; everything is saved: rerun the notebook to resume"
            )
        finally:
            # A cell that is done early must not be followed by an interrupt of a later one.
            timer.cancel()

    def _repr_html_(self) -> str:
        # For the user to check: on a wrong host, runs would lie where the end of the session deletes them.
        hours = "no limit" if self.hours is None else f"{self.hours:g} hours"
        rows = [["host", self.host], ["data", str(self.data)], ["runs", str(self.runs)], ["session limit", hours]]
        return html_table(["", ""], rows)


def place(data: str) -> Place:
    """Detects the host of this notebook, and its folders for data and runs.

    On Kaggle, runs are written to `/kaggle/working`, the notebook's output, and a data set among its inputs is used in
    place. On Colab, runs are written to Google Drive if it is mounted. Elsewhere runs are written to the current
    folder, and data sets have their usual place.

    Args:
        data: the data set's name in the catalog.
    """
    host, home = host_of_this(), catalog.data_home().absolute()
    if host == "kaggle":
        # Used in place: inputs are read-only, and a copy would fill the working folder.
        found = catalog.found_under(data, KAGGLE / "input", LEVELS) if data in catalog.CATALOG else None
        return Place(host, found or home, KAGGLE / "working", HOURS[host])
    if host == "colab":
        if not DRIVE.is_dir():
            info(
                f"WARNING: Google Drive is not mounted, so everything in {COLAB} is lost when the session ends; "
                "mount it: from google.colab import drive; drive.mount('/content/drive')"
            )
        return Place(host, home, DRIVE / "funmatch" if DRIVE.is_dir() else COLAB, HOURS[host])
    # Absolute, since a later cell may change the folder.
    return Place(host, home, Path.cwd())


def host_of_this() -> Literal["kaggle", "colab", "local"]:
    """Detects the host of this notebook from its environment."""
    # Kaggle first: its images are built on Colab's, and hold Colab's package too.
    if "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
        return "kaggle"
    with suppress(ModuleNotFoundError):  # there may be no package google at all
        if "COLAB_RELEASE_TAG" in os.environ or importlib.util.find_spec("google.colab"):
            return "colab"
    return "local"


def bring_runs(here: Place) -> list[str]:
    """Copies the runs of earlier sessions from a Kaggle notebook's inputs, unless they exist here.

    Of several copies of a run, the one with the most steps is used.

    Returns:
        the names of the copied runs.
    """
    found: dict[str, Path] = {}
    if here.host == "kaggle":
        # Sorted, so that of two equal copies it is always the same one.
        for folder in sorted(catalog.folders_under(KAGGLE / "input", LEVELS)):
            if folder.parent.name != "runs" or not _is_run_or_study(folder):
                continue
            if folder.name not in found or _steps(folder) > _steps(found[folder.name]):
                found[folder.name] = folder
    brought = [name for name in found if not (here.runs / name).exists()]
    for name in brought:
        info(f"{name}: copied from {found[name]}")
        _copy(found[name], here.runs / name)
    return brought


def _is_run_or_study(folder: Path) -> bool:
    return (folder / "metrics.jsonl").is_file() or (folder / "study.json").is_file()


def _steps(folder: Path) -> int:
    """Counts the steps of a run, or of all runs of a study."""
    records = [run_folder.Run(path.parent).metrics.read() for path in folder.rglob("metrics.jsonl")]
    return sum(max((record["step"] for record in each), default=0) for each in records)


def _copy(source: Path, target: Path) -> None:
    """Copies a run or a study completely or not at all."""
    # Contents and times, but not permissions: inputs are read-only, and a run must be able to write to its folder.
    partial = target.with_name(f".{target.name}.partial")
    # Left by a session that ended while it copied.
    shutil.rmtree(partial, ignore_errors=True)
    for path in sorted(source.rglob("*")):
        if path.is_file() and not run_folder.is_needless(path):
            copied = partial / path.relative_to(source)
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copied)
            # A report is rewritten if it is older than the result beside it.
            os.utime(copied, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    partial.rename(target)


def facts(found: dict[str, Any]) -> None:
    """Shows the summary that `funmatch.prepare` returned."""
    prepare.show(Result(None, found))


def samples(data: str, **options: Any) -> Image.Image:
    """Draws a contact sheet with samples of each class; takes the options of `funmatch.config.Data`."""
    config = Data.checked(data=data, **options)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "sheet.png"
        data_command.draw(datasets.open_data_set(config, config.data), path)
        # From memory: Pillow reads lazily, and the file is deleted on return.
        return Image.open(BytesIO(path.read_bytes()))


def about(recipe: str, *, measure: bool = True) -> None:
    """Shows a recipe: its complete command, its published accuracy, and its estimated hours on this machine."""
    recipes.show(recipes.run(Recipes(name=recipe, measure=measure)))


def figures(*folders: Path) -> Shown:
    """Shows the metrics of runs, one row each, with dashes for what an unfinished run lacks."""
    rows = [line for folder in folders for line in run_tables.rows(run_folder.find_run(folder))]
    return show_table(run_tables.COLUMNS, rows)


def curves(*folders: Path) -> Shown:
    """Plots accuracy, loss, learning rate and throughput of runs against the step; unfinished runs too."""
    panels = plotted([run_folder.find_run(folder) for folder in folders])
    return Shown(html_panels(panels), f"curves of {', '.join(folder.name for folder in folders)}")


def searched(folder: Path) -> Shown:
    """Shows the results of a search: trials, the best one's metrics, plots, and the evaluations per split."""
    try:
        result = summary.read_summary(folder)
    # Only a missing file: a damaged one is an error that the user must see.
    except OSError:
        return show_message(f"{folder} is not finished, so no trial is selected yet: rerun this notebook to resume")
    columns, rows = tune_page.columns(result), tune_page.trial_rows(result)
    best = [[name, value, spread] for name, value, spread in tune_page.best_rows(result)]
    trials, counts = show_table(columns, rows), tune_page.evaluation_counts(result)
    html = [
        trials.html,
        html_table(["best trial", "", "std"], best),
        html_table(tune_page.EVALUATION_COLUMNS, counts),
        html_panels(tune_plots.draw_plots(result)),
        f"<p>Command to train with these values:</p><pre>{escape(result['command'] or '–')}</pre>",
    ]
    return Shown("".join(html), trials.text)


def views(folder: Path, step: int = 0) -> Shown:
    """Shows the views of a step: the teacher's in the upper row, the student's in the lower one."""
    sheet = run_views.views_sheet(run_folder.find_run(folder), step)
    if sheet is None:
        raise InputError(f"the images of {folder} have been moved or changed, so its views cannot be shown")
    both = f" ({sheet['strategy']}): teacher above, student below" if "teacher" in sheet["rows"] else ""
    caption = f"Step {step}, λ = {sheet['lam']:.2f}{both}"
    image = f"<img style='max-width:100%' src='data:image/png;base64,{sheet['png']}' alt=''>"
    return Shown(f"<figure style='margin:0'>{image}<figcaption>{escape(caption)}</figcaption></figure>", caption)


def judged(folder: Path, **options: Any) -> Shown:
    """Shows the metrics of a finished run on a split; takes the options of `funmatch.config.Evaluate`."""
    run = run_folder.find_run(folder)
    # A message, not an error: a session that ended early must not stop the cells that follow.
    if run.result is None:
        return show_message(f"{folder} is not finished, so it cannot be evaluated yet: rerun this notebook to resume")
    found = run_verb("evaluate", Evaluate.checked(model=folder, **options)).metrics
    columns = ["split", "images", "top-1", "top-5", "agreement", "KL", "ECE"]
    numbers = ["–" if found[name] is None else f"{found[name]:.3f}" for name in ("kl", "ece")]
    shares = [percent(found[name]) for name in ("top1", "top5", "agreement")]
    rows = [[found["split"], f"{found['pictures']:,}", *shares, *numbers]]
    return show_table(columns, rows)
