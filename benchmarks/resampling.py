"""Measures what resizing with and without antialias does to teachers, students and speed.

    python benchmarks/resampling.py --cifar FOLDER --photos FOLDER [--steps 600] [--seeds 3] [--out runs/resampling]

CIFAR-10 (folder of train/<class> and test/<class>) is shown at 16 and 24 pixels, cuts of photographs at 64 and 96:
`--photos` holds large ones, at any depth, of which each is a class; training cuts come from its left half, test cuts
from its right half. A teacher is trained on labels with one method; students are distilled from it with each method,
with several seeds and equally many steps, and evaluated by each. Also: the teacher on evaluation and training views by
each method, and the time that a view takes on one core, in turns. Prints Markdown.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import timm
import torch
from PIL import Image

import funmatch
from funmatch.config.choices import Resample
from funmatch.data.cache.open_cache import open_cache
from funmatch.data.loader import Loader
from funmatch.models.load import load
from funmatch.ops.crops import crop_resize_flip
from funmatch.ops.mixing import MixupOptions
from funmatch.ops.sampling import box_sampler
from funmatch.ops.view_spec import ViewSpec

METHODS: tuple[Resample, ...] = ("antialias", "tf")
TEACHER = {"student": "resnet10t", "student_kwargs": ("channels=16,32,64,128", "stem_width=16")}
STUDENT = {"student": "resnet10t", "student_kwargs": ("channels=8,16,32,64", "stem_width=8")}
ROUNDS = 5


def largest_of_each(folder: Path) -> list[Path]:
    """Photographs at least 1,000 pixels high; of several sizes in one folder, the widest."""
    found: dict[str, tuple[int, Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in (".jpg", ".jpeg", ".png"):
            continue
        with Image.open(path) as image:
            width, height = image.size
        name = path.relative_to(folder).parts[0]
        if height >= 1000 and width > found.get(name, (0, path))[0]:
            found[name] = width, path
    return [path for _, path in found.values()]


def write_cuts(photos: list[Path], folder: Path, train: int = 60, test: int = 40) -> Path:
    """Cuts of 300 to 600 pixels, a class for each photograph."""
    rng = np.random.default_rng(0)
    for number, path in enumerate(photos):
        image = Image.open(path).convert("RGB")
        for split, count, left in (("train", train, 0), ("test", test, image.width // 2)):
            (folder / split / f"{number:02}").mkdir(parents=True, exist_ok=True)
            for i in range(count):
                width, height = (int(n) for n in rng.integers(300, 601, 2))
                x, y = (
                    int(rng.integers(left, left + image.width // 2 - width)),
                    int(rng.integers(0, image.height - height)),
                )
                cut = image.crop((x, y, x + width, y + height))
                cut.save(folder / split / f"{number:02}" / f"{i:03}.jpg", quality=92)
    return folder


def on_training_views(teacher: Path, data: str, side: int, method: Resample) -> float:
    """Top-1 of a teacher on 2,048 Inception crops of training images."""
    model, split = load(str(teacher)).eval(), open_cache(data).splits["train"]
    loader = Loader(split, ViewSpec(7, 256, side, mixup=MixupOptions(0.0), resample=method))
    right = 0
    with torch.inference_mode():
        for step in range(8):
            batch = loader.batch_at(step)
            right += int((model(batch.crops[1:]).argmax(-1) == batch.labels[1:]).sum())
    return right / 2048


def compare(name: str, data: str, side: int, taught: Resample, options: argparse.Namespace) -> Iterator[str]:
    """Rows of the table for one data set, image size and method of the teacher's training."""
    common: dict[str, Any] = {
        "data": data, "side": side, "val": "none", "batch": 32, "lr": 0.004, "steps": options.steps, "compile": "off",
        "eval_every": options.steps, "device": "cpu",
    }  # fmt: skip
    folder = options.out / f"{name}-{side}-{taught}"
    how: dict[str, Any] = common | TEACHER | {"steps": 3 * options.steps, "resample": taught}
    teacher = funmatch.train(**how, out=folder / "teacher").folder
    shown = {method: funmatch.evaluate(teacher, eval_resample=method)["top1"] for method in METHODS}
    views = {method: on_training_views(teacher / "student", data, side, method) for method in METHODS}
    yield row(name, side, taught, "the teacher, evaluation", [[shown[each]] for each in METHODS])
    yield row(name, side, taught, "the teacher, training views", [[views[each]] for each in METHODS])
    for method in METHODS:
        found: dict[str, list[float]] = {each: [] for each in METHODS}
        for seed in range(options.seeds):
            out = folder / f"{method}-{seed}"
            how = common | STUDENT | {"teacher": teacher, "resample": method, "seed": seed, "allow_weak_teacher": True}
            options_of_run: dict[str, Any] = how
            funmatch.distill(**options_of_run, out=out)
            for each in METHODS:
                found[each].append(funmatch.evaluate(out, eval_resample=each)["top1"])
        yield row(name, side, taught, f"students trained with {method}", [found[each] for each in METHODS])


