"""Computes an array a part at a time, and keeps it in a file with its checksum.

Processes that need the same array share the work, a part of its rows at a time; a killed process leaves its finished
parts to the others.
"""

import json
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from funmatch.errors import InputError
from funmatch.runtime.disk.checksums import crc_of_file
from funmatch.runtime.disk.files import array_bytes, read_array, write_atomically
from funmatch.runtime.disk.locks import try_lock_file
from funmatch.runtime.log import ProgressBar, info

SUM = ".crc32"
"""Ending of the file beside an array that holds its checksum."""


def read_checked(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """Reads an array of float32; returns None where it is missing, or damaged, and then removes it."""
    try:
        array = read_array(path, "c")
        sum_file = path.with_suffix(SUM)
        # Arrays of an earlier version have no checksum, and are believed.
        intact = not sum_file.exists() or sum_file.read_bytes() == f"{crc_of_file(path):08x}".encode()
        if intact and array.shape == shape and array.dtype == np.float32:
            return array
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        pass
    info(f"{path} is damaged; computing it again")
    # Removed, so that other processes compute it again instead of waiting for it.
    path.unlink(missing_ok=True)
    path.with_suffix(SUM).unlink(missing_ok=True)
    return None


def read_whole(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """Reads an array that `compute_in_parts` kept; returns None where it is missing or damaged."""
    array = read_checked(path, shape)
    if array is not None:
        _remove_parts(path.parent)  # a process that was killed after joining them has left some
    return array


def compute_in_parts(
    path: Path,
    shape: tuple[int, ...],
    size: int,
    compute: Callable[[range], np.ndarray],
    label: str,
    about: Mapping[str, Any],
) -> np.ndarray:
    """Computes an array that `read_whole` did not find, and keeps it; returns it.

    Args:
        path: of the array.
        shape: of the array.
        size: rows of a part.
        compute: returns some of the rows, float32; what it raises leaves the finished parts where they are.
        label: name of the work, beside the progress bar.
        about: what it is of, JSON values; written to `about.json` beside it.

    Raises:
        InputError: what was just written cannot be read.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # For people only: the path alone decides which array is used.
    path.with_name("about.json").write_text(json.dumps(about, indent=1))
    _compute_parts(path, shape, size, compute, label)
    found = read_checked(path, shape)
    if found is None:
        raise InputError(f"{path} was damaged while it was read; run the same command again")
    return found


def _compute_parts(
    path: Path, shape: tuple[int, ...], size: int, compute: Callable[[range], np.ndarray], label: str
) -> None:
    """Computes the parts that no other process is computing until all are there, then joins them."""
    folder, count = path.parent, shape[0]
    parts = {folder / f"part-{start:09}.npy": range(start, min(start + size, count)) for start in range(0, count, size)}
    with ProgressBar(label, count) as bar:
        # Its appearance ends the loop of every process, also of those that computed nothing.
        while not path.is_file():
            missing = {part: rows for part, rows in parts.items() if not part.is_file()}
            bar.update(count - sum(map(len, missing.values())))
            if not missing:
                _join(path, parts, shape)
                continue
            claimed = next(
                ((part, lock) for part in missing if (lock := try_lock_file(part.with_suffix(".lock")))), None
            )
            if claimed is None:
                time.sleep(0.2)  # all that is missing is being computed by other processes
                continue
            part, lock = claimed
            with lock:
                # Between the listing and the lock, another process may have finished the part, or joined them all.
                if not part.is_file() and not path.is_file():
                    write_checked(part, compute(parts[part]))
    _remove_parts(folder)


def _remove_parts(folder: Path) -> None:
    """Removes the parts of an array that is whole, also those of earlier, killed processes, and their locks."""
    for leftover in folder.glob("part-*"):
        leftover.unlink(missing_ok=True)


def write_checked(path: Path, array: np.ndarray) -> None:
    """Writes an array and its checksum."""
    content = array_bytes(array)
    # The checksum first: the array's appearance tells other processes that both are there.
    write_atomically(path.with_suffix(SUM), f"{zlib.crc32(content):08x}")
    write_atomically(path, content)


def _join(whole: Path, parts: dict[Path, range], shape: tuple[int, ...]) -> None:
    """Joins the parts, unless another process has done so meanwhile."""
    # A lock, since two processes that join at once would both read parts that the first then removes.
    lock = try_lock_file(whole.with_suffix(".lock"))
    if lock is None:
        time.sleep(0.2)
        return
    with lock:
        if whole.is_file():
            return
        arrays = [read_checked(path, (len(rows), *shape[1:])) for path, rows in parts.items()]
        undamaged = [array for array in arrays if array is not None]
        # Otherwise a part was damaged, or removed by a faster process: the caller tries again.
        if len(undamaged) == len(parts):
            write_checked(whole, np.concatenate(undamaged))
