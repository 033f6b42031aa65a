"""Evaluates, and writes what was found: the line per image, and one offline HTML page."""

import base64
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from funmatch.config import Evaluate
from funmatch.data.readers.split_names import describe_images
from funmatch.errors import InputError
from funmatch.ops import metrics as metric_ops
from funmatch.ops.tasks.task import task_of_metrics
from funmatch.reports.evaluation import per_image, rows
from funmatch.reports.html import load_template
from funmatch.reports.result import Result
from funmatch.runtime.disk.files import write_atomically
from funmatch.runtime.log import info
from funmatch.runtime.text import number, percent
from funmatch.training import datasets
from funmatch.training.evaluation.evaluate import Evaluation, evaluate
from funmatch.training.run.folder import EVALUATION
from funmatch.training.student.trained_model import find_run
from funmatch.training.teachers.loading import Modules

NO_PAGE = "none"
LISTED_AGAIN = 100_000
"""Images of a data set up to which the page of a run has their names, unless it is requested."""
DRAWN_CLASSES = 2000
"""Classes up to which the confusion matrix is drawn: of more, no cell is as large as a pixel."""
THUMBNAIL = 128
"""Side of an image on the page, pixels: larger ones are reduced, smaller ones enlarged by a whole factor."""


def run(config: Evaluate, given: Modules | None = None) -> Result:
    """Evaluates, and writes the files that are requested.

    Returns:
        the metrics of `evaluate`, `per_image`, the path of that file, and the page.

    Raises:
        InputError: as of `evaluate`; or a file exists, or cannot be written.
    """
    page = _place_of_page(config, given or {})
    # Before anything is computed, which may take minutes.
    for option, path in (("--per-image", config.per_image), ("--report", config.report)):
        if path and str(path) != NO_PAGE:
            _check_place(option, path.expanduser(), overwrite=config.overwrite)
    found = evaluate(config, given)
    metrics = dict(found.metrics)
    # Listing a large data set again takes longer than a page is worth that nobody asked for.
    few = sum(map(len, found.opened.cache.splits.values())) <= LISTED_AGAIN
    for_page = found.scores and page and (config.report or few)
    images = _names(config, found) if config.per_image or for_page else []
    if config.per_image:
        path = config.per_image.expanduser()
        per_image.write(path, found, images)
        metrics["per_image"] = str(path)
    for each in metrics.get("differing", {}).get("images", ()):
        each |= {"image": images[each["number"]]} if images else {}
    folder = Path(metrics["run"]) if metrics["run"] else None
    return Result(folder, metrics, _write(page, config, found, metrics) if page else None)


def _place_of_page(config: Evaluate, given: Modules) -> Path | None:
    if config.report:
        return None if str(config.report) == NO_PAGE else config.report.expanduser()
    # A comparison is not the page of its first run.
    if config.others or config.model in given:
        return None
    run = find_run(config.model)
    return run.folder / EVALUATION if run else None


def _check_place(option: str, path: Path, *, overwrite: bool) -> None:
    """Raises `InputError` if a file cannot be written, or exists."""
    if path.is_dir():
        raise InputError(f"{option} {path} is a folder; name a file in it")
    if path.exists() and not overwrite:
        raise InputError(f"{option} {path} exists; pass --overwrite to replace it, or name another file")
    if not path.absolute().parent.is_dir():
        raise InputError(f"cannot write {option} {path}: its folder does not exist")


def _names(config: Evaluate, found: Evaluation) -> list[str]:
    """Returns the names of the evaluated images; their places in the split where the images are gone."""
    trained, split = found.opened.subjects[0].trained, found.opened.split
    assert trained
    verb = trained.run.config["verb"] if trained.run else ""
    try:
        return datasets.name_images(config, verb, trained.knobs, split)
    except (InputError, OSError) as error:
        info(f"note: the names of the images are unknown, so their numbers are written: {error}")
        return [f"{split.name}/{number}" for number in range(len(split))]


def _write(page: Path, config: Evaluate, found: Evaluation, metrics: dict[str, Any]) -> Path | None:
    """Writes the page; returns None where a run's folder cannot be written, which was not requested."""
    html = render(found, metrics)
    try:
        # An evaluation that is repeated leaves the run as it was.
        if not page.is_file() or page.read_bytes() != html.encode(errors="surrogateescape"):
            write_atomically(page, html)
    except OSError as error:
        if config.report:
            raise
        info(f"WARNING: cannot write {page}: {error.strerror}; pass --report FILE for the page of this evaluation")
        return None
    return page


