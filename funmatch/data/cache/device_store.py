"""Keeps decoded images in a device's memory, where the crops of a batch are cut all at once."""

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

from funmatch.config.choices import Resample
from funmatch.data.cache.open_cache import Cache
from funmatch.data.cache.stores import CachedSplit, Resident, Row
from funmatch.data.decode import Box
from funmatch.errors import first_line, is_out_of_memory
from funmatch.ops import grids, resample
from funmatch.runtime.log import info

CHUNK = 64 << 20  # bytes copied at once
CLOSE = 1 / 255  # one step of an 8-bit pixel

# Weak: the memory is free once no split uses the store any more.
_STORES: WeakValueDictionary = WeakValueDictionary()
_LOCK = Lock()

CropKernel = Callable[[Tensor, grids.SamplingGrid, int, Resample], Tensor]
"""Signature of `resample.sample_by_torch`."""


class DeviceStore:
    """Images of a split in one block of a device's memory.

    Attributes:
        flat: the images one after another, uint8.
        cut, note: result of `fastest_crop_kernel`.
        host: the same images in the mapped file, for access to single ones.
    """

    decodes: ClassVar[bool] = False

    def __init__(self, split: CachedSplit, device: torch.device) -> None:
        """Copies a split's images, each once, even where the split repeats it."""
        assert isinstance(split.store, Resident)
        self.host = split.store
        # The offset in the mapped file identifies an image: a subset may hold the same one many times.
        self.offsets, first = np.unique(split.index["offset"], return_index=True)
        # Their sum goes beyond 32 bits.
        lengths = split.index["length"][first].astype(np.int64)
        ends = np.cumsum(lengths)
        self.starts = ends - lengths
        self.flat = torch.empty(int(lengths.sum()), dtype=torch.uint8, device=device)
        # In chunks: one copy of everything would need the whole data set in the host's memory first.
        chunks = np.searchsorted(self.starts, np.arange(0, len(self.flat), CHUNK))
        for begin, end in zip(chunks, [*chunks[1:], len(lengths)], strict=True):
            chosen = split.index[first[begin:end]]
            if rows := chosen.tolist():
                self.host.verify(chosen)
                images = torch.cat([self.host.image(row).reshape(-1) for row in rows])
                self.flat[int(self.starts[begin]) : int(ends[end - 1])].copy_(images)
        self.cut, self.note = fastest_crop_kernel(self.flat)

    def verify(self, rows: np.ndarray) -> None:
        """Does nothing: all images were verified when they were copied."""

    def image(self, row: Row, box: Box | None = None) -> Tensor:
        return self.host.image(row, box)

    def crops(
        self,
        rows: np.ndarray,
        boxes: np.ndarray,
        flips: np.ndarray,
        sides: tuple[int, ...],
        *,
        alone: bool,
        method: Resample,
    ) -> list[Tensor]:
        """Cuts crops of images on the device, (n, 3, side, side) at each of several sides.

        Args:
            rows: of `INDEX`, (n,).
            boxes, flips: see `ops.crops`.
            sides: of the crops, pixels.
            alone: whether boxes are cut before they are resized, rather than after.
            method: how images are resized.
        """
        grid_of = grids.crop_then_resize if alone else grids.resize_then_crop
        places = self._places(rows)
        return [self._sample(grid_of(*places, boxes, side).flipped(flips, side), side, method) for side in sides]

    def central(self, rows: np.ndarray, short_side: int, side: int, *, method: Resample, **how: bool) -> Tensor:
        """Cuts evaluation views on the device, (n, 3, side, side); `how` as of `ops.grids.central_boxes`."""
        grid = grids.central_grid(*self._places(rows), short_side, side, method=method, **how)
        return self._sample(grid, side, method)

    def _places(self, rows: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
        # np.unique has sorted the offsets.
        starts = self.starts[np.searchsorted(self.offsets, rows["offset"])]
        return starts, (rows["height"], rows["width"])

    def _sample(self, grid: grids.SamplingGrid, side: int, method: Resample) -> Tensor:
        with _current_device(self.flat.device):
            return self.cut(self.flat, grid, side, method)


def _current_device(device: torch.device) -> AbstractContextManager:
    """Makes a device the current one of this thread."""
    # Triton launches kernels on the current device, and every new thread starts with the machine's first one.
    return nullcontext() if device.index is None else torch.accelerator.device_index(device.index)


def move_to_device(split: CachedSplit, device: torch.device) -> tuple[CachedSplit, str]:
    """Returns a split with its pixels on a device, and a warning for the user or "".

    The pixels are shared with other splits of the same images on that device.
    """
    assert isinstance(split.store, Resident)
    key = str(split.store.path), str(device), hashlib.blake2b(split.index["offset"].tobytes()).digest()
    with _LOCK:
        # Under the lock, or two threads would copy the same images into the device's memory twice.
        store = _STORES.get(key) or DeviceStore(split, device)
        _STORES[key] = store
    return replace(split, store=store), store.note


def device_bytes(split: CachedSplit) -> int:
    """Returns the bytes that a split takes on a device."""
    _, first = np.unique(split.index["offset"], return_index=True)
    return int(split.index["length"][first].astype(np.int64).sum())


def fastest_crop_kernel(flat: Tensor) -> tuple[CropKernel, str]:
    """Chooses how crops are cut out of a device's memory: by our Triton kernel where it works, else by indexing.

    Returns:
        the function, and a warning where the kernel does not work; "" where it does, and on the CPU, which has none.
    """
    if flat.device.type == "cpu":
        return resample.sample_by_torch, ""
    # A kernel can compile and still compute nonsense on a new device, so its result is compared on a tiny image.
    grid = grids.crop_then_resize(np.zeros(1, np.int64), (np.array([2]), np.array([3])), np.array([[0, 1, 2, 2]]), 5)
    probe = torch.arange(0, 180, 10, dtype=torch.uint8, device=flat.device)
    try:
        from funmatch.ops.native.triton_crops import sample

        cases = [(probe, grid, 5, method) for method in resample.FILTERS]
        if all((sample(*case) - resample.sample_by_torch(*case)).abs().max() < CLOSE for case in cases):
            return sample, ""
        why = "its results differ"
    except Exception as error:  # compilers fail in as many ways as machines can be set up
        why = first_line(error)
    return (
        resample.sample_by_torch,
        f"the kernel that cuts crops does not work on this device ({why}); falling back to slower indexing",
    )


def move_data_to_device(cache: Cache, device: torch.device, gigabytes: float) -> Cache:
    """Moves the pixels of the training and validation splits to the device, as far as they are resident and fit.

    Args:
        gigabytes: device memory that they may take, in 10⁹ bytes.

    Returns:
        the cache with these splits replaced.
    """
    left, splits = int(gigabytes * 1e9), dict(cache.splits)
    # Training first: every step reads it, validation only now and then.
    for name in ("train", "val"):
        split = splits.get(name)
        # A store that decodes holds files, not pixels.
        if split is None or split.store.decodes or not left:
            continue
        size = device_bytes(split)
        if size > left:
            info(f"{name}: {size / 1e9:.1f} GB of pixels stay on the host; --device-gb allows {gigabytes:g}")
            continue
        try:
            # May fail although it should fit: other processes hold memory, and allocators fragment.
            splits[name], note = move_to_device(split, device)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            info(f"WARNING: {device} has no room for {size / 1e9:.1f} GB of {name} pixels; they stay on the host")
            continue
        # Only after the move, so that a split that did not fit leaves its share to the next.
        left -= size
        if note:
            info(f"WARNING: {note}")
        info(f"{name}: {size / 1e9:.2f} GB of pixels moved to {device}, which crops the views itself")
    return replace(cache, splits=splits)
