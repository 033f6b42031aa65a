"""Resizes whole images by Pillow and torchvision themselves, for the evaluation of models that were made so.

Training views are cut by the codes of `ops.resample`, many at a time and each alone. Here an image is resized as a
model's own pipeline does it, to the bit: nearest neighbour and box filters turn on how a library rounds places between
two pixels, and torchvision rounds bytes otherwise than Pillow.
"""

from typing import get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from funmatch.config.choices import EvalResample, Resample

MOST_PIXELS = 1 << 26
"""Pixels of a resized image above which only its middle is resized: those of a strip of 10 × 30,000 take gigabytes."""
TORCHVISION = "torchvision-"
"""What the names of torchvision's filters begin with; the others are Pillow's."""


OWN: dict[str, Resample] = {name: name for name in get_args(Resample)}
"""The methods of our own codes, by their names among all."""
FROM_FILTER: dict[str, EvalResample] = {
    "bilinear": "antialias", "bicubic": "bicubic", "nearest": "nearest", "lanczos": "lanczos", "box": "box",
    "hamming": "hamming",
}  # fmt: skip
"""The methods that give Pillow's pixels, by Pillow's and timm's names of its filters."""


def filter_of(method: EvalResample) -> str:
    """Returns the name of Pillow's filter that comes nearest to a method, as in `FROM_FILTER`."""
    name = method.removeprefix(TORCHVISION)
    return name if name in FROM_FILTER else "bilinear"


def central(image: Tensor, size: tuple[int, int], corner: tuple[int, int], side: int, method: EvalResample) -> Tensor:
    """Resizes an image and cuts a square out of it.

    Args:
        image: (height, width, 3) uint8.
        size: height and width of the resized image, pixels.
        corner: top and left of the square, pixels of the resized image.
        side: of the square, pixels.
        method: how it is resized, none of `OWN`.

    Returns:
        (3, side, side) float32 in [0, 1].
    """
    (height, width), (top, left) = size, corner
    name = method.removeprefix(TORCHVISION)
    if height * width > MOST_PIXELS:
        pixels = _middle_of_strip(image, size, corner, side, name)
    elif method.startswith(TORCHVISION):
        return _by_torchvision(image, size, name)[:, top : top + side, left : left + side] / 255
    else:
        resized = Image.fromarray(image.numpy()).resize((width, height), Image.Resampling[name.upper()])
        pixels = np.array(resized.crop((left, top, left + side, top + side)))
    return torch.from_numpy(pixels).permute(2, 0, 1) / 255


def _by_torchvision(image: Tensor, size: tuple[int, int], name: str) -> Tensor:
    # Imported where it is needed: it takes longer than small commands do.
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional

    mode = InterpolationMode.NEAREST_EXACT if name == "nearest" else InterpolationMode(name)
    # Planes one after another, as transformers has images in memory.
    return functional.resize(image.permute(2, 0, 1).contiguous(), [*size], mode, antialias=True)


def _middle_of_strip(image: Tensor, size: tuple[int, int], corner: tuple[int, int], side: int, name: str) -> np.ndarray:
    """Computes the square of `central` without the rest, up to rounding; (side, side, 3) uint8."""
    down, across = (length / resized for length, resized in zip(image.shape[:2], size, strict=True))
    top, left = corner[0] * down, corner[1] * across
    # Pillow reads beyond the box where its filter does, as if the whole image had been resized.
    box = (left, top, left + side * across, top + side * down)
    return np.array(Image.fromarray(image.numpy()).resize((side, side), Image.Resampling[name.upper()], box=box))
