"""Makes small images for tests."""

import atexit
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

EMBEDDED = Path(__file__).parent.parent / "funmatch" / "embedded" / "fashion-mini"
TILE = 28  # pixels


def paint(path: Path, seed: int, size=(24, 20)) -> Path:
    """Write a small image of coloured blocks, smooth enough for JPEG; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def write_few(evaluation_images: int = 3, training_images: int | None = None) -> str:
    """Write the embedded training images and a few images per class of val and test; return the folder.

    Evaluating student and teacher on all 2,500 images of val and test would take most of the time of a short run.
    """
    folder = Path(tempfile.mkdtemp(prefix="funmatch-few-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for split in ("train", "val", "test"):
        sheet = np.asarray(Image.open(EMBEDDED / f"{split}.png"))
        tiles = sheet.reshape(sheet.shape[0] // TILE, TILE, -1, TILE).swapaxes(1, 2).reshape(-1, TILE, TILE)
        for name, group in zip(json.loads((EMBEDDED / "classes.json").read_text()), np.split(tiles, 10), strict=True):
            (folder / split / name).mkdir(parents=True)
            for i, tile in enumerate(group[: training_images if split == "train" else evaluation_images]):
                Image.fromarray(tile).save(folder / split / name / f"{i:02}.png")
    return str(folder)


FEW = write_few()
"""Folder of the embedded data set with only 30 images in val and 30 in test."""
