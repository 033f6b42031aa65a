"""Finds damage in the end of a run, and whether it can be written again from the last checkpoint."""

from pathlib import Path
from typing import Any

from funmatch.errors import InputError
from funmatch.runtime.disk.checksums import verify_folder
from funmatch.runtime.disk.json_files import Damaged, NewerFormat
from funmatch.runtime.log import info
from funmatch.training.run import compare
from funmatch.training.run import folder as run_folder
from funmatch.training.run.checkpoint import STATE
from funmatch.training.run.places import STEP, name_of, saved_step
from funmatch.training.run.state import read_state


def describe_damage(run: run_folder.Run) -> str | None:
    """Describes what is damaged of a run's end: its result or a student; returns None if all is as written."""
    result = run.folder / run_folder.RESULT_FILE
    if run.result is None and result.is_file():
        return f"{result} is damaged"
    for name in run_folder.STUDENTS:
        try:
            verify_folder(run.folder / name)
        except Damaged as error:
            return str(error)
    return None


def has_changed_log(run: run_folder.Run) -> bool:
    """Returns whether `metrics.jsonl` is not as the newest checkpoint says, as far as that can be read."""
    try:
        state = read_state(run.checkpoints / name_of(STEP, saved_step(run.checkpoints)) / STATE)
    except (OSError, Damaged, NewerFormat):
        return False  # what resumes or evaluates the run will say so
    return state.log_damaged or run.metrics.has_changed(state.log_bytes, state.log_crc)


def result_if_same(folder: Path, verb: str, options: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the metrics of the run in a folder if it is finished, undamaged, and has the same record, else None.

    Raises:
        InputError: its end is damaged, and there is no checkpoint to write it from again.
    """
    # Nothing more is computed, so what would change its rounding does not matter.
    if not run_folder.provenance_if_same(folder, verb, options | {compare.ALLOW: True}, facts):
        return None
    run = run_folder.Run(folder.expanduser())
    if has_changed_log(run):
        run.metrics.warn_of_change()
    damage = describe_damage(run)
    if damage is None:
        return run.result
    # Without its last checkpoint the whole run would be repeated.
    step = saved_step(run.checkpoints)
    if not step or step < (run.result or {"step": step})["step"]:
        raise InputError(f"{damage}, and the last checkpoint, which could mend it, is gone; choose another --out")
    info(f"WARNING: {damage}; the end of {run.folder} is written again from its last checkpoint")
    return None
