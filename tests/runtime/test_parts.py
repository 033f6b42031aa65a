"""Arrays that are computed in parts: whatever a kill leaves is finished or removed by the next start."""

import os

import numpy as np
import pytest

from funmatch.runtime.disk import parts

SHAPE = (7, 3)


def rows(which: range) -> np.ndarray:
    return np.arange(21, dtype=np.float32).reshape(SHAPE)[which.start : which.stop]


class Killed(BaseException):
    """Stands for the end of the process: no `except Exception` sees it."""


def ended_at(monkeypatch, path, number: int) -> bool:
    """Ends a computation at its n-th call that changes the disk; returns whether it came so far."""
    calls = 0

    def counting(call):
        def counted(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls >= number:  # whatever `finally` would still do is not done either
                raise Killed
            return call(*arguments, **options)

        return counted

    with monkeypatch.context() as patch:
        for name in ("replace", "unlink", "rename", "fsync", "mkdir"):
            patch.setattr(os, name, counting(getattr(os, name)))
        try:
            parts.compute_in_parts(path, SHAPE, 3, rows, "rows", {})
        except Killed:
            return True
    return False


def test_an_array_that_a_kill_interrupted_anywhere_is_finished_and_nothing_is_left_over(tmp_path, monkeypatch):
    ends = 0
    while True:
        path = tmp_path / str(ends) / "rows.npy"
        ended = ended_at(monkeypatch, path, ends + 1)
        found = parts.read_whole(path, SHAPE)
        if found is None:
            found = parts.compute_in_parts(path, SHAPE, 3, rows, "rows", {})
        assert np.array_equal(found, rows(range(7)))
        left = {each.name for each in path.parent.iterdir() if not each.name.endswith(".lock")}
        assert left == {"rows.npy", "rows.crc32", "about.json"}, ends
        if not ended:
            break
        ends += 1
    assert ends > 20


@pytest.mark.parametrize("damage", ["npy", "crc32"])
def test_a_damaged_array_is_computed_again(tmp_path, damage):
    path = tmp_path / "rows.npy"
    parts.compute_in_parts(path, SHAPE, 3, rows, "rows", {})
    file = path.with_suffix(f".{damage}")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert parts.read_whole(path, SHAPE) is None
    assert np.array_equal(parts.compute_in_parts(path, SHAPE, 3, rows, "rows", {}), rows(range(7)))
