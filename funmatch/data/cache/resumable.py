"""Keeps results of images in files as they come, so that interrupted work resumes; finds damage in complete files."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from funmatch.data.dataset import Track
from funmatch.runtime.disk.checksums import crc_of_file
from funmatch.runtime.disk.files import write_atomically
from funmatch.runtime.disk.json_files import Damaged, parse_json, read_json, seal, unseal

CHUNK = 256  # images between two writes: what an interruption loses at most


def recover_rows(path: Path, dtype: np.dtype) -> np.ndarray:
    """Reads the complete rows of a file, and truncates the part of a row that a killed process left."""
    if not path.exists():
        return np.zeros(0, dtype)
    whole = path.stat().st_size // dtype.itemsize
    os.truncate(path, whole * dtype.itemsize)
    return np.fromfile(path, dtype)


def keep_reasons(path: Path, done: int) -> dict[int, str]:
    """Reads the reasons for the first `done` images, and removes what a killed process left of others."""
    valid: dict[int, str] = {}
    if path.exists():
        for line in path.read_text(errors="replace").split("\n"):
            try:
                i, reason = parse_json(line, (int, str))
            except ValueError:
                continue
            if 0 <= i < done:
                valid[i] = reason
    write_atomically(path, "".join(json.dumps(each) + "\n" for each in valid.items()))
    return valid


def chunks(jobs: list, function: Callable, track: Track, done: int, what: str) -> Iterator[list]:
    """Maps a function over jobs in threads, and yields the results in order, a chunk at a time.

    Args:
        jobs: arguments, one each.
        function: of one argument.
        track: shows progress.
        done: jobs that were finished before, where the progress bar starts.
        what: description of the work.
    """
    total = done + len(jobs)
    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:

        def one_by_one():
            yield from (None for _ in range(done))  # the bar starts where the work was left
            # Chunks, because Executor.map submits all jobs at once, and their results would pile up in memory.
            for start in range(0, len(jobs), CHUNK):
                yield from pool.map(function, jobs[start : start + CHUNK])

        chunk: list = []
        for i, result in enumerate(track(one_by_one(), total, what), 1):
            if i > done:
                chunk.append(result)
            if chunk and (len(chunk) == CHUNK or i == total):
                yield chunk
                chunk = []


def write_check(files: Sequence[Path], check: Path) -> None:
    """Writes the CRC-32 of complete files into a file of its own."""
    write_atomically(check, json.dumps(seal({path.name: crc_of_file(path) for path in files})))


def are_intact(files: Sequence[Path], check: Path) -> bool:
    """Returns whether files match the checksums that `write_check` wrote; without any, as of earlier versions, they do.

    Raises:
        OSError: a file cannot be read.
    """
    try:
        written = unseal(read_json(check, dict[str, int | str]), check)
        return written == {path.name: crc_of_file(path) for path in files}
    except FileNotFoundError:
        return not check.exists()
    except Damaged:
        return False
