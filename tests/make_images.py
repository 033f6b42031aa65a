"""Draws small images for tests."""

from pathlib import Path

import numpy as np
from PIL import Image


def paint(path: Path, seed: int, size=(24, 20)) -> Path:
    """A small image of coloured blocks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC).save(path)
    return path
