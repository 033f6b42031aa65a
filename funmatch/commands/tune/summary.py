"""Summarises a search: a row per trial, the best one, its metrics on test images, and the evaluations of each split."""

import json
import statistics
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from funmatch.commands.tune import space as search_space
from funmatch.commands.tune.search import FORMAT, SearchSpec
from funmatch.commands.tune.space import Value
from funmatch.config import Evaluate, recipes
from funmatch.config.data import VALIDATION_SHARE
from funmatch.config.metadata import Changes
from funmatch.runtime.disk.files import write_atomically
from funmatch.runtime.disk.json_files import EACH, LARGEST, Damaged, read_json, read_record
from funmatch.runtime.log import info
from funmatch.training.evaluation import evaluate
from funmatch.training.evaluation.outcome import DECIDING
from funmatch.training.run import folder as run_folder
from funmatch.training.teachers.loading import Modules

if TYPE_CHECKING:  # Optuna is an extra
    import optuna

FILE = "result.json"
NUMBER = float | None
TEST = {"pictures", "top1", "top1_spread", "agreement", "agreement_spread"}
TRIAL = {
    "number": int, "state": str, "knobs": dict[str, Any], "value": NUMBER, "spread": NUMBER, "seconds": NUMBER,
    "metric": str | None, "error": str | None, "runs": list[str],
}  # fmt: skip
SHAPE = {
    "study": str, "verb": str, "recipe": str | None, "score": str | None, "trials": [TRIAL], "best": int | None,
    "value": NUMBER, "spread": NUMBER, "knobs": dict[str, Any] | None, "best_run": str | None,
    "space": {EACH: {"choices": list, "low": float, "high": float, "log": bool}}, "sampler": str, "executions": int,
    "said": bool,
    "importance": dict[str, NUMBER] | None, "command": str | None, "cut": str | None,
    "test": dict[str, NUMBER] | None, "tested": list[int], "seen": dict[str, int],
}  # fmt: skip
"""What `result.json` of a search holds, if it is undamaged."""


def read_summary(folder: Path) -> dict[str, Any]:
    """Reads `result.json` of a search.

    Raises:
        OSError: it is missing.
        NewerFormat: a newer version wrote it.
        Damaged: it is not the summary of a search.
    """
    found = read_record(folder / FILE, SHAPE, FORMAT, "choose another --out")
    if not _is_consistent(found):
        raise Damaged(f"{folder / FILE} is damaged (its parts contradict each other)")
    return found


def _is_consistent(found: Mapping[str, Any]) -> bool:
    """Whether the parts of a summary fit each other: the best trial is one of them, and all values lie in the space."""
    numbers = {trial["number"] for trial in found["trials"]}
    complete = [trial for trial in found["trials"] if trial["value"] is not None]
    wanted = ("value", "knobs", "best_run", "command")
    is_known = found["best"] in numbers and found["score"] in DECIDING
    has_best = is_known and all(found[name] is not None for name in wanted)
    has_test = found["test"] is None or found["test"].keys() >= TEST
    inside = all(
        _is_inside(span, trial["knobs"].get(name)) for trial in complete for name, span in found["space"].items()
    )
    return (found["best"] is None or has_best) and has_test and inside


def _is_inside(span: Mapping[str, Any], value: Any) -> bool:
    if span["choices"]:
        return value in span["choices"]
    numbers = (span["low"], value, span["high"])
    if not all(isinstance(one, int | float) and abs(one) < LARGEST for one in numbers):
        return False
    return span["low"] <= value <= span["high"] and (span["low"] > 0 or not span["log"])


def finish_summary(spec: SearchSpec) -> dict[str, Any] | None:
    """The summary of the search, if it is over and had as many trials as are requested now."""
    try:
        result = read_summary(spec.folder)
    except (OSError, Damaged):
        return None  # a damaged one is computed again from the storage
    # More trials than are requested are not a reason to begin again.
    return result if len(result["trials"]) >= spec.trials else None


def end_summary(study: "optuna.Study", spec: SearchSpec, modules: Modules) -> dict[str, Any]:
    """Summarises a finished search; evaluates the students of the best trial, and no others, on the test images."""
    from funmatch.commands.tune import optuna_storage

    rows = [row(frozen, spec) for frozen in study.get_trials(deepcopy=False)]
    complete = [each for each in rows if each["value"] is not None]
    # Of equal trials the first, whatever the order in which workers finished.
    best = max(complete, key=lambda each: (each["value"], -each["number"]), default=None)
    result: dict[str, Any] = {
        "study": str(spec.folder),
        "verb": spec.verb,
        "recipe": spec.base.recipe,
        "score": next((each["metric"] for each in complete), None),
        "trials": rows,
        "best": best and best["number"],
        "value": best and best["value"],
        "spread": best and best["spread"],
        "knobs": best and best["knobs"],
        "best_run": best and best["runs"][0],
        "space": {name: asdict(span) for name, span in spec.space.items()},
        "sampler": spec.search.sampler,
        "executions": spec.search.executions,
        "said": spec.first is not None,
        "importance": optuna_storage.importance(study),
        "command": best and command(spec, best["knobs"]),
        "cut": VALIDATION_SHARE if spec.cut else None,
        "storage": optuna_storage.display_url(spec.place),
        "name": spec.name,
    }
    result |= test_metrics(spec, best, modules)
    result["seen"] = evaluation_counts(spec, len(rows))
    # NaN is not JSON; a student that diverged has it in its metrics.
    text = json.dumps(run_folder.finite(result), indent=2)
    write_atomically(spec.folder / FILE, text)
    # What was written, so that this process and a later one that reads the file return the same.
    return json.loads(text)


