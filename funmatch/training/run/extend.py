"""Extends finished runs: a warm-up-stable-decay run resumes from before its cool-down, and every end is kept.

Before its cool-down such a run does not depend on its length, so a run that is extended takes the same path as one that
was long from the start, with the same warm-up. The checkpoint before the cool-down is kept for it. A folder of `ends/`,
`step-<n>` (or `step-<n>-of-<length>`, where early stopping ended it), holds the student, metrics and records of the
cool-down of an earlier end. (Hägele et al., "Scaling laws and compute-optimal training beyond fixed training
durations", 2024, section 3.)
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from funmatch.config import TAUGHT
from funmatch.errors import InputError
from funmatch.ops.optim import schedules
from funmatch.runtime.disk.files import write_folder_atomically
from funmatch.runtime.disk.partials import remove
from funmatch.runtime.log import info
from funmatch.training.run import checkpoint, compare
from funmatch.training.run import folder as run_folder
from funmatch.training.run.damage import describe_damage


def stable_step(options: Mapping[str, Any]) -> int | None:
    """Returns the step at which a run's cool-down begins, or None if its schedule is not wsd."""
    if options.get("schedule") != "wsd":
        return None
    return options["steps"] - schedules.cooldown_length(options["steps"], options["cooldown_steps"])


def warmup_of(folder: Path) -> int | None:
    """Returns the warm-up, in steps, of the run in a folder if it can be extended, else None."""
    options = run_folder.options_of(folder)
    return options.get("warmup_steps") if options.get("schedule") == "wsd" else None


def extend(folder: Path, verb: str, options: dict[str, Any], facts: dict[str, Any]) -> None:
    """Makes a run longer if only its length differs from what is requested; else leaves it as it is.

    If this is interrupted, the same command does the rest, and the old command still ends as it did.

    Raises:
        InputError: the run is longer than requested, its cool-down began too late or too early for that, or another
            process is using it.
    """
    run = run_folder.Run(folder.expanduser())
    if not run.record.has_begun:
        return
    then, now = run.config, run_folder.record_of(verb, options, facts)
    before, after = then["knobs"], now["knobs"]
    old, new = stable_step(before), stable_step(after)
    # The length and what follows from it take the old values here; any other difference is refused as in any run.
    length = TAUGHT[verb].where(lambda opt: opt.extends)
    alike = now | {"knobs": after | {name: before.get(name) for name in length}}
    if old is None or new is None or before["steps"] == after["steps"] or compare.differences(then, alike):
        return
    # Both locks: the record is replaced below, and with it the file whose lock says that the run is in use.
    with run.record.beginning(), run.record.lock():
        _check(run, before["steps"], after["steps"], old, new)
        # Else a damaged end would be kept as it is, or not at all.
        if damage := describe_damage(run):
            raise InputError(f"{damage}; start the command of {before['steps']:,} steps again first, which mends it")
        _branch_off(run, old, before["steps"])
        # Last: until here the old command ends as it did, and this one begins again.
        # Its length alone: what else may have other values is recorded when the run resumes.
        run.record.write(then | {"knobs": before | {name: after[name] for name in length}})
    lengths = f"from {before['steps']:,} to {after['steps']:,} steps"
    info(f"{run.folder}: extended {lengths}; its warm-up stays {after['warmup_steps']:,} steps long")


def _check(run: run_folder.Run, before: int, after: int, old: int, new: int) -> None:
    """Raises `InputError` unless a run can be extended.

    Args:
        before, after: lengths of the run, steps.
        old, new: steps at which the cool-downs begin.
    """
    if after < before:
        places = [each.folder for each in earlier_ends(run) if each.folder.name.endswith(f"-{after:09}")]
        also = f"; its end at step {after:,} is kept in {places[0]}" if places else ""
        raise InputError(f"{run.folder} holds a run of {before:,} steps, which can be made longer, not {after:,}{also}")
    if new < old:
        raise InputError(
            f"{run.folder}: a run of {after:,} steps would cool down from step {new:,}, before the {old:,} at which "
            f"this one did; pass --cooldown-steps {after - old} or less"
        )
    # A run that has not reached its cool-down, or cools down from step 0, needs no earlier checkpoint.
    cooled = checkpoint.is_beyond(run.checkpoints, old) or (run.result or {"step": 0})["step"] > old > 0
    if cooled and old and not checkpoint.can_go_back(run.checkpoints, old):
        raise InputError(
            f"{run.folder}: the checkpoint of step {old:,} is gone, so the run cannot resume from before its "
            "cool-down; choose another --out"
        )


def _branch_off(run: run_folder.Run, step: int, length: int) -> None:
    """Keeps the end of a run of this length if it is finished, and takes the run back to a step before the end."""
    result = run.result
    if result is not None:
        # Copied whole before anything is removed, so that a kill loses nothing of this end.
        place = run.folder / "ends" / _name(result["step"], length)
        if not (place / "result.json").is_file():
            with write_folder_atomically(place) as partial:
                for name in run_folder.STUDENTS:
                    if (run.folder / name).is_dir():
                        shutil.copytree(run.folder / name, partial / name)
                lines = [json.dumps(each) + "\n" for each in run.metrics.read() if each["step"] > step]
                (partial / "metrics.jsonl").write_text("".join(lines))
                run_folder.Run(partial).finish(result | {"run": str(place)})
    # The result first: without it the run counts as unfinished, and what is removed after it is written again.
    for name in ("result.json", "report.html", run_folder.EVALUATION):
        (run.folder / name).unlink(missing_ok=True)
    checkpoint.go_back(run.checkpoints, step)
    for name in run_folder.STUDENTS:
        folder = run.folder / name
        for path in [*folder.iterdir()] if folder.is_symlink() else [folder]:  # a link to another disk stays
            remove(path)


def earlier_ends(run: run_folder.Run) -> list[run_folder.Run]:
    """Returns the earlier ends of a run that was extended, shortest first; each has its own result and records."""
    ends = map(run_folder.Run, sorted((run.folder / "ends").glob("step-*")))
    return [end for end in ends if end.result is not None]


def _name(step: int, length: int) -> str:
    """Returns the name of an end."""
    # With the length where early stopping ended the run: it may stop at the same step with another length.
    return f"step-{step:09}" if step == length else f"step-{step:09}-of-{length:09}"
