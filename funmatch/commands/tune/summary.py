"""What a search came to: a row for each trial, the best, its figures on the test images, how often what was seen."""

import json
import statistics
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from funmatch.commands.tune import space as search_space
from funmatch.commands.tune.search import SearchSpec
from funmatch.commands.tune.space import Value
from funmatch.config import Evaluate, Group, recipes
from funmatch.config.data import VALIDATION_SHARE
from funmatch.runtime.files import write_atomically
from funmatch.runtime.json_files import Damaged, read_json
from funmatch.runtime.log import info
from funmatch.training import evaluate
from funmatch.training.run import folder as run_folder
from funmatch.training.teachers.loading import Modules

if TYPE_CHECKING:  # Optuna is an extra
    import optuna

FILE = "result.json"
NUMBER = float | None
TRIAL = {
    "number": int, "state": str, "knobs": dict[str, Any], "value": NUMBER, "spread": NUMBER, "seconds": NUMBER,
    "metric": str | None, "error": str | None, "runs": list[str],
}  # fmt: skip
SHAPE = {
    "study": str, "verb": str, "recipe": str | None, "score": str | None, "trials": [TRIAL], "best": int | None,
    "value": NUMBER, "spread": NUMBER, "knobs": dict[str, Any] | None, "best_run": str | None,
    "space": dict[str, dict], "sampler": str, "executions": int, "said": bool,
    "importance": dict[str, NUMBER] | None, "command": str | None, "cut": str | None,
    "test": dict[str, NUMBER] | None, "tested": list[int], "seen": dict[str, int],
}  # fmt: skip
"""What `result.json` of a search holds, if it is undamaged."""


def read_summary(folder: Path) -> dict[str, Any]:
    """What `result.json` of a search holds.

    Raises:
        OSError: it is missing.
        Damaged: it is not the summary of a search.
    """
    return read_json(folder / FILE, SHAPE)


def finish_summary(asked: SearchSpec) -> dict[str, Any] | None:
    """The summary of the search, if it is over and had as many trials as are requested now."""
    try:
        result = read_summary(asked.folder)
    except (OSError, Damaged):
        return None  # a damaged one is computed again from the storage
    return result if len(result["trials"]) >= asked.trials else None


def end_summary(study: "optuna.Study", asked: SearchSpec, given: Modules) -> dict[str, Any]:
    """Sums a study up: the test images are looked at once, by the students of the best trial."""
    from funmatch.commands.tune import optuna_storage

    rows = [row(frozen, asked) for frozen in study.get_trials(deepcopy=False)]
    complete = [each for each in rows if each["value"] is not None]
    best = max(complete, key=lambda each: (each["value"], -each["number"]), default=None)
    result: dict[str, Any] = {
        "study": str(asked.folder),
        "verb": asked.verb,
        "recipe": asked.base.recipe,
        "score": next((each["metric"] for each in complete), None),
        "trials": rows,
        "best": best and best["number"],
        "value": best and best["value"],
        "spread": best and best["spread"],
        "knobs": best and best["knobs"],
        "best_run": best and best["runs"][0],
        "space": {name: asdict(span) for name, span in asked.space.items()},
        "sampler": asked.search.sampler,
        "executions": asked.search.executions,
        "said": asked.first is not None,
        "importance": optuna_storage.importance(study),
        "command": best and command(asked, best["knobs"]),
        "cut": VALIDATION_SHARE if asked.cut else None,
        "storage": optuna_storage.display_url(asked.place),
        "name": asked.name,
    }
    result |= test_metrics(asked, best, given)
    result["seen"] = evaluation_counts(asked, len(rows))
    text = json.dumps(run_folder.finite(result), indent=2)
    write_atomically(asked.folder / FILE, text)
    return json.loads(text)


def row(frozen: Any, asked: SearchSpec) -> dict[str, Any]:
    """What is told of a trial."""
    scores = frozen.user_attrs.get("scores", [])
    return {
        "number": frozen.number,
        "state": frozen.state.name.lower(),
        "knobs": {name: frozen.params.get(name) for name in asked.space},
        "value": frozen.value if frozen.state.name == "COMPLETE" else None,
        "spread": statistics.stdev(scores) if len(scores) > 1 else None,
        "scores": scores,
        "metric": frozen.user_attrs.get("metric"),
        "seconds": frozen.user_attrs.get("seconds"),
        "error": frozen.user_attrs.get("error"),
        "runs": [str(asked.run_folder(frozen.number, each)) for each in range(asked.search.executions)],
    }


def test_metrics(asked: SearchSpec, best: dict[str, Any] | None, given: Modules) -> dict[str, Any]:
    """`test`: what the students of the best trial come to on the test images, which no trial has seen; and
    `tested`: the trials that were judged on them, this one and those that were best before there were more."""
    before: list[int] = []
    with suppress(OSError, Damaged):
        before = read_json(asked.folder / FILE, {"tested": list[int]})["tested"]
    if best is None or not asked.tested:
        return {"test": None, "tested": before}
    info(f"trial {best['number']} is the best; its students are evaluated on the test images")
    figures = [
        evaluate.run(
            Evaluate(model=folder, split="test", device=asked.base.device, precision=asked.base.precision), given
        )
        for folder in best["runs"]
    ]
    means: dict[str, Any] = {"pictures": figures[0]["pictures"], "students": len(figures)}
    for name in ("top1", "top5", "agreement", "kl", "ece"):
        values = [each[name] for each in figures if each[name] is not None]
        means[name] = statistics.fmean(values) if values else None
        means[f"{name}_spread"] = statistics.stdev(values) if len(values) > 1 else None
    return {"test": means, "tested": [*(one for one in before if one != best["number"]), best["number"]]}


def evaluation_counts(asked: SearchSpec, trials: int) -> dict[str, int]:
    """How often students were judged on each split while they were taught, over all runs of the study."""
    counts: dict[str, int] = {}
    for number in range(trials):
        for execution in range(asked.search.executions):
            for record in run_folder.Run(asked.run_folder(number, execution)).metrics.read():
                if record["event"] == "eval":
                    counts[record["split"]] = counts.get(record["split"], 0) + 1
    return counts


def command(asked: SearchSpec, chosen: Mapping[str, Value]) -> str:
    """The command that trains with these values in full: for a recipe's own length, on all training images."""
    base, recipe = asked.base, recipes.find(asked.base.recipe) if asked.base.recipe else None
    plain: dict[str, Any] = {name: field.default for name, field in type(base).model_fields.items()}
    plain |= dict(recipe.over({})) if recipe else {}
    printed = type(base).where(lambda opt: opt.group is Group.OUTPUT and not opt.study)
    silent = {*printed, "recipe", "patience"} | ({"val"} if asked.cut else set())
    if recipe and {"steps", "epochs"} & recipe.knobs.keys() and not {"steps", "epochs"} & chosen.keys():
        silent |= {"steps", "epochs"}
    knobs = {name: value for name, value in search_space.apply_choices(base, chosen).items() if name not in silent}
    said = {name: value for name, value in knobs.items() if value != plain[name] and value is not False}
    out = asked.folder.with_name(f"{asked.folder.name}-best")
    words = [f"funmatch {asked.verb}", *([recipe.name] if recipe else []), *recipes.options(asked.verb, said)]
    return " ".join([*words, f"--out {out}"])
