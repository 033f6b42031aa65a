"""What a search came to, for people: a table, and one offline HTML page with plots."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape

from funmatch.reports import tune_plots
from funmatch.runtime.text import duration, format_value, percent

NAMES = {"top1": "top-1", "agreement": "agreement"}


def page(result: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """The whole page as text."""
    template = Environment(
        loader=PackageLoader("funmatch.reports", "templates"), autoescape=select_autoescape(), trim_blocks=True
    ).get_template("search.html")
    return template.render(
        title=f"{Path(result['study']).name}: a search",
        lead=lead(result),
        figures=best_rows(result),
        run=result["best_run"],
        command=result["command"],
        columns=columns(result),
        rows=trial_rows(result),
        best=str(result["best"]),
        plots=tune_plots.draw_plots(result),
        honesty=_honesty(result),
        seen=evaluation_counts(result),
        failed=[[trial["number"], trial["error"]] for trial in result["trials"] if trial["error"]],
        asked=[(name, value) for part in asked.values() if isinstance(part, dict) for name, value in part.items()],
    )


def lead(result: Mapping[str, Any]) -> str:
    what = result["recipe"] or f"funmatch {result['verb']}"
    times = f" × {result['executions']} executions" if result["executions"] > 1 else ""
    return f"{len(result['trials'])} trials{times} of {what}, {result['sampler']}, chosen by {_score(result)}."


def _score(result: Mapping[str, Any]) -> str:
    return f"{NAMES.get(result['score'], 'the figures')} on the validation images"


def columns(result: Mapping[str, Any]) -> tuple[str, ...]:
    """The heads of the table of trials."""
    return ("trial", *result["space"], f"validation {NAMES.get(result['score'], '')}", "spread", "time", "")


def trial_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """A line a trial, the best first; those without a figure last."""
    ordered = sorted(
        result["trials"], key=lambda each: (-(each["value"] if each["value"] is not None else -1.0), each["number"])
    )
    return [
        [
            str(trial["number"]),
            *(format_value(value) for value in trial["knobs"].values()),
            percent(trial["value"]),
            percent(trial["spread"]),
            duration(trial["seconds"]) if trial["seconds"] is not None else "–",
            _remark(trial, result),
        ]
        for trial in ordered
    ]


def _remark(trial: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    if trial["state"] != "complete":
        return {"fail": "failed", "pruned": "given up"}.get(trial["state"], trial["state"])
    words = ["best"] if trial["number"] == result["best"] else []
    return ", ".join([*words, *(["as said"] if trial["number"] == 0 and result["said"] else [])])


def best_rows(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(name, value, spread) of the best trial."""
    if result["best"] is None:
        return []
    name, test = NAMES[result["score"]], result["test"]
    lines = [("trial", str(result["best"]), "–")]
    lines += [(knob, format_value(value), "–") for knob, value in result["knobs"].items()]
    lines.append((f"{name} on validation (chosen by it)", percent(result["value"]), percent(result["spread"])))
    if result["said"] and result["best"] != 0:
        said = result["trials"][0]
        lines.append((f"{name} on validation, as said (trial 0)", percent(said["value"]), percent(said["spread"])))
    if test:
        for key, label in (("top1", "top-1"), ("agreement", "agreement with the teacher")):
            if test[key] is not None:
                lines.append(
                    (
                        f"{label} on {test['pictures']:,} test images",
                        percent(test[key]),
                        percent(test[f"{key}_spread"]),
                    )
                )
    return lines


def _honesty(result: Mapping[str, Any]) -> str:
    best = f"The best trial was chosen by {_score(result)}, so its figure there flatters it. "
    if result["cut"]:
        best += f"The data had no validation split: {result['cut']} of the training images were cut off for it. "
    if not result["tested"]:
        return best + "There are no test images, so no figure is free of that choice."
    return best + "The test images were kept from all trials."


def evaluation_counts(result: Mapping[str, Any]) -> list[list[str]]:
    """How often students were judged on each split, and what was chosen by that."""
    rows = [
        [name, f"{count:,}", "–", "the best checkpoint of each run, the best trial" if name == "val" else "nothing"]
        for name, count in result["seen"].items()
    ]
    if result["tested"]:
        students = f"once by each of {result['executions']} students" if result["executions"] > 1 else "once"
        trials = ", ".join(map(str, result["tested"]))
        rows.append(["test", "0", f"{students} of trial {trials}", "nothing"])
    return rows
