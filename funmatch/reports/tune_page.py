"""Renders the results of a hyperparameter search: a table of trials, and one offline HTML page with plots."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from funmatch.reports import tune_plots
from funmatch.reports.html import load_template
from funmatch.runtime.text import MISSING, duration, format_value, percent

NAMES = {"top1": "top-1", "map": "mAP", "knn": "neighbours", "agreement": "agreement", "cosine": "cosine"}
EVALUATION_COLUMNS = ("split", "during training", "at the end", "used to select")


def page(result: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Renders the page as HTML.

    Args:
        result: the search's `result.json`.
        settings: the search's `study.json`.
    """
    template = load_template("search.html")
    return template.render(
        title=f"{Path(result['study']).name}: hyperparameter search",
        lead=lead(result),
        best_rows=best_rows(result),
        run=result["best_run"],
        command=result["command"],
        columns=columns(result),
        rows=trial_rows(result),
        # As text, since the template compares it with a cell.
        best=str(result["best"]),
        plots=tune_plots.draw_plots(result),
        selection_note=_selection_note(result),
        evaluation_columns=EVALUATION_COLUMNS,
        evaluations=evaluation_counts(result),
        failed=[[trial["number"], trial["error"]] for trial in result["trials"] if trial["error"]],
        settings=[
            (name, value) for part in settings.values() if isinstance(part, dict) for name, value in part.items()
        ],
    )


def lead(result: Mapping[str, Any]) -> str:
    """Summarises a search in one sentence."""
    subject = result["recipe"] or f"funmatch {result['verb']}"
    times = f" × {result['executions']} executions" if result["executions"] > 1 else ""
    trials = f"{len(result['trials'])} trials{times} of {subject}"
    return f"{trials}, sampler {result['sampler']}, selected by {_score(result)}."


def _score(result: Mapping[str, Any]) -> str:
    return f"{NAMES.get(result['score'], 'the metrics')} on the validation images"


def columns(result: Mapping[str, Any]) -> tuple[str, ...]:
    """Column titles of the table of trials."""
    return ("trial", *result["space"], f"validation {NAMES.get(result['score'], '')}", "std", "time", "")


def trial_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """One row per trial, the best first; trials without a value last."""
    # Validation scores are shares in [0, 1], so -1 sorts failed and pruned trials behind every finished one.
    ordered = sorted(
        result["trials"], key=lambda each: (-(each["value"] if each["value"] is not None else -1.0), each["number"])
    )
    return [
        [
            str(trial["number"]),
            *(format_value(value) for value in trial["knobs"].values()),
            percent(trial["value"]),
            percent(trial["spread"]),
            duration(trial["seconds"]) if trial["seconds"] is not None else MISSING,
            _note(trial, result),
        ]
        for trial in ordered
    ]


def _note(trial: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    if trial["state"] != "complete":
        # Optuna's other states (running, waiting) are words already.
        return {"fail": "failed", "pruned": "pruned"}.get(trial["state"], trial["state"])
    words = ["best"] if trial["number"] == result["best"] else []
    # Trial 0 has the values of the command line only where they lie in the space.
    return ", ".join([*words, *(["your settings"] if trial["number"] == 0 and result["said"] else [])])


def best_rows(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(name, value, standard deviation over executions) of the best trial."""
    if result["best"] is None:
        return []
    name, test = NAMES[result["score"]], result["test"]
    lines = [("trial", str(result["best"]), MISSING)]
    lines += [(option, format_value(value), MISSING) for option, value in result["knobs"].items()]
    lines.append((f"{name} on validation (used to select)", percent(result["value"]), percent(result["spread"])))
    # What a search gained is the difference to the settings that it began with.
    if result["said"] and result["best"] != 0:
        own = result["trials"][0]
        lines.append((f"{name} on validation, your settings (trial 0)", percent(own["value"]), percent(own["spread"])))
    if test:
        for key, label in (("top1", "top-1"), ("map", "mAP"), ("agreement", "agreement with the teacher")):
            if test.get(key) is not None:
                lines.append(
                    (
                        f"{label} on {test['pictures']:,} test images",
                        percent(test[key]),
                        percent(test[f"{key}_spread"]),
                    )
                )
    return lines


def _selection_note(result: Mapping[str, Any]) -> str:
    """States which results are biased by selection: the maximum of noisy scores is too high on average."""
    best = f"The best trial was selected by {_score(result)}, so its value there is optimistic. "
    if result["cut"]:
        best += f"The data has no validation split: {result['cut']} of the training images were held out for it. "
    if not result["tested"]:
        return best + "There are no test images, so no metric is independent of the selection."
    return best + "No trial was selected by test images."


def evaluation_counts(result: Mapping[str, Any]) -> list[list[str]]:
    """How often students were evaluated on each split, and what was selected by the results (`EVALUATION_COLUMNS`)."""
    rows = [
        [name, f"{count:,}", MISSING, "best checkpoint of each run, best trial" if name == "val" else "nothing"]
        for name, count in result["seen"].items()
    ]
    if result["tested"]:
        students = f"once by each of {result['executions']} students" if result["executions"] > 1 else "once"
        trials = ", ".join(map(str, result["tested"]))
        # The 0 is stated, since readers ask whether test images were used to select.
        rows.append(["test", "0", f"{students} of trial {trials}", "nothing"])
    return rows
