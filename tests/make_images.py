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
    """A small image of coloured blocks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def write_few(evaluated: int = 6) -> str:
    """Writes the embedded training images, and so many a class of the others; the folder.

    Evaluating student and teacher on the 2,500 others takes most of what a run of a few steps takes.
    """
    folder = Path(tempfile.mkdtemp(prefix="funmatch-few-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for split in ("train", "val", "test"):
        sheet = np.asarray(Image.open(EMBEDDED / f"{split}.png"))
        tiles = sheet.reshape(sheet.shape[0] // TILE, TILE, -1, TILE).swapaxes(1, 2).reshape(-1, TILE, TILE)
        for name, those in zip(json.loads((EMBEDDED / "classes.json").read_text()), np.split(tiles, 10), strict=True):
            (folder / split / name).mkdir(parents=True)
            for i, tile in enumerate(those[: None if split == "train" else evaluated]):
                Image.fromarray(tile).save(folder / split / name / f"{i:02}.png")
    return str(folder)


FEW = write_few()
"""Small as the embedded set, but with 60 images each to validate and to test with."""
