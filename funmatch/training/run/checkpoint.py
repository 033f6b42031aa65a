"""Writes, keeps and restores checkpoints: tensors in safetensors, the rest in JSON, each folder whole or absent.

`checkpoints/step-<n>/` holds the student, its optimizer, the average of its weights and `state.json`; the newest two
are kept. `checkpoints/best-<n>/` holds the student alone, where it scored best on validation. `checkpoints/stable-<n>/`
is that of a step before the learning rate cools down, from which a run can be extended.

`places.py` has these names; `state.py` defines what `state.json` holds. Each folder has a manifest of checksums, which
is verified before anything of it is used; checkpoints of earlier versions have none.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from funmatch.errors import InputError, first_line, is_out_of_memory
from funmatch.ops.optim.state import load_optimizer_state_, optimizer_state_dict
from funmatch.runtime.disk.checksums import verify_folder, write_manifest
from funmatch.runtime.disk.files import remove, remove_partials, write_folder_atomically
from funmatch.runtime.disk.json_files import FORMAT as FORMAT_KEY
from funmatch.runtime.disk.json_files import Damaged, read_record, seal
from funmatch.runtime.log import info
from funmatch.training.loop import all_finite
from funmatch.training.run.places import BEST, STABLE, STEP, list_places, name_of, step_of
from funmatch.training.run.state import FORMAT, NEWER, TrainState, read_state

KEPT = 2
STATE = "state.json"
STUDENT, OPTIMIZER, AVERAGE = "student.safetensors", "optimizer.safetensors", "average.safetensors"
Files = Mapping[str, Mapping[str, Tensor]]
"""Tensors by file and name."""
T = TypeVar("T")


def tensors_of(student: nn.Module, optimizer: torch.optim.Optimizer, average: nn.Module | None = None) -> Files:
    """Returns what a checkpoint saves of a student, its optimizer and its averaged weights; the tensors, not copies."""
    files = {**student_tensors(student), OPTIMIZER: optimizer_state_dict(student, optimizer)}
    return files if average is None else files | {AVERAGE: average.state_dict()}


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
    _write(folder / name_of(STEP, state.step), tensors, asdict(state))
    for old in list_places(folder, STEP)[:-KEPT]:
        remove(old)
    # A run that is extended or falls back returns to an earlier checkpoint, whose best student must still be there.
    in_use = {state.best_step, *map(_best_step, _newest_first(folder))}
    for best in list_places(folder, BEST):
        if step_of(best) not in in_use:
            remove(best)


def keep_stable(folder: Path, step: int) -> None:
    """Keeps a copy of the checkpoint of a step for good, and removes the one kept before."""
    stable = folder / name_of(STABLE, step)
    # The new one first, so that the run can be extended at any moment.
    if not _is_whole(stable):
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
    return any(_is_whole(folder / name_of(kind, step)) for kind in (STABLE, STEP))


def is_beyond(folder: Path, step: int) -> bool:
    """Returns whether there is a checkpoint of a later step."""
    return any(step_of(path) > step for path in list_places(folder, STEP))


def save_best(folder: Path, step: int, tensors: Files, metrics: dict[str, Any]) -> None:
    """Writes a student that scores better on validation than any before."""
    _write(folder / name_of(BEST, step), tensors, {"step": step, **metrics})


def load_best(folder: Path, step: int, student: nn.Module) -> None:
    """Loads the student that `save_best` wrote at a step into the network.

    Raises:
        InputError: it is gone or damaged.
    """
    path = folder / name_of(BEST, step) / STUDENT
    try:
        verify_folder(path.parent)
        student.load_state_dict(_load(path))
    except Exception as error:  # damaged files raise nearly anything, from safetensors to torch
        if is_out_of_memory(error):
            raise
        # An error, not the last weights instead: the result names the best step as the one it is of.
        raise InputError(
            f"{path} is gone or damaged ({first_line(error)}); pass --keep last with another --out"
        ) from None


def newest_student(folder: Path) -> tuple[dict[str, Tensor], int]:
    """Reads the student of the newest checkpoint that can be read, and changes nothing.

    Returns:
        its tensors by name, on the CPU, and their step.

    Raises:
        InputError: a newer version wrote one, or there is none that can be read.
    """
    found = _newest_first(folder)
    _check_formats(found)
    if newest := _first_undamaged(found, lambda place, state: (_load(place / STUDENT), state.step)):
        return newest
    what = "no checkpoint in it can be read" if found else "it has no checkpoint yet"
    raise InputError(f"the run {folder.parent} is not finished, and {what}; start its command again to resume it")


def restore(
    folder: Path,
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: nn.Module | None = None,
    *,
    needs_best: bool = False,
) -> TrainState | None:
    """Loads the newest checkpoint into the student, its optimizer and its averaged weights.

    Args:
        needs_best: whether the run will end with the student that scored best. A checkpoint whose best student is
            damaged then counts as damaged, since steps from the one before may find it again.

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
        if needs_best and state.best_step is not None:
            best = folder / name_of(BEST, state.best_step)
            verify_folder(best)
            # Earlier versions removed the best student of the checkpoint before; its steps may find a better one.
            if best.is_dir():
                _load(best / STUDENT)
        # Whatever a damaged one has loaded is replaced: the one before holds the same tensors.
        _load_into(checkpoint, student, optimizer, average)
        return state

    if state := _first_undamaged(found, read):
        go_back(folder, state.step)  # later steps will be taken again
        return state
    if found:
        raise InputError(f"no checkpoint in {folder} can be read; begin again with another --out")
    return None