def row(frozen: Any, spec: SearchSpec) -> dict[str, Any]:
    """The row of a trial in `result.json`."""
    scores = frozen.user_attrs.get("scores", [])
    return {
        "number": frozen.number,
        "state": frozen.state.name.lower(),
        "knobs": {name: frozen.params.get(name) for name in spec.space},
        # Optuna gives a pruned trial its last reported score as a value, which must not win.
        "value": frozen.value if frozen.state.name == "COMPLETE" else None,
        "spread": statistics.stdev(scores) if len(scores) > 1 else None,
        "scores": scores,
        "metric": frozen.user_attrs.get("metric"),
        "seconds": frozen.user_attrs.get("seconds"),
        "error": frozen.user_attrs.get("error"),
        "runs": [str(spec.run_folder(frozen.number, each)) for each in range(spec.search.executions)],
    }


def test_metrics(spec: SearchSpec, best: dict[str, Any] | None, modules: Modules) -> dict[str, Any]:
    """Evaluates the students of the best trial on the test images, by which no trial was selected.

    Returns:
        `test`: means and standard deviations over the students; `tested`: the trials that were ever evaluated on these
        images, this one and those that were best before there were more trials.
    """
    before: list[int] = []
    # From the summary before this one: an extended search may have tested another trial first, and that must be told.
    with suppress(OSError, Damaged):
        before = read_json(spec.folder / FILE, {"tested": list[int]})["tested"]
    if best is None or not spec.tested:
        return {"test": None, "tested": before}
    info(f"trial {best['number']} is the best; its students are evaluated on the test images")
    results = [
        evaluate.run(
            Evaluate(model=folder, split="test", device=spec.base.device, precision=spec.base.precision), modules
        )
        # All executions of the best trial, whose mean was selected, not the luckiest of them.
        for folder in best["runs"]
    ]
    means: dict[str, Any] = {"pictures": results[0]["pictures"], "students": len(results)}
    for name in ("top1", "top5", "agreement", "kl", "ece", *(("map",) if "map" in results[0] else ())):
        # Without labels or a teacher some metrics cannot be computed.
        values = [each[name] for each in results if each[name] is not None]
        means[name] = statistics.fmean(values) if values else None
        means[f"{name}_spread"] = statistics.stdev(values) if len(values) > 1 else None
    return {"test": means, "tested": [*(one for one in before if one != best["number"]), best["number"]]}


def evaluation_counts(spec: SearchSpec, trials: int) -> dict[str, int]:
    """Counts the evaluations of each split during training, over all runs of the search."""
    counts: dict[str, int] = {}
    for number in range(trials):
        for execution in range(spec.search.executions):
            for record in run_folder.Run(spec.run_folder(number, execution)).metrics.read():
                if record["event"] == "eval":
                    counts[record["split"]] = counts.get(record["split"], 0) + 1
    return counts


def command(spec: SearchSpec, chosen: Mapping[str, Value]) -> str:
    """The command that trains with these values in full: for a recipe's own length, without early stopping."""
    base, recipe = spec.base, recipes.find(spec.base.recipe) if spec.base.recipe else None
    plain: dict[str, Any] = {name: field.default for name, field in type(base).model_fields.items()}
    plain |= dict(recipe.over({})) if recipe else {}
    printed = type(base).where(lambda opt: opt.changes == Changes.PLACE and not opt.study)
    # No early stopping: the final run trains to its end. Where the search held images out by default, that run holds
    # out the same ones, without an option.
    omitted = {*printed, "recipe", "patience"} | ({"val"} if spec.cut else set())
    # Searches of a recipe are usually shorter than it; the final run has the recipe's own length.
    if recipe and {"steps", "epochs"} & recipe.knobs.keys() and not {"steps", "epochs"} & chosen.keys():
        omitted |= {"steps", "epochs"}
    values = {name: value for name, value in search_space.apply_choices(base, chosen).items() if name not in omitted}
    changed = {name: value for name, value in values.items() if value != plain[name] and value is not False}
    # Beside the search, so that removing its trials leaves the final run.
    out = spec.folder.with_name(f"{spec.folder.name}-best")
    words = [f"funmatch {spec.verb}", *([recipe.name] if recipe else []), *recipes.options(spec.verb, changed)]
    return " ".join([*words, f"--out {out}"])
