"""What notebooks call: where they run and where things lie there, the time that is left, and things to look at.

Hosted sessions end. A run goes on by the same call as long as its folder is still there, so `place` says where folders
last, `bring_runs` fetches those that an earlier session left elsewhere, and `Place.session` stops in time to save.
"""

import importlib.util
import json
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
from funmatch.commands.verbs import run_verb
from funmatch.config import Data, Evaluate, Recipes
from funmatch.data.readers import catalog
from funmatch.errors import InputError
from funmatch.reports import run_page, tune_page, tune_plots
from funmatch.reports.display import Shown, html_panels, html_table, show_message, show_table
from funmatch.reports.result import Result
from funmatch.reports.run_plots import build_panels as plotted
from funmatch.runtime.log import info
from funmatch.runtime.text import percent
from funmatch.training import datasets
from funmatch.training.run import folder as run_folder

KAGGLE, COLAB = Path("/kaggle"), Path("/content")
DRIVE = COLAB / "drive" / "MyDrive"
HOURS = {"kaggle": 9.0, "colab": 12.0, "local": None}
"""After which a session is ended at the latest. Kaggle has given 9 and 12 hours; the shorter is safe with both."""
MARGIN_HOURS = 1 / 3
"""Left for the last checkpoint, and for the host to save what was written."""
BEGAN = time.monotonic()
"""The beginning of the session, near enough: notebooks import this first."""
LEVELS = 5
"""How deep data sets and runs lie under the inputs of a Kaggle notebook, at most."""


