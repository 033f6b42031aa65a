"""Warns of images of more than 8 bits whose values use a small part of their range, or go beyond it."""

from contextlib import suppress

import numpy as np

from funmatch.data.cache.scan import Scan
from funmatch.data.dataset import Dataset
from funmatch.data.decode import KINDS, value_range

LOOKED_AT = 200  # images of each kind; a camera's bit depth shows in a few
SMALL = 1 / 4  # of the range: 14 bits in 16


def depth_notes(dataset: Dataset, scanned: Scan) -> list[str]:
    """Returns warnings about the values of 16-bit, 32-bit and floating-point images."""
    floating = _ranges(dataset, scanned, "floating-point")
    return [
        f"WARNING: {dataset.name}: {problem}"
        for problem in (*_of_integers(_ranges(dataset, scanned, "16-bit")), *_of_floats(floating))
    ]


def _ranges(dataset: Dataset, scanned: Scan, kind: str) -> np.ndarray:
    """Returns the smallest and the largest value of some images of a kind, (n, 2)."""
    such = np.flatnonzero((scanned.rows["kinds"] >> KINDS.index(kind) & 1).astype(bool) & ~scanned.rows["bad"])
    # Spread over the whole: the first images may all be of one series.
    some = such[np.linspace(0, len(such) - 1, min(len(such), LOOKED_AT)).astype(int)] if len(such) else such
    jobs, ranges = dataset.jobs() if len(some) else [], []
    for i in some:
        # Images that cannot be decoded have been reported already.
        with suppress(Exception):
            ranges.append(value_range(dataset.read(*jobs[i])))
    return np.array(ranges, np.float64).reshape(-1, 2)


def _of_integers(ranges: np.ndarray) -> list[str]:
    if not len(ranges):
        return []
    low, high = ranges[:, 0].min(), ranges[:, 1].max()
    problems = []
    if high < 65536 * SMALL:
        problems.append(
            f"16-bit images use little of their range: the largest value seen is {high:,.0f} of 65,535, so pixels "
            f"are read as 0 … {high // 257:.0f} of 255; scale them to the full range first"
        )
    if high > 65535:
        problems.append(
            f"32-bit images have values up to {high:,.0f}, and all above 65,535 are white; scale them first"
        )
    return problems + _negative(low)


def _of_floats(ranges: np.ndarray) -> list[str]:
    if not len(ranges):
        return []
    low, high = ranges[:, 0].min(), ranges[:, 1].max()
    problems = []
    if high > 255:
        problems.append(
            f"floating-point images have values up to {high:,.6g}, and all above 255 are white; scale them first"
        )
    elif 1 < high < 255 * SMALL:
        problems.append(
            f"floating-point images with values above 1 are read as 0 … 255, but the largest value seen is {high:.6g}; "
            "scale them first"
        )
    elif high > 1 and (ranges[:, 1] <= 1).any():
        problems.append("some floating-point images have values up to 1, others up to 255; bring them to one scale")
    return problems + _negative(low)


def _negative(low: float) -> list[str]:
    return [f"values below 0 are black, and the smallest value seen is {low:,.6g}; shift them first"] if low < 0 else []
