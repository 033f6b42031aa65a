"""What a study came to, for people: a table, figures, and one offline HTML page; all from `results.jsonl`."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jinja2 import Environment, PackageLoader, select_autoescape

from funmatch.reports import study_plots
from funmatch.reports.study_plots import by, spread, value_of
from funmatch.runtime.files import write_atomically
from funmatch.runtime.text import duration

COLUMNS = ("top1", "agreement", "kl", "views_kl", "loss")
"""Final figures in the table."""
LEGEND = (
    "Top-1, agreement with the teacher and KL from it are on test images where there are some; of the training "
    "views, the KL is at T = 1 in evaluation mode, the loss is the mean over the last tenth of the run."
)
HEADS = ("top-1", "agreement", "KL", "views: KL", "views: loss")


class Plan(Protocol):
    """What a page says of a study besides its results: the parts of its file."""

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


def write_page(folder: Path, plan: Plan, all_of_them: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Writes `report.html`, `table.md` and `figures/*.svg` of a study's folder; where they are."""
    results = visible(all_of_them)
    drawings = []
    (folder / "figures").mkdir(exist_ok=True)
    for number, figure in enumerate(plan.figures, 1):
        if svg := study_plots.draw_svg(figure, results):
            path = folder / "figures" / f"{number}-{figure['kind']}-{figure['value']}.svg"
            write_atomically(path, svg)
            drawings.append((study_plots.heading(figure), svg, path.name))
    write_atomically(folder / "table.md", markdown(plan, results, [(head, name) for head, _, name in drawings]))
    template = Environment(
        loader=PackageLoader("funmatch.reports", "templates"), autoescape=select_autoescape(), trim_blocks=True
    ).get_template("study.html")
    page = template.render(
        title=plan.title,
        question=plan.question,
        legend=LEGEND,
        note=plan.note,
        columns=columns(results),
        rows=rows(results),
        drawings=drawings,
        made=how_made(folder, all_of_them),
        text=plan.text,
    )
    write_atomically(folder / "report.html", page)
    return {"report": str(folder / "report.html"), "table": str(folder / "table.md")}


def visible(results: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The results of runs that are not only there for others."""
    return [result for result in results if result.get("shown", True)]


def columns(results: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The heads of the table; what no run has is left out."""
    heads = (head for name, head in zip(COLUMNS, HEADS, strict=True) if _known(results, name))
    return ("run", "runs", *heads, "time")


def _known(results: Sequence[Mapping[str, Any]], name: str) -> bool:
    return any(value_of(result, name) is not None for result in results)


def rows(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A line for the runs of each name: how many, then mean ± standard deviation over their seeds."""
    shown = [name for name in COLUMNS if _known(results, name)]
    return [
        [
            name,
            str(len(group)),
            *(_told(group, figure) for figure in shown),
            duration(float(np.mean([each["figures"]["seconds"] for each in group]))),
        ]
        for name, group in by(results, "name").items()
    ]


def _told(group: Sequence[Mapping[str, Any]], name: str) -> str:
    values = [value for each in group if (value := value_of(each, name)) is not None]
    if not values:
        return "–"
    mean, sign = float(np.mean(values)), " %" if study_plots.is_share(name) else ""
    digits = 2 if sign else 3 if abs(mean) >= 0.01 else 5
    around = f" ± {spread(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean:.{digits}f}{around}{sign}"


def how_made(folder: Path, results: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(what, value) of how a study was made: command, machine, versions, seeds, hours, teachers."""
    command = folder / "command.txt"
    told: dict[str, list[str]] = {}
    for result in results:
        facts, figures = result["facts"], result["figures"]
        told.setdefault("machine", []).append(facts["machine"])
        told.setdefault("versions", []).append(", ".join(f"{name} {v}" for name, v in facts["versions"].items()))
        images = ", ".join(f"{count:,} {split}" for split, count in facts["pictures"].items())
        told.setdefault("pictures", []).append(f"{', '.join(result['knobs']['data'])}: {images}")
        told.setdefault("student", []).append(f"{result['knobs']['student']}, {facts['parameters']:,} parameters")
        if result["knobs"].get("teacher"):
            top1 = "" if figures["teacher_top1"] is None else f", top-1 {100 * figures['teacher_top1']:.2f} %"
            told.setdefault("teacher", []).append(" + ".join(Path(n).name for n in result["knobs"]["teacher"]) + top1)
    lines = [(what, "; ".join(dict.fromkeys(values))) for what, values in told.items()]
    seconds = sum(result["figures"]["seconds"] for result in results)
    seeds = ", ".join(map(str, sorted({result["seed"] for result in results})))
    begun = [("command", command.read_text().strip())] if command.is_file() else []
    hours = f"{seconds / 3600:.1f} hours of runs ({timedelta(seconds=round(seconds))}), {len(results)} runs"
    return [*begun, *lines, ("seeds", seeds), ("time", hours)]


def markdown(plan: Plan, results: Sequence[Mapping[str, Any]], drawings: Sequence[tuple[str, str]]) -> str:
    """The findings as Markdown, its figures beside it under figures/."""
    heads = columns(results)
    lines = [f"# {plan.title}", "", plan.question.strip(), ""]
    lines += [f"| {' | '.join(heads)} |", f"|{'|'.join(['---', *['---:'] * (len(heads) - 1)])}|"]
    lines += [f"| {' | '.join(row)} |" for row in rows(results)]
    lines += ["", f"Means ± standard deviations over seeds. {LEGEND}", ""]
    lines += [f"{plan.note.strip()}\n"] if plan.note else []
    for heading, name in drawings:
        lines += [f"**{heading}**", "", f"![{heading}](figures/{name})", ""]
    return "\n".join(lines)