@dataclass(frozen=True)
class Place:
    """Where a notebook runs.

    Attributes:
        host: kaggle, colab or local.
        data: the folder of data sets, or the one data set that was found among a notebook's inputs.
        work: the folder that outlasts the session, as far as there is one.
        hours: after which the session ends at the latest; None for never.
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
        """The folder of TFRecord shards, a folder for each data set."""
        return self.work / "shards"

    def run(self, name: str) -> Path:
        """The folder of a run; of a search, that of its best run."""
        folder = self.runs / name
        if not (folder / "study.json").is_file():
            return folder
        try:
            best = json.loads((folder / "result.json").read_text())["best_run"]
            return folder / Path(best).relative_to(Path(best).parents[2])  # the study may have been elsewhere
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(f"the search {folder} has no best run yet; go on with it, or name a run") from None

    @contextmanager
    def session(self) -> Generator[None]:
        """Stops what runs inside, which saves, shortly before the session ends; the notebook goes on after it."""
        left = None if self.hours is None else 3600 * (self.hours - MARGIN_HOURS) - (time.monotonic() - BEGAN)
        if left is None:
            yield
            return
        over = threading.Event()

        def end() -> None:
            over.set()
            os.kill(os.getpid(), signal.SIGINT)

        timer = threading.Timer(max(0.0, left), end)
        timer.daemon = True
        timer.start()
        try:
            yield
        except KeyboardInterrupt:
            if not over.is_set():
                raise
            info(f"the session's {self.hours:g} hours are nearly over; all is saved: run this notebook again to go on")
        finally:
            timer.cancel()

    def _repr_html_(self) -> str:
        hours = "no limit" if self.hours is None else f"{self.hours:g} hours"
        rows = [["host", self.host], ["data", str(self.data)], ["runs", str(self.runs)], ["a session has", hours]]
        return html_table(["", ""], rows)


def place(data: str) -> Place:
    """Where this notebook runs, and where things lie there.

    On Kaggle runs lie in `/kaggle/working`, the notebook's output, and a data set among its inputs is used where it
    lies. On Colab runs lie on Google Drive, if it is mounted. Elsewhere they lie here, and data sets where they always
    do.

    Args:
        data: the data set that is wanted, by its name in the catalog.
    """
    host, home = host_of_this(), catalog.data_home().absolute()
    if host == "kaggle":
        given = catalog.found_under(data, KAGGLE / "input", LEVELS) if data in catalog.CATALOG else None
        return Place(host, given or home, KAGGLE / "working", HOURS[host])
    if host == "colab":
        if not DRIVE.is_dir():
            info(
                f"WARNING: Google Drive is not mounted, so what is written to {COLAB} is lost when the session ends; "
                "mount it: from google.colab import drive; drive.mount('/content/drive')"
            )
        return Place(host, home, DRIVE / "funmatch" if DRIVE.is_dir() else COLAB, HOURS[host])
    return Place(host, home, Path.cwd())


def host_of_this() -> Literal["kaggle", "colab", "local"]:
    """Who runs this notebook, by what its host puts into the environment. (Kaggle's images are made from Colab's.)"""
    if "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
        return "kaggle"
    with suppress(ModuleNotFoundError):  # there may be no package google at all
        if "COLAB_RELEASE_TAG" in os.environ or importlib.util.find_spec("google.colab"):
            return "colab"
    return "local"


def bring_runs(here: Place) -> list[str]:
    """Copies the runs that earlier sessions left among a Kaggle notebook's inputs; those that are here stay.

    Of several copies of a run the one that got furthest is taken.

    Returns:
        the names of those that were brought.
    """
    found: dict[str, Path] = {}
    if here.host == "kaggle":
        for folder in sorted(catalog.folders_under(KAGGLE / "input", LEVELS)):
            if folder.parent.name != "runs" or not _is_run_or_study(folder):
                continue
            if folder.name not in found or _steps(folder) > _steps(found[folder.name]):
                found[folder.name] = folder
    brought = [name for name in found if not (here.runs / name).exists()]
    for name in brought:
        info(f"{name}: brought from {found[name]}")
        _copy(found[name], here.runs / name)
    return brought


def _is_run_or_study(folder: Path) -> bool:
    return (folder / "metrics.jsonl").is_file() or (folder / "study.json").is_file()


def _steps(folder: Path) -> int:
    """The steps that a run has taken, or those of all runs of a study."""
    records = [run_folder.Run(path.parent).metrics.read() for path in folder.rglob("metrics.jsonl")]
    return sum(max((record["step"] for record in each), default=0) for each in records)


def _copy(source: Path, target: Path) -> None:
    """Copies a run or a study, whole or not at all; contents and times, but no permissions: inputs are read-only."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for path in sorted(source.rglob("*")):
        if path.is_file() and not _is_of_the_past(path):
            copied = partial / path.relative_to(source)
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copied)
            os.utime(copied, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    partial.rename(target)


def _is_of_the_past(path: Path) -> bool:
    """Whether a file is part of a checkpoint of a finished run: most of what it holds, and nobody needs it."""
    return any(each.name == "checkpoints" and (each.parent / "result.json").is_file() for each in path.parents)


def facts(found: dict[str, Any]) -> None:
    """Shows what `funmatch.prepare` found."""
    prepare.show(Result(None, found))


def samples(data: str, **knobs: Any) -> Image.Image:
    """A sheet of samples of each class; knobs of `funmatch.config.Data`."""
    config = Data.checked(data=data, **knobs)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "sheet.png"
        data_command.draw(datasets.open_data_set(config, config.data), path)
        return Image.open(BytesIO(path.read_bytes()))


def about(recipe: str, *, measure: bool = True) -> None:
    """Shows a recipe: its command in full, what was published for it, and the hours that it takes on this machine."""
    recipes.show(recipes.run(Recipes(name=recipe, measure=measure)))


def figures(*folders: Path) -> Shown:
    """The figures of runs, a line each; dashes for what an unfinished one has not got yet."""
    rows = [line for folder in folders for line in run_page.rows(run_folder.find_run(folder))]
    return show_table(run_page.COLUMNS, rows)


def curves(*folders: Path) -> Shown:
    """Accuracy, loss, learning rate and throughput of runs against the step, as far as they are."""
    panels = plotted([run_folder.find_run(folder) for folder in folders])
    return Shown(html_panels(panels), f"curves of {', '.join(folder.name for folder in folders)}")


def searched(folder: Path) -> Shown:
    """What came of a search: its trials, the figures of the best one, plots, and how often which split was seen."""
    try:
        result = json.loads((folder / "result.json").read_text())
    except OSError:
        words = f"{folder} is not finished, so nothing is chosen yet: run this notebook again to go on"
        return show_message(words)
    columns, rows = tune_page.columns(result), tune_page.trial_rows(result)
    best = [[name, value, spread] for name, value, spread in tune_page.best_rows(result)]
    trials, counts = show_table(columns, rows), tune_page.evaluation_counts(result)
    html = [
        trials.html,
        html_table(["the best trial", "", "spread"], best),
        html_table(["split", "during the runs", "at the end", "chosen by it"], counts),
        html_panels(tune_plots.draw_plots(result)),
        f"<p>The best one again, in full:</p><pre>{escape(result['command'] or '–')}</pre>",
    ]
    return Shown("".join(html), trials.text)


def views(folder: Path, step: int = 0) -> Shown:
    """What a step of a run showed to its teacher, above, and to its student, below."""
    seen = run_page.views_sheet(run_folder.find_run(folder), step)
    if seen is None:
        raise InputError(f"the images of {folder} are gone or have changed, so its views cannot be shown")
    both = f" ({seen['strategy']}): teacher above, student below" if "teacher" in seen["rows"] else ""
    caption = f"Step {step}, λ = {seen['lam']:.2f}{both}"
    image = f"<img style='max-width:100%' src='data:image/png;base64,{seen['png']}' alt=''>"
    return Shown(f"<figure style='margin:0'>{image}<figcaption>{escape(caption)}</figcaption></figure>", caption)


def judged(folder: Path, **knobs: Any) -> Shown:
    """The figures of a finished run on a split of its images; knobs of `funmatch.config.Evaluate`."""
    run = run_folder.find_run(folder)
    if run.result is None:
        words = f"{folder} is not finished, so there is nothing to judge yet: run this notebook again to go on"
        return show_message(words)
    found = run_verb("evaluate", Evaluate.checked(model=folder, **knobs)).metrics
    columns = ["split", "pictures", "top-1", "top-5", "agreement", "KL", "ECE"]
    numbers = ["–" if found[name] is None else f"{found[name]:.3f}" for name in ("kl", "ece")]
    shares = [percent(found[name]) for name in ("top1", "top5", "agreement")]
    rows = [[found["split"], f"{found['pictures']:,}", *shares, *numbers]]
    return show_table(columns, rows)
