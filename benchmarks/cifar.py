"""Runs consistency and patience on 500 images of CIFAR-10, 50 per class: a study for one GPU and some hours.

    python benchmarks/cifar.py --work studies/cifar [--data cifar10] [--epochs 1000 30000] [--patience 100 1000 30000]

The teacher, a ResNet-50 at 64 px, is trained on the labels of all 50,000 training images except those held out for
validation. The student, a ResNet-18 with GroupNorm and a tenth of the arithmetic, learns from 500 of them without
labels. Every strategy is run for each of `--epochs` with three seeds, and function matching for each of `--patience`.
The same command resumes; `--work` then holds the study's page, table and figures.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

import funmatch
from funmatch.config.choices import STRATEGIES
from funmatch.data.cache.open_cache import open_cache

SMALL, VALIDATION = 50, 100
"""Images of each class in the small training set, and in the validation set."""
STUDENT = """student = "resnet18"
student_kwargs = { channels = [32, 64, 96, 128], norm_layer = "groupnorm" }"""


def write(split, rows, classes, folder: Path) -> None:
    """Writes some images of a split as PNG files, one folder for each class."""
    labels = split.labels(slice(None)).numpy()
    for row in rows:
        path = folder / classes[labels[row]] / f"{row:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            Image.fromarray(split.image(int(row)).numpy()).save(path)


def make_images(data: str, work: Path) -> None:
    """`work/all` (the teacher's) and `work/small` (the student's), with the same validation and test images."""
    cache = open_cache(data)
    train, test = cache.splits["train"], cache.splits["test"]
    labels = train.labels(slice(None)).numpy()
    each = [np.flatnonzero(labels == label) for label in range(len(cache.classes))]
    small, val = (np.concatenate([rows[part] for rows in each]) for part in (slice(SMALL), slice(-VALIDATION, None)))
    rest = np.setdiff1d(np.arange(len(train)), val)
    for name, rows in (("small", small), ("all", rest)):
        write(train, rows, cache.classes, work / name / "train")
        write(train, val, cache.classes, work / name / "val")
        write(test, range(len(test)), cache.classes, work / name / "test")


def study(work: Path, options: argparse.Namespace) -> str:
    """The study's file."""
    runs = [
        f"""
[[run]]
name = "teacher"
verb = "train"
data = "{work / "all"}"
student = "resnet50"
epochs = {options.teacher_epochs}
batch = 256
mixup = 0.2
crop_min_area = 0.25
lr = 2e-3
seeds = [0]
shown = false
"""
    ]
    for name in STRATEGIES:
        epochs = sorted({*options.epochs, *(options.patience if name == "funmatch" else ())})
        runs.append(f"""
[[run]]
name = "{name}, {{epochs}} epochs"
group = "{name}"
strategy = "{name}"
teacher = "run:teacher"
{STUDENT}
each = {{ epochs = {epochs} }}
""")
    runs.append(f"""
[[run]]
name = "labels, {{epochs}} epochs"
group = "labels"
verb = "train"
{STUDENT}
each = {{ epochs = {sorted(options.patience)} }}
""")
    return f"""title = "CIFAR-10, 500 images: consistency and patience"
question = "A tenth of the teacher's arithmetic, a hundredth of its images, no label: how the eight strategies fare."
seeds = [0, 1, 2]

[common]
data = "{work / "small"}"
side = 64
eval_resize = 64
batch = 256
lr = 3e-3
weight_decay = 1e-4
temperature = 2.0
eval_every = 1000
save_every = 5000
{"".join(runs)}
[[figure]]
kind = "against"
value = "top1"
knob = "epochs"

[[figure]]
kind = "against"
value = "views_kl"
knob = "epochs"

[[figure]]
kind = "scatter"
value = "top1"
across = "views_kl"
log = true
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("studies/cifar"))
    parser.add_argument("--data", default="cifar10", help="CIFAR-10 by name, or a folder of it")
    parser.add_argument("--epochs", type=int, nargs="+", default=[1000, 30000], help="lengths of every strategy")
    parser.add_argument(
        "--patience", type=int, nargs="+", default=[100, 1000, 10000, 30000], help="of funmatch and labels"
    )
    parser.add_argument("--teacher-epochs", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, help="runs at a time; small networks share a GPU well")
    parser.add_argument("--set", nargs="*", default=[], help="options of all runs, e.g. batch=128")
    options = parser.parse_args()
    work = options.work.resolve()
    make_images(options.data, work / "images")
    (work / "cifar.toml").write_text(study(work / "images", options))
    options_of_study = {"seeds": tuple(options.seeds), "jobs": options.jobs, "set": tuple(options.set)}
    done = funmatch.study(work / "cifar.toml", out=work / "study", **options_of_study)
    print((work / "study" / "table.md").read_text())
    print(done["report"])


if __name__ == "__main__":
    main()
