"""Finds the folders of a notebook on Kaggle, Colab and elsewhere, and stops before a hosted session ends.

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from funmatch.commands.tune import summary
from funmatch.data.readers import catalog
from funmatch.errors import InputError
from funmatch.notebook.choices import Choice, choose
from funmatch.reports.display import html_table
from funmatch.runtime.disk.json_files import read_json
from funmatch.runtime.log import info
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
    """The environment of a notebook, and its images.

    Attributes:
        host: kaggle, colab or local.
        data: the folder of data sets, or the data set found among the notebook's inputs.
        work: the folder for output, which outlasts the session if the host has such a folder.
        hours: maximum length of the session; None for no limit.
        choice: the images, the recipes for them and the names of their runs.
    """

    host: Literal["kaggle", "colab", "local"]
    data: Path
    work: Path
    hours: float | None = None
    choice: Choice = field(default_factory=lambda: choose("pet37"), repr=False)

    @property
    def name(self) -> str:
        """The name of the images in those of runs: a data set's, or that of the folder."""
        return self.choice.name

    @property
    def recipes(self) -> str:
        """The data set whose recipes are used: the chosen one, or pet37."""
        return self.choice.recipes

    @property
    def images(self) -> dict[str, Any]:
        """Options that say which images: of `prepare`, `samples`, `evaluate` and the runs."""
        return {"data": self.choice.data, "data_dir": self.data, **self.choice.images}

    @property
    def teacher(self) -> dict[str, Any]:
        """Options of the teacher's runs that replace those of its recipe."""
        return self.images | self.choice.teacher

    @property
    def student(self) -> dict[str, Any]:
        """Options of the student's run that replace those of its recipe."""
        return self.images | self.choice.student

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
        own = self.choice.data if self.choice.is_own else f"{self.choice.data} in {self.data}"
        rows = [["host", self.host], ["images", own], ["runs", str(self.runs)], ["session limit", hours]]
        return html_table(["", ""], rows)


def place(data: str) -> Place:
    """Detects the host of this notebook, and its folders for data and runs.

    On Kaggle, runs are written to `/kaggle/working`, the notebook's output, and a data set among its inputs is used in
    place. On Colab, runs are written to Google Drive if it is mounted. Elsewhere runs are written to the current
    folder, and data sets have their usual place.

    Args:
        data: the data set's name in the catalog, a folder of images of your own, or another source of `--data`.

    Raises:
        InputError: there are no images in the folder.
    """
    host, home, choice = host_of_this(), catalog.data_home().absolute(), choose(data)
    if host == "kaggle":
        # Used in place: inputs are read-only, and a copy would fill the working folder.
        found = catalog.found_under(data, KAGGLE / "input", LEVELS) if data in catalog.CATALOG else None
        return Place(host, found or home, KAGGLE / "working", HOURS[host], choice)
    if host == "colab":
        if not DRIVE.is_dir():
            info(
                f"WARNING: Google Drive is not mounted, so everything in {COLAB} is lost when the session ends; "
                "mount it: from google.colab import drive; drive.mount('/content/drive')"
            )
        return Place(host, home, DRIVE / "funmatch" if DRIVE.is_dir() else COLAB, HOURS[host], choice)
    # Absolute, since a later cell may change the folder.
    return Place(host, home, Path.cwd(), choice=choice)


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