def row(name: str, side: int, taught: str, what: str, columns: list[list[float]]) -> str:
    cells = []
    for values in columns:
        spread = f" ({100 * min(values):.1f} – {100 * max(values):.1f})" if len(values) > 1 else ""
        cells.append(f"{100 * statistics.fmean(values):.1f}{spread}")
    return f"| {name}, {side} px | {taught} | {what} | {' | '.join(cells)} |"


def speed(size: tuple[int, int], side: int) -> str:
    """A row of milliseconds a view, on one core, in turns."""
    rng = np.random.default_rng(0)
    images = [torch.from_numpy(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for _ in range(64)]
    boxes = box_sampler("inception", side=side)(rng, *np.array([size] * 64).T)
    flips = rng.random(64) < 0.5

    def pillow() -> None:
        for image, (top, left, height, width) in zip(images, boxes.tolist(), strict=True):
            crop = Image.fromarray(image[top : top + height, left : left + width].numpy())
            view = np.asarray(crop.resize((side, side), Image.Resampling.BILINEAR))
            torch.from_numpy(view.copy()).permute(2, 0, 1).float().div_(255)

    times: dict[str, list[float]] = {}
    for turn in range(ROUNDS + 1):
        for way in ("tf", "antialias", "bicubic", "Pillow"):
            began = time.perf_counter()
            pillow() if way == "Pillow" else crop_resize_flip(images, boxes, flips, side, method=way)
            if turn:
                times.setdefault(way, []).append((time.perf_counter() - began) / 64 * 1e3)
    cells = [f"{statistics.median(each):.2f} ({min(each):.2f} – {max(each):.2f})" for each in times.values()]
    return f"| {size[1]} × {size[0]} → {side} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=Path)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/resampling"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, timm {timm.__version__}, {platform.machine()}, one thread\n")
    print("| image → view, ms a view | tf | antialias | bicubic | Pillow |\n|---|---|---|---|---|")
    for size, side in (((375, 500), 128), ((375, 500), 224), ((224, 224), 128), ((768, 1024), 224)):
        print(speed(size, side), flush=True)
    print("\n| images | teacher trained with | top-1, %, evaluated with | antialias | tf |\n|---|---|---|---|---|")
    tasks: list[tuple[str, str, int, Resample]] = []
    if options.photos:
        photos = largest_of_each(options.photos)
        cuts = options.out / "photographs"
        data = str(cuts if cuts.is_dir() else write_cuts(photos, cuts))
        tasks += [("photographs", data, 64, each) for each in METHODS] + [("photographs", data, 96, "antialias")]
    if options.cifar:
        data = str(options.cifar)
        tasks += [("CIFAR-10", data, 16, each) for each in METHODS] + [("CIFAR-10", data, 24, "antialias")]
    for task in tasks:
        for line in compare(*task, options):
            print(line, flush=True)


if __name__ == "__main__":
    main()
