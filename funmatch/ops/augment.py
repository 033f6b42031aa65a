"""Applies an augmentation of the user to the crops of a batch, as a pure function of (seed, step)."""

import torch
from torch import Tensor

from funmatch.errors import InputError
from funmatch.ops.sampling import AUGMENT_STREAM, step_generator
from funmatch.runtime.functions import find_function


def augment_crops(name: str, crops: Tensor, seed: int, step: int, *, teachers_own: bool = False) -> Tensor:
    """Augments the crops of a *global* batch, which is the same on every process.

    Args:
        name: of the function: (crops, generator) to crops of the same shape.
        crops: (1 + n, 3, side, side) in [0, 1]; row 0 is the predecessor of row 1.
        seed, step: decide the generator's seed; crops of one step at several sides get equal generators.
        teachers_own: for crops that the teacher alone is shown, which have draws of their own.

    Raises:
        InputError: the function returns something else.
    """
    function = find_function(name, "augment")
    uniforms = step_generator(seed, step, AUGMENT_STREAM).random(2)
    # A generator of its own for each call: batches are made by several threads at once. 2⁵³: all bits of a double.
    generator = torch.Generator().manual_seed(int(uniforms[int(teachers_own)] * 2**53))
    with torch.no_grad():
        result = function(crops, generator)
    found = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
    if found != tuple(crops.shape):
        raise InputError(f"augment {name} returned {found}, expected crops of the same shape {tuple(crops.shape)}")
    return result.to(crops)
