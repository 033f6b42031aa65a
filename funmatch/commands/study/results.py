"""Reads and writes `results.jsonl`: all that is drawn of a study's runs, a line a run, without their folders."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from funmatch.commands.study.spec import RunSpec
from funmatch.ops.tasks.task import task_of_metrics
from funmatch.runtime.disk.files import write_atomically
from funmatch.runtime.disk.json_files import EACH, NewerFormat, newer, parse_json
from funmatch.runtime.disk.json_files import FORMAT as FORMAT_KEY
from funmatch.runtime.log import info
from funmatch.training.run import folder as run_folder

FORMAT = 1
"""Of a line; version 0.1.0 wrote no number, which is read as 1."""
FILE = "results.jsonl"
SHAPE = {
    "place": str, "name": str, "group": str, "seed": int, "verb": str, "shown?": bool, "asked": dict,
    "knobs": {"data?": list[str], "student?": str | None, "teacher?": list[str] | str | None},
    "facts": {
        "machine?": str | None, "versions?": dict[str, str] | None, "pictures?": dict[str, int] | None,
        "parameters?": int | None,
    },
    "figures": {"seconds": float, EACH: float | None}, "curves": dict[str, dict[str, list[float | None]]],
}  # fmt: skip
POINTS = 200
"""Points of a curve that are kept, at most."""
LAST = 0.1
"""Share of a run's records at its end whose mean is the final training loss."""


def results(folder: Path) -> list[dict[str, Any]]:
    """The results of a study's runs; a line that is damaged is left out.

    Raises:
        NewerFormat: a newer version wrote some of them.
    """
    path, found = folder / FILE, []
    # Bytes that are not UTF-8 make only their line damaged.
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            result = parse_json(line, {f"{FORMAT_KEY}?": int})
            # Before the shape, which a newer version may have changed.
            if (number := result.get(FORMAT_KEY, 1)) > FORMAT:
                raise NewerFormat(newer(path, number, FORMAT, "choose another --out"))
            found.append(parse_json(line, SHAPE))
        # It is a ValueError, too, and must not be taken for damage: the line would be written again and lost.
        except NewerFormat:
            raise
        except ValueError:
            info(f"a line of {path} is damaged; the same `funmatch study` command writes it again")
    return found


def write_results(folder: Path, found: Iterable[Mapping[str, Any]]) -> None:
    """Writes the results of a study's runs, a line each."""
    lines = [json.dumps({FORMAT_KEY: FORMAT, **result}) + "\n" for result in found]
    # Whole, not appended to: a study that is killed leaves the earlier file.
    write_atomically(folder / FILE, "".join(lines))


def result_of(entry: RunSpec, folder: Path) -> dict[str, Any]:
    """All that a study keeps of a finished run, so that its folder is not needed to draw it.

    Returns:
        `place`, `name`, `group`, `seed`, `verb`, `asked`, `knobs`, `facts`, `figures` and `curves`: event to columns.
    """
    done = run_folder.find_run(folder)
    records, result = done.metrics.read(), done.result or {}
    figures = {name: value for name, value in result.items() if isinstance(value, int | float) or value is None}
    of_teacher = dict.fromkeys(("top1", task_of_metrics(result).score))
    figures |= {f"teacher_{name}": (result.get("teacher") or {}).get(name) for name in of_teacher}
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
        # Without `out`: a study may have moved.
        "knobs": {name: value for name, value in done.config["knobs"].items() if name != "out"},
        "facts": {name: done.config["facts"].get(name) for name in ("machine", "versions", "pictures", "parameters")},
        "figures": run_folder.finite(figures),
        "curves": {event: columns(records, event) for event in ("step", "eval", "views", "ema")},
    }  # fmt: skip


def columns(records: list[dict[str, Any]], event: str) -> dict[str, list[Any]]:
    """The records of one event as columns by name; of many records as many as a plot can show, the last among them."""
    own = [each for each in records if each["event"] == event]
    every = max(1, math.ceil(len(own) / POINTS))
    # From the end, so that the last point stays.
    own = own[::-1][::every][::-1]
    names = [name for name, value in (own[0] if own else {}).items() if name != "event" and not isinstance(value, str)]
    return {name: [each.get(name) for each in own] for name in names}
