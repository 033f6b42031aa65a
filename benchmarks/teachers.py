"""Measures how much the figures of `funmatch plan --teachers` predict: of teachers, and of views.

    python benchmarks/teachers.py [--steps 300] [--seeds 3] [--only teachers views] [--out FILE]

Students are distilled on the 200 bundled training images, three seeds each: from eight teachers on the same views, and
from one teacher on five kinds of views. The figures are taken before, from the teachers alone, and compared with the
students' accuracy on 1,000 of the test images by Spearman's rank correlation.

The teachers: the bundled one; the same with its logits multiplied by 3 and by 0.4, which changes no class but all
probabilities; the same with noise on its weights, of 0.1 and 0.15 of the deviation of each tensor; and three small
networks trained on the labels of the 200 training images, for different times and with other views.
"""

import argparse
import itertools
import json
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import funmatch
from funmatch.commands.plan import run as plan
from funmatch.config import Distill, Train
from funmatch.config.search import PlanDistill
from funmatch.models.classifier import Classifier
from funmatch.models.load import load
from funmatch.models.save import save
from funmatch.models.timm_models import head_names
from funmatch.training import distill, train

BUNDLED = "fashion-mini-teacher"
EMBEDDED = Path(funmatch.__file__).parent / "embedded" / "fashion-mini"
TILE, TESTED = 28, 100  # pixels; test images of a class
COMMON: dict[str, Any] = {"student": "fashion-mini-student", "batch": 32, "threads": 1, "device": "cpu"}
QUIET: dict[str, Any] = {"eval_every": 10**6, "save_every": 10**6}
TRAINED: dict[str, dict[str, Any]] = {
    "labels, 900 steps": {"steps": 900},
    "labels, 150 steps": {"steps": 150},
    "labels, 300 steps, mild crops": {"steps": 300, "crop": "mild", "mixup": 0.0},
}
VIEWS: dict[str, dict[str, Any]] = {
    "Inception crops, MixUp (funmatch)": {},
    "Inception crops, MixUp, CutMix": {"cutmix": 1.0},
    "Inception crops of at least half, MixUp": {"crop_min_area": 0.5},
    "Inception crops (same/ic)": {"strategy": "same/ic"},
    "mild crops (same/rc)": {"strategy": "same/rc"},
}
FIGURES: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "teacher's accuracy": lambda row: row["top1"],
    "its entropy": lambda row: row["entropy"],
    "spread of its mean answer, negated": lambda row: -row["spread"],
}
"""Figures of a teacher, each so that more should be better; of entropy nobody says which."""


@torch.no_grad()
def scale_logits(teacher: Classifier, factor: float) -> None:
    """Multiplies a teacher's logits."""
    for name in head_names(teacher.net):
        for parameter in teacher.net.get_submodule(name).parameters():
            parameter.mul_(factor)


@torch.no_grad()
def add_noise(teacher: Classifier, share: float) -> None:
    """Adds normal noise to the kernels of a teacher, a share of the deviation of each."""
    generator = torch.Generator().manual_seed(0)
    for parameter in teacher.net.parameters():
        if parameter.ndim > 1:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * parameter.std() * share)


CHANGED: dict[str, Callable[[Classifier], None]] = {
    "bundled": lambda teacher: None,  # noqa: ARG005
    "bundled, logits × 3": lambda teacher: scale_logits(teacher, 3.0),
    "bundled, logits × 0.4": lambda teacher: scale_logits(teacher, 0.4),
    "bundled, noise 0.1": lambda teacher: add_noise(teacher, 0.1),
    "bundled, noise 0.15": lambda teacher: add_noise(teacher, 0.15),
}