def load_before(folder: Path, step: int, student: nn.Module, optimizer: torch.optim.Optimizer) -> TrainState | None:
    """Loads the newest checkpoint before a step into the student and its optimizer, and changes nothing on the disk.

    Returns:
        its state; None if there is none that can be read.
    """
    found = [place for place in _newest_first(folder) if step_of(place) < step]
    _check_formats(found)

    def read(checkpoint: Path, state: TrainState) -> TrainState:
        _load_into(checkpoint, student, optimizer, None)
        return state

    return _first_undamaged(found, read)


def _write(place: Path, tensors: Files, state: dict[str, Any]) -> None:
    with write_folder_atomically(place) as partial:
        for name, each in tensors.items():
            save_file(_dense(each), partial / name)
        (partial / STATE).write_text(json.dumps(seal({FORMAT_KEY: FORMAT, **state})))
        write_manifest(partial)


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


def _is_whole(place: Path) -> bool:
    """Returns whether there is a checkpoint whose files match their checksums."""
    try:
        verify_folder(place)
    except (OSError, Damaged):
        return False
    return place.is_dir()


def _load_into(
    checkpoint: Path, student: nn.Module, optimizer: torch.optim.Optimizer, average: nn.Module | None
) -> None:
    student.load_state_dict(_load(checkpoint / STUDENT))
    if average is not None:
        average.load_state_dict(_load(checkpoint / AVERAGE))
    load_optimizer_state_(student, optimizer, _load(checkpoint / OPTIMIZER))
    # None such is saved. (An optimizer may rightly hold infinities, a large gradient squared.)
    for name, net in ((STUDENT, student), (AVERAGE, average)):
        if net is not None and not all_finite(net.parameters()):
            raise Damaged(f"{name} has weights that are not finite")


def _load(path: Path) -> dict[str, Tensor]:
    """Reads a file of tensors; raises `Damaged` if one has a NaN, which no checkpoint is saved with."""
    tensors = load_file(path)
    # Checksums find this too, but checkpoints of earlier versions have none.
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.isnan().any():
            raise Damaged(f"{name} in {path.name} has a NaN")
    return tensors


def _dense(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns tensors as safetensors can write them: contiguous, and none sharing its memory with another."""
    dense, taken = {}, set()
    # Only tied weights are cloned: a copy of everything would double the memory that a checkpoint needs.
    for name, tensor in tensors.items():
        dense[name] = tensor.detach().contiguous()
        if tensor.data_ptr() in taken and dense[name].data_ptr() == tensor.data_ptr():
            dense[name] = dense[name].clone()
        taken.add(tensor.data_ptr())
    return dense
