"""Makes the bundled data set and teacher again, from Debian's package `dataset-fashion-mnist`.

    apt-get install dataset-fashion-mnist
    python scripts/make_embedded.py [--work FOLDER]

Writes `funmatch/embedded/fashion-mini` and `funmatch/embedded/fashion-mini-teacher`. The images take seconds, the
teacher about 20 minutes on two cores: it is trained by `funmatch train` on all 60,000 training images.
"""

import argparse
import gzip
import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

import funmatch

SOURCE = Path("/usr/share/datasets/fashion-mnist")
EMBEDDED = Path(funmatch.__file__).parent / "embedded"
LABELS = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
CLASSES = sorted(LABELS)  # as a folder of images orders them
COLUMNS = 20

# Images a class: the first 20 of the training set; of the test set the first 50, and the 200 after them.
TRAIN, VAL, TEST = slice(0, 20), slice(0, 50), slice(50, 250)

TEACHER = {
    "student": "resnet10t",
    "student_kwargs": {"channels": (16, 32, 48, 48), "stem_width": 16},
    "side": 32,
    "eval_resize": 32,
    "mixup": 0.0,
    "crop_min_area": 0.25,
    "batch": 128,
    "lr": 4e-3,
    "steps": 16_000,
    "eval_every": 2000,
}


def read_idx(name: str) -> np.ndarray:
    """An array in the IDX format of the original MNIST: magic number, big-endian sizes, bytes."""
    content = gzip.decompress((SOURCE / name).read_bytes())
    rank = content[3]
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(np.frombuffer(content, ">i4", rank, 4))


def mosaic(images: np.ndarray, labels: np.ndarray, which: slice) -> Image.Image:
    """Some images of each class, sorted by class, as one grey sheet of `COLUMNS` columns."""
    chosen = np.concatenate([images[labels == LABELS.index(name)][which] for name in CLASSES])
    grid = chosen.reshape(-1, COLUMNS, 28, 28)
    return Image.fromarray(grid.swapaxes(1, 2).reshape(-1, COLUMNS * 28))


def write_folder(folder: Path, split: str, images: np.ndarray, labels: np.ndarray) -> None:
    """Writes all images of a split as PNG files, one folder for each class."""
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / split / LABELS[label] / f"{i:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path, compress_level=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/embedded"), help="for the images and the run")
    work = parser.parse_args().work
    train = read_idx("train-images-idx3-ubyte.gz"), read_idx("train-labels-idx1-ubyte.gz")
    test = read_idx("t10k-images-idx3-ubyte.gz"), read_idx("t10k-labels-idx1-ubyte.gz")

    sheets = EMBEDDED / "fashion-mini"
    sheets.mkdir(parents=True, exist_ok=True)
    for name, images, which in (("train", train, TRAIN), ("val", test, VAL), ("test", test, TEST)):
        mosaic(*images, which).save(sheets / f"{name}.png", optimize=True)
    (sheets / "classes.json").write_text(json.dumps(CLASSES) + "\n")

    if not (work / "images").is_dir():
        write_folder(work / "partial", "train", *train)
        write_folder(work / "partial", "test", *test)
        (work / "partial").rename(work / "images")
    # No validation split, so nothing is selected: the teacher is the last step, evaluated once on the test images.
    teacher = funmatch.train(work / "images", out=work / "teacher", **TEACHER)
    shutil.copytree(teacher.folder / "student", EMBEDDED / "fashion-mini-teacher", dirs_exist_ok=True)
    print(f"teacher: {teacher.figures['parameters']:,} parameters, {teacher.top1:.2%} of 10,000 test images")


if __name__ == "__main__":
    main()