def render(found: Evaluation, metrics: Mapping[str, Any]) -> str:
    """Renders the page of an evaluation as HTML."""
    # Here, since matplotlib takes a second to import, and most evaluations write no page.
    from funmatch.reports.evaluation import plots

    matrix = None
    if found.scores and found.scores.labels is not None and found.scores.classes <= DRAWN_CLASSES:
        columns = found.scores.columns
        matrix = metric_ops.confusion(columns["predicted"], found.scores.labels, found.scores.classes).numpy()
    corruptions = metrics.get("corruptions")
    images = describe_images(metrics["pictures"], metrics["split"], metrics.get("held_out_of"))
    classes = _by_difference(metrics)
    return load_template("evaluation.html").render(
        title=rows.short_name(metrics["model"]),
        lead=lead(metrics, images),
        rows=rows,
        metrics=rows.metric_rows(metrics),
        temperature_from=metrics.get("temperature_from"),
        plots=plots.draw_all(metrics, matrix, found.names),
        shots=_shots(found, metrics),
        classes=rows.used_columns(rows.CLASS_COLUMNS, rows.class_rows(classes)),
        labelled=found.opened.split.labelled,
        several=found.opened.cache.task == "multilabel",
        confusions=rows.confusion_rows(metrics),
        corruptions=[(name, rows.used_columns(rows.CORRUPTION_COLUMNS, rows.corruption_rows(values)))
                     for name, values in rows.corrupted_models(corruptions)],
        corrupted=corruptions and corruptions["images"],
        comparison=_comparison(metrics),
        about=[(name, _text(metrics.get(name))) for name in ("model", "run", "step", "teacher", "data", "split")],
    )  # fmt: skip


def _by_difference(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the classes, those first on which model and teacher differ most, else those with the least accuracy."""
    classes = metrics.get("classes") or []
    keys = ("agreement", "top1", "ap")
    key = next((key for key in keys if any(row.get(key) is not None for row in classes)), "name")
    return sorted(classes, key=lambda row: 2.0 if row.get(key) is None else row[key])


def _comparison(metrics: Mapping[str, Any]) -> tuple[list[str], list[list[str]]] | None:
    if not metrics.get("others"):
        return None
    return rows.used_columns(rows.COMPARISON_COLUMNS, rows.comparison_rows(metrics))


def lead(metrics: Mapping[str, Any], images: str) -> str:
    """Says how well a model does, and how far it is from its teacher."""
    parts = []
    if metrics["top1"] is not None:
        interval = rows.bounds(metrics["intervals"]["top1"])
        parts.append(f"{percent(metrics['top1'])} top-1 accuracy (95 % interval {interval})")
    if metrics.get("map") is not None:
        interval = metrics["intervals"]["map"]
        among = f" (95 % interval {rows.bounds(interval)})" if interval else ""
        parts.append(f"{percent(metrics['map'])} mean average precision{among}")
    if (of_teacher := metrics.get("teacher_map", metrics["teacher_top1"])) is not None:
        parts.append(f"its teacher {percent(of_teacher)}")
    if metrics["agreement"] is not None:
        parts.append(f"{percent(metrics['agreement'])} agreement with it")
    if not parts and metrics.get("embedding"):
        knn = metrics["embedding"]["knn"]
        parts.append(f"20 nearest neighbours {percent(knn[task_of_metrics(knn).score])}")
    return f"{', '.join(parts)}, on {images}." if parts else f"Evaluated on {images}."


def _shots(found: Evaluation, metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Draws the images on which model and teacher differ most, as the model sees them."""
    listed: Sequence[dict[str, Any]] = metrics.get("differing", {}).get("images", ())
    shots = []
    for each in listed:
        view = found.opened.subjects[0].view.view(found.opened.split.image(each["number"]))
        parts = [f"label: {each['label']}"] if "label" in each else []
        parts += [f"model: {each['predicted']} ({percent(each['confidence'])})"]
        parts += [f"teacher: {each['teacher']} ({percent(each['teacher_confidence'])})", f"KL {number(each['kl'], 2)}"]
        shots.append(
            {
                "png": _png(view.permute(1, 2, 0).numpy()),
                "name": each.get("image", f"image {each['number']}"),
                "lines": parts,
            }
        )
    return shots


def _png(view: np.ndarray) -> str:
    image = Image.fromarray((view * 255).round().astype(np.uint8))
    if image.width > THUMBNAIL:
        image = image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    png = BytesIO()
    image.save(png, "PNG", optimize=True)
    return base64.b64encode(png.getvalue()).decode()


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else "none" if value is None else str(value)
