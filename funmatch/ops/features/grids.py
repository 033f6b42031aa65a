"""Resamples maps of features to a common grid by the mean over areas."""

import torch
from torch import Tensor


def area_weights(source: int, target: int) -> list[list[float]]:
    """Returns the matrix (target, source) by which each target cell is the mean of the source cells that it covers.

    A source cell that a target cell covers in part counts with that part; a finer target repeats the cells.
    """
    # In units of 1 / target of a source cell, in which all bounds are whole numbers.
    covered = [
        [
            max(0, min((row + 1) * source, (cell + 1) * target) - max(row * source, cell * target))
            for cell in range(source)
        ]
        for row in range(target)
    ]
    return [[part / source for part in row] for row in covered]


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
        torch.tensor(area_weights(size, wanted), device=maps.device)
        for size, wanted in zip(maps.shape[1:3], grid, strict=True)
    )
    with torch.autocast(maps.device.type, enabled=False):
        return torch.einsum("rh,nhwd,cw->nrcd", rows, maps, columns)
