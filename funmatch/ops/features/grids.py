"""Resamples maps of features to a common grid by the mean over areas."""

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache
def area_weights(source: int, target: int) -> Tensor:
    """Returns the matrix (target, source) by which each target cell is the mean of the source cells that it covers.

    A source cell that a target cell covers in part counts with that part; a finer target repeats the cells.
    """
    starts = torch.arange(source, dtype=torch.float64)
    edges = torch.arange(target + 1, dtype=torch.float64) * source / target
    low = torch.maximum(edges[:-1, None], starts)
    high = torch.minimum(edges[1:, None], starts + 1)
    return ((high - low).clamp(min=0) * target / source).float()


def to_grid(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resamples maps (n, height, width, d) to (n, rows, columns, d) in float32, by the mean over areas.

    Args:
        grid: rows and columns.
    """
    maps = maps.float()
    if tuple(maps.shape[1:3]) == grid:
        return maps
    # Products with fixed matrices: PyTorch's adaptive pooling has no deterministic gradient on accelerators.
    rows, columns = (
        area_weights(size, wanted).to(maps.device) for size, wanted in zip(maps.shape[1:3], grid, strict=True)
    )
    with torch.autocast(maps.device.type, enabled=False):
        return torch.einsum("rh,nhwd,cw->nrcd", rows, maps, columns)
