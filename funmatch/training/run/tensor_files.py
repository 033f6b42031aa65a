"""Writes and reads folders of a checkpoint: tensors in safetensors, the rest in `state.json`, and their checksums."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from funmatch.runtime.disk.checksums import verify_folder, write_manifest
from funmatch.runtime.disk.files import write_folder_atomically
from funmatch.runtime.disk.json_files import FORMAT as FORMAT_KEY
from funmatch.runtime.disk.json_files import Damaged, seal
from funmatch.training.run.state import FORMAT

STATE = "state.json"
Files = Mapping[str, Mapping[str, Tensor]]
"""Tensors by file and name."""


def write_place(place: Path, tensors: Files, state: Mapping[str, Any]) -> None:
    """Writes a folder of a checkpoint, whole or not at all; `state` is what its `state.json` holds."""
    with write_folder_atomically(place) as partial:
        for name, each in tensors.items():
            save_file(_dense(each), partial / name)
        (partial / STATE).write_text(json.dumps(seal({FORMAT_KEY: FORMAT, **state})))
        write_manifest(partial)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Reads a file of tensors; raises `Damaged` if one has a NaN, which no checkpoint is saved with."""
    tensors = load_file(path)
    # Checksums find this too, but checkpoints of earlier versions have none.
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.isnan().any():
            raise Damaged(f"{name} in {path.name} has a NaN")
    return tensors


def is_whole(place: Path) -> bool:
    """Returns whether there is a checkpoint whose files match their checksums."""
    try:
        verify_folder(place)
    except (OSError, Damaged):
        return False
    return place.is_dir()


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
