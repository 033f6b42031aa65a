"""Checkpoints: tensors in safetensors, the rest in JSON, each written whole or not at all.

`checkpoints/step-<n>/` holds the student, its optimizer and `state.json`; the newest two are kept.
`checkpoints/best-<n>/` holds the student alone, where validation liked it most. `checkpoints/stable-<n>/` is that of
a step before the learning rate cools down, from which a run can be prolonged.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from funmatch.errors import InputError, first_line
from funmatch.ops.optim.state import load_optimizer_state_, optimizer_state_dict
from funmatch.runtime.files import write_folder_atomically
from funmatch.runtime.log import info

KEPT = 2
STUDENT, OPTIMIZER, AVERAGE = "student.safetensors", "optimizer.safetensors", "average.safetensors"

Files = Mapping[str, Mapping[str, Tensor]]
"""Tensors by the file that they lie in."""


def tensors_of(student: nn.Module, optimizer: torch.optim.Optimizer, average: nn.Module | None = None) -> Files:
    """What is saved of a student, of its optimizer, and of the average of its weights: as they are, not copied."""
    files = {STUDENT: student.state_dict(), OPTIMIZER: optimizer_state_dict(student, optimizer)}
    return files if average is None else files | {AVERAGE: average.state_dict()}


def save(
    folder: Path,
    step: int,
    tensors: Files,
    state: dict[str, Any],
) -> None:
    """Writes the checkpoint of a step and removes those that are no longer needed.

    Args:
        folder: `checkpoints` of the run.
        step: updates done.
        tensors: of `tensors_of`.
        state: the rest, JSON; its `best_step` says which best is kept.
    """
    with write_folder_atomically(folder / f"step-{step:09}") as partial:
        for name, each in tensors.items():
            save_file(_dense(each), partial / name)
        (partial / "state.json").write_text(json.dumps({**state, "step": step}))
    for old in sorted(folder.glob("step-*"))[:-KEPT]:
        shutil.rmtree(old)
    wanted = {state.get("best_step"), *(_state(stable).get("best_step") for stable in folder.glob("stable-*"))}
    for best in folder.glob("best-*"):
        if step_of(best) not in wanted:
            shutil.rmtree(best)


def keep_stable(folder: Path, step: int) -> None:
    """Keeps the checkpoint of a step for good, in the place of any that was kept before."""
    kept = folder / f"stable-{step:09}"
    if not kept.is_dir():
        with write_folder_atomically(kept) as partial:
            shutil.copytree(folder / f"step-{step:09}", partial, dirs_exist_ok=True)
    for older in folder.glob("stable-*"):
        if older != kept:
            shutil.rmtree(older)


def go_back(folder: Path, step: int) -> None:
    """Removes the checkpoints of later steps; the newest of the others is where a run goes on."""
    for path in [*folder.glob("step-*"), *folder.glob("best-*")]:
        if not 0 <= step_of(path) <= step:
            shutil.rmtree(path)


def step_of(path: Path) -> int:
    """The step of a checkpoint's folder; -1 where it has the name of none."""
    number = path.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _state(path: Path) -> dict[str, Any]:
    """The rest of a checkpoint, nothing where it is damaged."""
    try:
        return json.loads((path / "state.json").read_text())
    except (OSError, ValueError):
        return {}


def save_best(folder: Path, step: int, tensors: Files, figures: dict[str, Any]) -> None:
    """Keeps a student that validation likes better than any before."""
    with write_folder_atomically(folder / f"best-{step:09}") as partial:
        for name, each in tensors.items():
            save_file(_dense(each), partial / name)
        (partial / "state.json").write_text(json.dumps({"step": step, **figures}))


def load_best(folder: Path, step: int, student: nn.Module) -> None:
    """Puts the student that `save_best` kept at a step into the network.

    Raises:
        InputError: it is gone or damaged.
    """
    path = folder / f"best-{step:09}" / STUDENT
    try:
        student.load_state_dict(load_file(path))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"{path} is gone or damaged ({first_line(error)}); say --keep last with another --out"
        ) from None


def restore(
    folder: Path, student: nn.Module, optimizer: torch.optim.Optimizer, average: nn.Module | None = None
) -> dict[str, Any] | None:
    """Puts the newest checkpoint into the student, its optimizer and the average of its weights.

    Returns:
        what was given to `save` as `state`, with `step`; None where there is no checkpoint.

    Raises:
        InputError: there are checkpoints, but none can be read. (A damaged newest one falls back to the one before.)
    """
    for partial in folder.glob(".*.partial"):
        shutil.rmtree(partial)
    found = sorted([*folder.glob("step-*"), *folder.glob("stable-*")], key=step_of, reverse=True)
    for checkpoint in found:
        try:
            return _restore(checkpoint, student, optimizer, average)
        except (OSError, ValueError, LookupError, RuntimeError, SafetensorError) as error:
            info(f"{checkpoint} is damaged ({first_line(error)})")
    if found:
        raise InputError(f"no checkpoint in {folder} can be read; start again with another --out")
    return None


def _restore(
    newest: Path, student: nn.Module, optimizer: torch.optim.Optimizer, average: nn.Module | None
) -> dict[str, Any]:
    state = json.loads((newest / "state.json").read_text())
    student.load_state_dict(load_file(newest / STUDENT))
    if average is not None:
        average.load_state_dict(load_file(newest / AVERAGE))
    load_optimizer_state_(student, optimizer, load_file(newest / OPTIMIZER))
    go_back(newest.parent, state["step"])  # what is later will be walked again
    return state


def _dense(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as they can be written: in one piece, and none sharing its memory with another."""
    dense, seen = {}, set()
    for name, tensor in tensors.items():
        dense[name] = tensor.detach().contiguous()
        if tensor.data_ptr() in seen and dense[name].data_ptr() == tensor.data_ptr():
            dense[name] = dense[name].clone()
        seen.add(tensor.data_ptr())
    return dense
