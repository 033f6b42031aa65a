"""Shows images, recipes, runs and searches in the cells of notebooks."""

import base64
from collections.abc import Mapping
from html import escape
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from funmatch.commands import recipes
from funmatch.commands.common.ready import build
from funmatch.commands.images import data as data_command
from funmatch.commands.images import prepare
from funmatch.commands.plan import without_new_tape
from funmatch.commands.python.arguments import read_call
from funmatch.commands.tune import summary
from funmatch.commands.verbs import run_verb
from funmatch.config import TAUGHT, Data, Evaluate, Recipes, Train
from funmatch.config.recipes import RECIPES
from funmatch.errors import InputError
from funmatch.ops.tasks.task import task_of_metrics
from funmatch.reports import run_plots, run_tables, run_views, tune_page, tune_plots
from funmatch.reports.display import Shown, html_table, show_message, show_table
from funmatch.reports.images import captioned
from funmatch.reports.plan import picture
from funmatch.reports.result import Result
from funmatch.runtime.addresses import allow
from funmatch.runtime.log import print_line
from funmatch.runtime.text import number, percent
from funmatch.training import datasets
from funmatch.training.run import folder as run_folder


def facts(found: dict[str, Any]) -> None:
    """Shows the summary that `funmatch.prepare` returned."""
    prepare.show(Result(None, found))


def samples(data: str, **options: Any) -> Image.Image:
    """Draws a contact sheet with samples of each class; takes the options of `funmatch.config.Data`."""
    allow(data)
    config = Data.checked(data=data, **options)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "sheet.png"
        data_command.draw(datasets.open_data_set(config, config.data), path)
        # From memory: Pillow reads lazily, and the file is deleted on return.
        return Image.open(BytesIO(path.read_bytes()))


def about(recipe: str, options: Mapping[str, Any] | None = None, *, measure: bool = True) -> None:
    """Shows a recipe: its complete command, its published accuracy, and its estimated hours on this machine.

    Args:
        recipe: its name.
        options: those that replace the recipe's; they are listed.
        measure: whether to estimate the hours, by a few real steps. Not with another network, whose hours differ.
    """
    own = RECIPES[recipe].knobs if recipe in RECIPES else {}
    # Not where the images are, nor what the recipe says as well: (pet37,) for pet37.
    values = {
        name: value
        for name, value in (options or {}).items()
        if name != "data_dir" and own.get(name) not in (value, (value,))
    }
    recipes.show(recipes.run(Recipes(name=recipe, measure=measure and "student" not in values)))
    if values:
        print_line("replaced here:\n  " + ", ".join(f"{name}={value!r}" for name, value in values.items()))


def planned(recipe: str, **options: Any) -> Image.Image:
    """Draws a run of a recipe before it begins: schedule, MixUp's weights, crops, and the first views.

    Args:
        recipe: its name.
        **options: those of the run, as `funmatch.recipe` takes them.
    """
    verb = RECIPES[recipe].verb
    call = read_call(verb, TAUGHT[verb], options | {"recipe": recipe})
    assert isinstance(call.options, Train)
    setup, _ = build(without_new_tape(call.options), call.objects)
    return picture.draw(setup)


def figures(*folders: Path) -> Shown:
    """Shows the metrics of runs, one row each, with dashes for what an unfinished run lacks."""
    rows = [line for folder in folders for line in run_tables.rows(run_folder.find_run(folder))]
    return show_table(run_tables.COLUMNS, rows)


def curves(*folders: Path) -> Image.Image:
    """Plots accuracy, loss, learning rate and throughput of runs against the step; unfinished runs too."""
    return run_plots.draw_sheet([run_folder.find_run(folder) for folder in folders])


def searched(folder: Path) -> Shown:
    """Shows the results of a search: trials, the best one's metrics, and the evaluations per split."""
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
        f"<p>Command to train with these values:</p><pre>{escape(result['command'] or '–')}</pre>",
    ]
    return Shown("".join(html), trials.text)


def search_plots(folder: Path) -> Image.Image | Shown:
    """Plots the trials of a search: parallel coordinates, slices, and the importance of each option."""
    try:
        result = summary.read_summary(folder)
    except OSError:
        return show_message(f"{folder} is not finished, so there is nothing to plot yet: rerun this notebook to resume")
    return tune_plots.draw_sheet(result) or show_message("one trial compares nothing, so there is no plot")


def views(folder: Path, step: int = 0) -> Image.Image:
    """Shows the views of a step: the teacher's in the upper row, the student's in the lower one."""
    sheet = run_views.views_sheet(run_folder.find_run(folder), step)
    if sheet is None:
        raise InputError(f"the images of {folder} have been moved or changed, so its views cannot be shown")
    image = Image.open(BytesIO(base64.b64decode(sheet["png"]))).convert("RGB")
    # Part of the image: viewers of saved notebooks may leave out an image in HTML.
    return captioned(image, f"Step {step}: {sheet['caption']}")


def judged(folder: Path, **options: Any) -> Shown:
    """Shows the metrics of a finished run on a split; takes the options of `funmatch.config.Evaluate`."""
    run = run_folder.find_run(folder)
    # A message, not an error: a session that ended early must not stop the cells that follow.
    if run.result is None:
        return show_message(f"{folder} is not finished, so it cannot be evaluated yet: rerun this notebook to resume")
    found = run_verb("evaluate", Evaluate.checked(model=folder, **options)).metrics
    task = task_of_metrics(found)
    columns = ["split", "images", task.shown, "top-5", "agreement", "KL", "ECE"]
    numbers = [number(found[name], 3) for name in ("kl", "ece")]
    shares = [percent(found[name]) for name in (task.score, "top5", "agreement")]
    rows = [[found["split"], f"{found['pictures']:,}", *shares, *numbers]]
    return show_table(columns, rows)