def write_images(folder: Path) -> str:
    """Writes the training images, and some of the test images as the validation split."""
    for split, sheet, count in (("train", "train", None), ("val", "test", TESTED)):
        pixels = np.asarray(Image.open(EMBEDDED / f"{sheet}.png"))
        tiles = pixels.reshape(-1, TILE, pixels.shape[1] // TILE, TILE).swapaxes(1, 2).reshape(-1, TILE, TILE)
        for name, group in zip(json.loads((EMBEDDED / "classes.json").read_text()), np.split(tiles, 10), strict=True):
            (folder / split / name).mkdir(parents=True)
            for number, tile in enumerate(group[:count]):
                Image.fromarray(tile).save(folder / split / name / f"{number:03}.png")
    return str(folder)


def make_teachers(folder: Path, data: str) -> dict[str, str]:
    """Writes the teachers, and returns their folders by name."""
    found = {}
    for number, (name, change) in enumerate(CHANGED.items()):
        teacher = load(BUNDLED)
        change(teacher)
        place = folder / f"changed-{number}"
        place.mkdir()
        save(teacher, place, card=replace(teacher.card, top1=None), about={})
        found[name] = str(place)
    for number, (name, options) in enumerate(TRAINED.items()):
        place = folder / f"trained-{number}"
        train.run(Train.checked(**COMMON | QUIET | {"data": data, "out": place} | options))
        found[name] = str(place)
    return found


def figures(folder: Path, data: str, teachers: list[str], **options: Any) -> list[dict[str, Any]]:
    """What `funmatch plan --teachers` measures, in the order of the teachers."""
    config = PlanDistill.checked(
        **COMMON, data=data, steps=100, out=folder / "planned", teachers=tuple(teachers), **options
    )
    rows = {row["teacher"]: row for row in plan(config).metrics["teachers"]}
    return [rows[teacher] for teacher in teachers]


def accuracies(folder: Path, data: str, teacher: str, options: argparse.Namespace, **more: Any) -> list[float]:
    """Accuracy of the students of a teacher, one a seed."""
    found = []
    for seed in range(options.seeds):
        out = folder / "student"
        shutil.rmtree(out, ignore_errors=True)
        usual = {**COMMON, **QUIET, "data": data, "steps": options.steps, "seed": seed, "out": out}
        config = Distill.checked(**usual, teacher=(teacher,), allow_weak_teacher=True, **more)
        # Without the page that the command draws.
        found.append(distill.run(config)["top1"])
    return found


def ranks(values: list[float]) -> list[float]:
    """Ranks from 1 on, equal values sharing theirs."""
    return [sum(other < value for other in values) + (values.count(value) + 1) / 2 for value in values]


def spearman(left: list[float], right: list[float]) -> float | None:
    """Rank correlation of two lists; None where one is constant."""
    one, other = ranks(left), ranks(right)
    return None if len({*one}) == 1 or len({*other}) == 1 else statistics.correlation(one, other)


def least_significant(count: int) -> float:
    """The smallest rank correlation of so many pairs that chance exceeds, either way, in less than 5 % of orders."""
    # Each order is as likely: of more than eight pairs, there are too many to list.
    order = [float(number) for number in range(count)]
    found = sorted(abs(statistics.correlation(order, list(each))) for each in itertools.permutations(order))
    return found[int(0.95 * len(found))]


def table(title: str, rows: dict[str, dict[str, Any]], students: dict[str, list[float]]) -> list[str]:
    """Markdown lines: the figures beside the students' accuracy, and the correlations."""
    lines = [
        f"## {title}", "",
        "| | top-1 of the teacher | entropy (nats) | spread of mean | students' top-1, mean (lowest … highest) |",
        "|---|---:|---:|---:|---:|",
    ]  # fmt: skip
    means = {name: statistics.mean(each) for name, each in students.items()}
    for name in sorted(means, key=lambda each: -means[each]):
        row, each = rows[name], students[name]
        figure = f"{100 * row['top1']:.1f} % | {row['entropy']:.3f} | {row['spread']:.5f}"
        lines.append(
            f"| {name} | {figure} | {100 * means[name]:.1f} % ({100 * min(each):.1f} … {100 * max(each):.1f}) |"
        )
    lines += ["", "| figure | rank correlation with the students' accuracy |", "|---|---:|"]
    for name, figure in FIGURES.items():
        found = spearman([figure(rows[each]) for each in means], [means[each] for each in means])
        lines.append(f"| {name} | {'constant' if found is None else f'{found:+.2f}'} |")
    limit = least_significant(len(means))
    return [*lines, "", f"With {len(means)} rows, chance alone exceeds ± {limit:.2f} in one of twenty studies.", ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=("teachers", "views"), default=("teachers", "views"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/teachers-cpu.md"))
    options = parser.parse_args()
    began, lines = time.process_time(), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_images(folder / "images")
        if "teachers" in options.only:
            teachers = make_teachers(folder, data)
            rows = dict(zip(teachers, figures(folder, data, [*teachers.values()]), strict=True))
            students = {name: accuracies(folder, data, teacher, options) for name, teacher in teachers.items()}
            lines += table("Which teacher?", rows, students)
        if "views" in options.only:
            rows = {name: figures(folder, data, [BUNDLED], **views)[0] for name, views in VIEWS.items()}
            students = {name: accuracies(folder, data, BUNDLED, options, **views) for name, views in VIEWS.items()}
            lines += table("Which views?", rows, students)
    head = [
        "# How much `funmatch plan --teachers` predicts, on the CPU", "",
        f"    python benchmarks/teachers.py --steps {options.steps} --seeds {options.seeds}", "",
        f"Students of {options.steps} steps at batch {COMMON['batch']}, {options.seeds} seeds each, on the bundled "
        f"images (200 for training, {10 * TESTED:,} for testing); {platform.machine()}, one thread, "
        f"torch {torch.__version__}, "
        f"{(time.process_time() - began) / 60:.0f} minutes of CPU.", "",
    ]  # fmt: skip
    options.out.write_text("\n".join([*head, *lines]))
    print("\n".join([*head, *lines]))


if __name__ == "__main__":
    main()
