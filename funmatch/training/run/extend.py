"""Runs that are prolonged: a warm-up-stable-decay run goes on from before its cool-down, and every end is kept.

Before its cool-down such a run does not know its length, so a run that is asked to be longer takes the same path as one
that was so from the start, with the same warm-up. `checkpoints/stable-<step>` is where the cool-down begins. A folder
of `ends/`, `step-<n>` (or `step-<n>-of-<length>`, where patience ended it), holds the student, figures and the records
of the cool-down of an end that was gone beyond. (Hägele et al., "Scaling laws and compute-optimal training beyond fixed
training durations", 2024, section 3.)
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from funmatch.config import TAUGHT
from funmatch.errors import InputError
from funmatch.ops.optim import schedules
from funmatch.runtime.files import try_lock_file, write_atomically, write_folder_atomically
from funmatch.runtime.log import info
from funmatch.training.run import checkpoint
from funmatch.training.run import folder as run_folder


def stable_step(knobs: Mapping[str, Any]) -> int | None:
    """The step at which a run's cool-down begins; None where its schedule is another."""
    if knobs.get("schedule") != "wsd":
        return None
    return knobs["steps"] - schedules.cooldown_length(knobs["steps"], knobs["cooldown_steps"])


def warmup_of(folder: Path) -> int | None:
    """The warm-up of the run in a folder, if it can be prolonged: it keeps that, whatever a longer run's default."""
    run = run_folder.Run(folder.expanduser())
    if not (run.folder / "config.json").is_file():
        return None
    knobs = run.config["knobs"]
    return knobs.get("warmup_steps") if knobs.get("schedule") == "wsd" else None


def extend(folder: Path, verb: str, knobs: dict[str, Any], facts: dict[str, Any]) -> None:
    """Makes a run longer if all that is asked otherwise is its length; else leaves it as it is.

    Whenever this is interrupted, the same command does the rest, and the old command still ends as it did.

    Raises:
        InputError: the run is longer than asked, its cool-down began too late or too early for that, or another
            process is at work.
    """
    run = run_folder.Run(folder.expanduser())
    if not (run.folder / "config.json").is_file():
        return
    then, now = run.config, run_folder.record_of(verb, knobs, facts)
    old, new = stable_step(then["knobs"]), stable_step(now["knobs"])
    length = TAUGHT[verb].where(lambda opt: opt.extends)
    alike = now | {"knobs": now["knobs"] | {name: then["knobs"].get(name) for name in length}}
    if old is None or new is None or then["knobs"]["steps"] == knobs["steps"] or run_folder.differences(then, alike):
        return
    lock = try_lock_file(run.folder / "config.json")
    if lock is None:
        raise InputError(f"another process is at work in {run.folder}")
    with lock:
        _check(run, then["knobs"]["steps"], knobs["steps"], old, new)
        _branch_off(run, old, then["knobs"]["steps"])
        write_atomically(run.folder / "config.json", json.dumps(then | {"knobs": now["knobs"]}, indent=2))
    lengths = f"from {then['knobs']['steps']:,} to {knobs['steps']:,} steps"
    info(f"{run.folder}: prolonged {lengths}; its warm-up stays {knobs['warmup_steps']:,} steps long")


def _check(run: run_folder.Run, before: int, after: int, old: int, new: int) -> None:
    """Raises `InputError` unless a run can become so long: `old` and `new` are the steps where the cool-downs begin."""
    if after < before:
        places = [each.folder for each in earlier_ends(run) if each.folder.name.endswith(f"-{after:09}")]
        also = f"; its end at step {after:,} is kept in {places[0]}" if places else ""
        raise InputError(f"{run.folder} holds a run of {before:,} steps, which can be made longer, not {after:,}{also}")
    if new < old:
        raise InputError(
            f"{run.folder}: a run of {after:,} steps would cool down from step {new:,}, before the {old:,} at which "
            f"this one did; say --cooldown-steps {after - old} or less"
        )
    beyond = [path for path in run.checkpoints.glob("step-*") if checkpoint.step_of(path) > old]
    stable = run.checkpoints / f"stable-{old:09}"
    cooled = bool(beyond) or (run.result or {"step": 0})["step"] > old > 0
    if cooled and old and not stable.is_dir() and not (run.checkpoints / f"step-{old:09}").is_dir():
        raise InputError(f"{stable} is gone, so the run cannot go on from before its cool-down; begin another --out")


def _branch_off(run: run_folder.Run, step: int, length: int) -> None:
    """Keeps the end that a run of this length came to, if it did, and takes the run back to a step before it."""
    result = run.result
    if result is not None:
        place = run.folder / "ends" / _name(result["step"], length)
        if not (place / "result.json").is_file():
            with write_folder_atomically(place) as partial:
                for name in ("student", "student-ema"):
                    if (run.folder / name).is_dir():
                        shutil.copytree(run.folder / name, partial / name)
                lines = [json.dumps(each) + "\n" for each in run.metrics.read() if each["step"] > step]
                (partial / "metrics.jsonl").write_text("".join(lines))
                (partial / "result.json").write_text(json.dumps(result | {"run": str(place)}, indent=2))
    for name in ("result.json", "report.html"):
        (run.folder / name).unlink(missing_ok=True)
    checkpoint.go_back(run.checkpoints, step)
    for name in ("student", "student-ema"):
        shutil.rmtree(run.folder / name, ignore_errors=True)


def earlier_ends(run: run_folder.Run) -> list[run_folder.Run]:
    """The ends that a run has gone beyond, the first one first; each has a result and the records of its cool-down."""
    return [
        run_folder.Run(path)
        for path in sorted((run.folder / "ends").glob("step-*"))
        if (path / "result.json").is_file()
    ]


def _name(step: int, length: int) -> str:
    """What an end is called: a run that patience ended may come to the same step at several lengths."""
    return f"step-{step:09}" if step == length else f"step-{step:09}-of-{length:09}"
