"""Decoded images kept on the device, where the crops of a batch are cut all at once."""

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from threading import Lock
from typing import ClassVar
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from funmatch.data.cache.stores import CachedSplit, Resident, Row
from funmatch.data.decode import Box
from funmatch.errors import first_line
from funmatch.ops import resample

CHUNK = 64 << 20  # bytes that are copied at once
CLOSE = 1 / 255

_ABOARD: WeakValueDictionary = WeakValueDictionary()
_TAKING = Lock()

Cut = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""As `resample.gathered`."""


class DeviceStore:
    """The images of a split in one piece of a device's memory.

    Attributes:
        flat: the images one after another, uint8.
        cut, note: of `fastest_cut`.
        host: the same in the mapped file, for whoever wants to look at one.
    """

    decodes: ClassVar[bool] = False

    def __init__(self, split: CachedSplit, device: torch.device) -> None:
        """Copies a split's images; each once, however often the split has it."""
        assert isinstance(split.store, Resident)
        self.host = split.store
        self.offsets, first = np.unique(split.index["offset"], return_index=True)
        lengths = split.index["length"][first].astype(np.int64)
        ends = np.cumsum(lengths)
        self.starts = ends - lengths
        self.flat = torch.empty(int(lengths.sum()), dtype=torch.uint8, device=device)
        pieces = np.searchsorted(self.starts, np.arange(0, len(self.flat), CHUNK))
        for begin, end in zip(pieces, [*pieces[1:], len(lengths)], strict=True):
            rows = split.index[first[begin:end]].tolist()
            if rows:
                taken = torch.cat([self.host.image(row).reshape(-1) for row in rows])
                self.flat[int(self.starts[begin]) : int(ends[end - 1])].copy_(taken)
        self.cut, self.note = fastest_crop_kernel(self.flat)

    def image(self, row: Row, box: Box | None = None) -> Tensor:
        return self.host.image(row, box)

    def crops(
        self, rows: np.ndarray, boxes: np.ndarray, flips: np.ndarray, sides: tuple[int, ...], *, alone: bool
    ) -> list[Tensor]:
        """Crops of images, (n, 3, side, side) at each of several sides, on the device.

        Args:
            rows: of `INDEX`.
            boxes, flips: as `augment` takes them.
            alone: whether boxes are cut before they are resized.
        """
        cut = resample.crop_then_resize if alone else resample.resize_then_crop
        return [self._seen(cut(*self._places(rows), boxes, side).flipped(flips, side), side) for side in sides]

    def central(self, rows: np.ndarray, short_side: int, side: int, *, squash: bool) -> Tensor:
        """Evaluation views, (n, 3, side, side), on the device."""
        return self._seen(resample.central_grid(*self._places(rows), short_side, side, squash=squash), side)

    def _places(self, rows: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
        starts = self.starts[np.searchsorted(self.offsets, rows["offset"])]
        return starts, (rows["height"], rows["width"])

    def _seen(self, looks: resample.SamplingGrid, side: int) -> Tensor:
        with _current(self.flat.device):
            corners, axes = _moved(looks, self.flat.device)
            return self.cut(self.flat, corners, axes, side)


def _current(device: torch.device) -> AbstractContextManager:
    """Makes a device the current one of this thread: kernels go there, and a thread knows only the machine's first."""
    return nullcontext() if device.index is None else torch.accelerator.device_index(device.index)


def _moved(looks: resample.SamplingGrid, device: torch.device) -> tuple[Tensor, Tensor]:
    """The numbers of looks on a device, which is not waited for."""
    corners, axes = torch.from_numpy(looks.corners), torch.from_numpy(looks.axes).float()
    if device.type == "cpu":
        return corners, axes
    return corners.pin_memory().to(device, non_blocking=True), axes.pin_memory().to(device, non_blocking=True)


def move_to_device(split: CachedSplit, device: torch.device) -> tuple[CachedSplit, str]:
    """A split with its pixels on a device, shared with whoever has them there already; and what is to be said of it."""
    assert isinstance(split.store, Resident)
    name = str(split.store.path), str(device), hashlib.blake2b(split.index["offset"].tobytes()).digest()
    with _TAKING:
        store = _ABOARD.get(name) or DeviceStore(split, device)
        _ABOARD[name] = store
    return replace(split, store=store), store.note


def device_bytes(split: CachedSplit) -> int:
    """Bytes that a split takes on a device."""
    _, first = np.unique(split.index["offset"], return_index=True)
    return int(split.index["length"][first].astype(np.int64).sum())


def fastest_crop_kernel(flat: Tensor) -> tuple[Cut, str]:
    """How crops are cut out of this memory: by a kernel where one can be made that does it right, else by indexing.

    Returns:
        and why not by a kernel; empty where it is, and on the CPU, which has none.
    """
    if flat.device.type == "cpu":
        return resample.sample_by_gather, ""
    looks = resample.crop_then_resize(
        np.zeros(1, np.int64), (np.array([2]), np.array([3])), np.array([[0, 1, 2, 2]]), 5
    )
    some = torch.arange(0, 180, 10, dtype=torch.uint8, device=flat.device)
    corners, axes = _moved(looks, flat.device)
    try:
        from funmatch.ops.native.triton_crops import sample

        if (sample(some, corners, axes, 5) - resample.sample_by_gather(some, corners, axes, 5)).abs().max() < CLOSE:
            return sample, ""
        why = "it computes something else"
    except Exception as error:  # compilers fail in as many ways as machines can be set up
        why = first_line(error)
    return (
        resample.sample_by_gather,
        f"the kernel that cuts crops does not work here ({why}); they are cut by indexing, slower",
    )
