"""Renders the results of a study as a table, plots and one offline HTML page, from `results.jsonl` alone."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from funmatch.reports import study_plots
from funmatch.reports.html import load_template
from funmatch.reports.study_plots import by, spread, value_of
from funmatch.runtime.disk.files import write_atomically
from funmatch.runtime.text import MISSING, duration

COLUMNS = ("top1", "knn", "agreement", "kl", "views_kl", "loss")
"""Final metrics in the table."""
LEGEND = (
    "Top-1, agreement with the teacher and KL from it are measured on test images if the data has any. On training "
    "views, KL is measured at T = 1 in evaluation mode, and loss is the mean over the last tenth of the run."
)
HEADS = ("top-1", "neighbours", "agreement", "KL", "views: KL", "views: loss")


# A protocol, since `reports` must not import `commands`, which reads study files.
class Plan(Protocol):
    """The parts of a study file that its page shows."""

    @property
    def title(self) -> str: ...
    @property
    def question(self) -> str: ...
    @property
    def note(self) -> str: ...
    @property
    def text(self) -> str: ...
    @property
    def figures(self) -> Sequence[Mapping[str, Any]]: ...


def write_page(folder: Path, plan: Plan, every_result: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Writes `report.html`, `table.md` and `figures/*.svg` into a study's folder; returns the first two paths."""
    results = visible(every_result)
    drawings = []
    (folder / "figures").mkdir(exist_ok=True)
    for number, figure in enumerate(plan.figures, 1):
        # A study that is under way may not have a figure's metric yet.
        if svg := study_plots.draw_svg(figure, results):
            # Numbered: a study may plot the same metric twice.
            path = folder / "figures" / f"{number}-{figure['kind']}-{figure['value']}.svg"
            write_atomically(path, svg)
            drawings.append((study_plots.heading(figure), svg, path.name))
    # All from `results.jsonl`, so that a study can be redrawn after its run folders are gone.
    write_atomically(folder / "table.md", markdown(plan, results, [(head, name) for head, _, name in drawings]))
    template = load_template("study.html")
    page = template.render(
        title=plan.title,
        question=plan.question,
        legend=LEGEND,
        note=plan.note,
        columns=columns(results),
        rows=rows(results),
        drawings=drawings,
        # Also of runs that are not shown: they took time, too.
        provenance=provenance(folder, every_result),
        text=plan.text,
    )
    write_atomically(folder / "report.html", page)
    return {"report": str(folder / "report.html"), "table": str(folder / "table.md")}


def visible(results: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Selects the results of runs that the study shows: not those that only prepare others."""
    return [result for result in results if result.get("shown", True)]


def columns(results: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Column titles of the table, without the metrics that no run has."""
    # A study of runs on labels has no agreement, and an empty column would look like a failure.
    heads = (head for name, head in zip(COLUMNS, HEADS, strict=True) if _known(results, name))
    return ("run", "runs", *heads, "time")


def _known(results: Sequence[Mapping[str, Any]], name: str) -> bool:
    return any(value_of(result, name) is not None for result in results)


def rows(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Formats one row per name: number of runs, then mean ± standard deviation of each metric over seeds."""
    shown = [name for name in COLUMNS if _known(results, name)]
    return [
        [
            name,
            str(len(group)),
            *(_mean_and_spread(group, metric) for metric in shown),
            duration(float(np.mean([each["figures"]["seconds"] for each in group]))),
        ]
        for name, group in by(results, "name").items()
    ]


def _mean_and_spread(group: Sequence[Mapping[str, Any]], name: str) -> str:
    values = [value for each in group if (value := value_of(each, name)) is not None]
    if not values:
        return MISSING
    mean, sign = float(np.mean(values)), " %" if study_plots.is_share(name) else ""
    # Close students differ in the third digit of a KL; a converged one has a KL below 0.01.
    digits = 2 if sign else 3 if abs(mean) >= 0.01 else 5
    # A single run has no deviation; ± 0 would claim one.
    around = f" ± {spread(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean:.{digits}f}{around}{sign}"


def provenance(folder: Path, results: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Lists (name, value) of a study's setup: command, machine, versions, images, student, teachers, seeds and time."""
    command = folder / "command.txt"
    values: dict[str, list[str]] = {}
    for result in results:
        facts, metrics = result["facts"], result["figures"]
        # Of every run, since a study may be resumed on another machine or with other versions.
        knobs = result["knobs"]
        teacher, top1 = knobs.get("teacher") or [], metrics.get("teacher_top1")
        values.setdefault("machine", []).append(facts.get("machine") or MISSING)
        versions = (facts.get("versions") or {}).items()
        values.setdefault("versions", []).append(", ".join(f"{name} {v}" for name, v in versions))
        images = ", ".join(f"{count:,} {split}" for split, count in (facts.get("pictures") or {}).items())
        values.setdefault("images", []).append(f"{', '.join(knobs.get('data', []))}: {images}")
        values.setdefault("student", []).append(f"{knobs.get('student')}, {facts.get('parameters') or 0:,} parameters")
        if teacher:
            share = "" if top1 is None else f", top-1 {100 * top1:.2f} %"
            names = [teacher] if isinstance(teacher, str) else teacher
            values.setdefault("teacher", []).append(" + ".join(Path(name).name for name in names) + share)
    lines = [(name, "; ".join(dict.fromkeys(each))) for name, each in values.items()]
    seconds = sum(result["figures"]["seconds"] for result in results)
    seeds = ", ".join(map(str, sorted({result["seed"] for result in results})))
    started = [("command", command.read_text(errors="replace").strip())] if command.is_file() else []
    hours = f"{seconds / 3600:.1f} hours of training ({timedelta(seconds=round(seconds))}), {len(results)} runs"
    return [*started, *lines, ("seeds", seeds), ("time", hours)]


def markdown(plan: Plan, results: Sequence[Mapping[str, Any]], drawings: Sequence[tuple[str, str]]) -> str:
    """Renders the table as Markdown, with links to the plots in figures/."""
    heads = columns(results)
    lines = [f"# {plan.title}", "", plan.question.strip(), ""]
    # The first column is text and stands left, numbers stand right.
    lines += [f"| {' | '.join(heads)} |", f"|{'|'.join(['---', *['---:'] * (len(heads) - 1)])}|"]
    lines += [f"| {' | '.join(row)} |" for row in rows(results)]
    lines += ["", f"Means ± standard deviations over seeds. {LEGEND}", ""]
    lines += [f"{plan.note.strip()}\n"] if plan.note else []
    for heading, name in drawings:
        lines += [f"**{heading}**", "", f"![{heading}](figures/{name})", ""]
    return "\n".join(lines)
