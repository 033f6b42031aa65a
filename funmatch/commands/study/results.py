"""What came of the runs of a study: all that is drawn of them, a line a run, without their folders."""

import json
import math
from pathlib import Path
from typing import Any

from funmatch.commands.study.spec import RunSpec
from funmatch.runtime.log import info
from funmatch.training.run import folder as run_folder

POINTS = 200
"""Of a curve that are kept, at most."""
LAST = 0.1
"""Share of a run's records at its end whose mean is the final training loss."""


def results(folder: Path) -> list[dict[str, Any]]:
    """What `series.record` wrote; a line that is damaged is left out."""
    path, found = folder / "results.jsonl", []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            info(f"a line of {path} is damaged; `funmatch study` with the same words makes it again")
    return found


def result_of(entry: RunSpec, folder: Path) -> dict[str, Any]:
    """All that is to be known of a finished run without its folder.

    Returns:
        `place`, `name`, `group`, `seed`, `verb`, `asked`, `knobs`, `facts`, `figures` and `curves`: event to columns.
    """
    done = run_folder.find_run(folder)
    records, result = done.metrics.read(), done.result or {}
    figures = {name: value for name, value in result.items() if isinstance(value, int | float) or value is None}
    figures["teacher_top1"] = (result.get("teacher") or {}).get("top1")
    losses = [each["loss"] for each in records if each["event"] == "step"]
    figures["loss"] = math.fsum(tail := losses[-max(1, round(LAST * len(losses))) :]) / len(tail) if losses else None
    for event in ("views", "ema"):
        last = next((each for each in reversed(records) if each["event"] == event), {})
        figures |= {f"{event}_{name}": value for name, value in last.items() if name not in ("event", "step", "split")}
    figures |= {f"ema_{name}": value for name, value in (result.get("ema") or {}).items()}
    return {
        "place": entry.place, "name": entry.name, "group": entry.group, "seed": entry.seed, "verb": entry.verb,
        "shown": entry.shown,
        "asked": {name: str(value) if isinstance(value, Path) else value for name, value in entry.knobs.items()},
        "knobs": {name: value for name, value in done.config["knobs"].items() if name != "out"},
        "facts": {name: done.config["facts"][name] for name in ("machine", "versions", "pictures", "parameters")},
        "figures": run_folder.finite(figures),
        "curves": {event: columns(records, event) for event in ("step", "eval", "views", "ema")},
    }  # fmt: skip


def columns(records: list[dict[str, Any]], event: str) -> dict[str, list[Any]]:
    """The records of one event, a list a figure; of many records as many as a plot can show, the last among them."""
    own = [each for each in records if each["event"] == event]
    every = max(1, math.ceil(len(own) / POINTS))
    own = own[::-1][::every][::-1]
    names = [name for name, value in (own[0] if own else {}).items() if name != "event" and not isinstance(value, str)]
    return {name: [each.get(name) for each in own] for name in names}
