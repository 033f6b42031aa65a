"""Writes, keeps and restores checkpoints: tensors in safetensors, the rest in JSON, each folder whole or absent.

`checkpoints/step-<n>/` holds the student, its optimizer, further modules (the average of its weights) and
`state.json`; the newest two are kept. `checkpoints/best-<n>/` holds the student alone, where it scored best on
validation. `checkpoints/stable-<n>/` is that of a step before the learning rate cools down, from which a run can be
extended.

`places.py` has these names; `state.py` defines what `state.json` holds. Each folder has a manifest of checksums, which
is verified before anything of it is used; checkpoints of earlier versions have none.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from funmatch.errors import InputError, first_line, is_out_of_memory
from funmatch.ops.optim.state import load_optimizer_state_, optimizer_state_dict
from funmatch.runtime.disk.checksums import verify_folder
from funmatch.runtime.disk.files import write_folder_atomically
from funmatch.runtime.disk.json_files import Damaged, read_record
from funmatch.runtime.disk.partials import remove, remove_partials
from funmatch.runtime.log import info
from funmatch.training.loop import all_finite
from funmatch.training.run.places import BEST, STABLE, STEP, list_places, name_of, step_of
from funmatch.training.run.state import FORMAT, NEWER, TrainState, read_state
from funmatch.training.run.tensor_files import STATE, Files, is_whole, load_tensors, write_place

KEPT = 2
STUDENT, OPTIMIZER = "student.safetensors", "optimizer.safetensors"
Modules = Mapping[str, nn.Module]
"""Modules by the file that holds them: the average of the weights, the memory of matched features."""
T = TypeVar("T")


def tensors_of(student: nn.Module, optimizer: torch.optim.Optimizer, others: Modules | None = None) -> Files:
    """Returns what a checkpoint saves of a student, its optimizer and further modules; the tensors, not copies."""
    files = {**student_tensors(student), OPTIMIZER: optimizer_state_dict(student, optimizer)}
    return files | {file: module.state_dict() for file, module in (others or {}).items()}


def student_tensors(student: nn.Module) -> Files:
    """Returns what is saved of a student alone; the tensors, not copies."""
    return {STUDENT: student.state_dict()}


def save(folder: Path, tensors: Files, state: TrainState) -> None:
    """Writes the checkpoint of a step and removes those that are no longer needed.

    Args:
        folder: `checkpoints` of the run.
        tensors: of `tensors_of`.
        state: the rest; its `best_step` says which best is kept.
    """
    # Before any is removed: a kill in between leaves one too many, never none.
    write_place(folder / name_of(STEP, state.step), tensors, asdict(state))
    _remove_old(folder, state.best_step)


def _remove_old(folder: Path, best_step: int | None) -> None:
    """Removes the checkpoints that are no longer needed."""
    for old in list_places(folder, STEP)[:-KEPT]:
        remove(old)
    # A run that is extended or falls back returns to an earlier checkpoint, whose best student must still be there.
    in_use = {best_step, *map(_best_step, _newest_first(folder))}
    for best in list_places(folder, BEST):
        if step_of(best) not in in_use:
            remove(best)


def keep_stable(folder: Path, step: int) -> None:
    """Keeps a copy of the checkpoint of a step for good, and removes the one kept before."""
    stable = folder / name_of(STABLE, step)
    # The new one first, so that the run can be extended at any moment.
    if not is_whole(stable):
        with write_folder_atomically(stable) as partial:
            shutil.copytree(folder / name_of(STEP, step), partial, dirs_exist_ok=True)
    for older in list_places(folder, STABLE):
        if older != stable:
            remove(older)


def go_back(folder: Path, step: int) -> None:
    """Removes the checkpoints of later steps; a run resumes from the newest of the others."""
    # A stable one stays, even if it is damaged: `keep_stable` replaces it.
    for path in (*list_places(folder, STEP), *list_places(folder, BEST)):
        if not 0 <= step_of(path) <= step:
            remove(path)


def can_go_back(folder: Path, step: int) -> bool:
    """Returns whether there is an undamaged checkpoint of a step."""
    return any(is_whole(folder / name_of(kind, step)) for kind in (STABLE, STEP))


def is_beyond(folder: Path, step: int) -> bool:
    """Returns whether there is a checkpoint of a later step."""
    return any(step_of(path) > step for path in list_places(folder, STEP))


def save_best(folder: Path, step: int, tensors: Files, metrics: dict[str, Any]) -> None:
    """Writes a student that scores better on validation than any before."""
    write_place(folder / name_of(BEST, step), tensors, {"step": step, **metrics})


def load_best(folder: Path, step: int, student: nn.Module) -> None:
    """Loads the student that `save_best` wrote at a step into the network.

    Raises:
        InputError: it is gone or damaged.
    """
    path = folder / name_of(BEST, step) / STUDENT
    try:
        verify_folder(path.parent)
        student.load_state_dict(load_tensors(path))
    except Exception as error:  # damaged files raise nearly anything, from safetensors to torch
        if is_out_of_memory(error):
            raise
        # An error, not the last weights instead: the result names the best step as the one it is of. At its next start
        # `restore` knows better.
        raise InputError(f"{path} is gone or damaged ({first_line(error)}); start the same command again") from None


def newest_student(folder: Path) -> tuple[dict[str, Tensor], int]:
    """Reads the student of the newest checkpoint that can be read, and changes nothing.

    Returns:
        its tensors by name, on the CPU, and their step.

    Raises:
        InputError: a newer version wrote one, or there is none that can be read.
    """
    found = _newest_first(folder)
    _check_formats(found)
    if newest := _first_undamaged(found, lambda place, state: (load_tensors(place / STUDENT), state.step)):
        return newest
    what = "no checkpoint in it can be read" if found else "it has no checkpoint yet"
    raise InputError(f"the run {folder.parent} is not finished, and {what}; start its command again to resume it")


def restore(
    folder: Path,
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    others: Modules | None = None,
    *,
    needs_best: bool = False,
) -> TrainState | None:
    """Loads the newest checkpoint into the student, its optimizer and further modules.

    Args:
        needs_best: whether the run will end with the student that scored best. Where that one is damaged and cannot be
            copied from the checkpoint of its step, an earlier checkpoint with an undamaged one is used, since the steps
            from there find it again; without any, the newest is, and the best of the steps after it is kept.

    Returns:
        the `state` that `save` got; None if there is no checkpoint.

    Raises:
        InputError: a newer version wrote one, or there are checkpoints, but none can be read. (A damaged newest one
            falls back to the one before.)
    """
    found = _newest_first(folder)
    _check_formats([*found, *list_places(folder, BEST)])  # before anything is removed
    remove_partials(folder)

    def read(checkpoint: Path, state: TrainState) -> TrainState:
        # Whatever a damaged one has loaded is replaced: the one before holds the same tensors.
        _load_into(checkpoint, student, optimizer, others)
        return state

    def read_with_best(checkpoint: Path, state: TrainState) -> TrainState:
        if state.best_step is not None:
            _check_best(folder, state.best_step)
        return read(checkpoint, state)

    state = _first_undamaged(found, read_with_best if needs_best else read)
    if state is None and needs_best:
        state = _forget_best(_first_undamaged(found, read))
    if state:
        go_back(folder, state.step)  # later steps will be taken again
        # What a kill after the last save has left: no other save may come to remove it.
        _remove_old(folder, state.best_step)
        return state
    if found:
        raise InputError(f"no checkpoint in {folder} can be read; begin again with another --out")
    return None


def _forget_best(state: TrainState | None) -> TrainState | None:
    """Returns the state of a run whose best student is lost, and says so."""
    if state is None:
        return None
    info(
        f"WARNING: no undamaged checkpoint has its best student, that of step {state.best_step:,}; the run resumes "
        f"from step {state.step:,}, and keeps the best of the steps after it, or the last"
    )
    return replace(state, best_step=None, best_score=TrainState.best_score, since_best=0)


def _check_best(folder: Path, step: int) -> None:
    """Raises an error if the best student, that of a step, is gone or damaged, and not to be had from elsewhere."""
    place, *others = (folder / name_of(kind, step) for kind in (BEST, STEP, STABLE))
    if _student_in(place):
        return
    # The checkpoint of the same step has the same student.
    for other in others:
        if tensors := _student_in(other):
            info(f"WARNING: {place} is gone or damaged; it is copied from {other}")
            write_place(place, {STUDENT: tensors}, {"step": step})
            return
    raise Damaged(f"{place} is gone or damaged")


def _student_in(place: Path) -> dict[str, Tensor] | None:
    """Returns the student of a checkpoint; None where it is gone or damaged."""
    try:
        verify_folder(place)
        return load_tensors(place / STUDENT)
    except Exception as error:  # damaged files raise nearly anything, from safetensors to torch
        if is_out_of_memory(error):
            raise
        return None


def load_before(
    folder: Path, step: int, student: nn.Module, optimizer: torch.optim.Optimizer, others: Modules | None = None
) -> TrainState | None:
    """Loads the newest checkpoint before a step as `restore` does, and changes nothing on the disk.

    Returns:
        its state; None if there is none that can be read.
    """
    found = [place for place in _newest_first(folder) if step_of(place) < step]
    _check_formats(found)

    def read(checkpoint: Path, state: TrainState) -> TrainState:
        _load_into(checkpoint, student, optimizer, others)
        return state

    return _first_undamaged(found, read)


def _newest_first(folder: Path) -> list[Path]:
    """Returns the checkpoints from which a run can resume."""
    return sorted([*list_places(folder, STEP), *list_places(folder, STABLE)], key=step_of, reverse=True)


def _check_formats(checkpoints: list[Path]) -> None:
    """Raises `NewerFormat` if a newer version wrote any of them."""
    for path in checkpoints:
        try:
            read_record(path / STATE, {}, FORMAT, NEWER)
        except (OSError, Damaged):
            continue  # its reader will notice


def _best_step(checkpoint: Path) -> int | None:
    """Returns the step of the best student when a checkpoint was written; None if it is damaged."""
    try:
        return read_state(checkpoint / STATE).best_step
    except (OSError, Damaged):
        return None


def _first_undamaged(places: list[Path], read: Callable[[Path, TrainState], T]) -> T | None:
    """Returns what `read` makes of the first checkpoint that is undamaged; None if none is. Each damaged one is said.

    Args:
        places: the checkpoints, newest first.
        read: reads one, given its state; whatever it raises means damage.
    """
    for place in places:
        try:
            verify_folder(place)
            state = read_state(place / STATE)
            # A copy under another name would resume from a step that its weights are not of.
            if state.step != step_of(place):
                raise Damaged(f"{STATE} says step {state.step}")
            return read(place, state)
        except Exception as error:  # damaged files raise nearly anything, from safetensors to the optimizer
            # Not damage: falling back would remove this checkpoint, which is undamaged.
            if is_out_of_memory(error):
                raise
            info(f"WARNING: {place} is damaged ({first_line(error)}); falling back to the checkpoint before it")
    return None


def _load_into(checkpoint: Path, student: nn.Module, optimizer: torch.optim.Optimizer, others: Modules | None) -> None:
    load_optimizer_state_(student, optimizer, load_tensors(checkpoint / OPTIMIZER))
    for file, module in {STUDENT: student, **(others or {})}.items():
        module.load_state_dict(load_tensors(checkpoint / file))
        # None such is saved. (An optimizer may rightly hold infinities, a large gradient squared.)
        if not all_finite(module.parameters()):
            raise Damaged(f"{file} has weights that are not finite")
