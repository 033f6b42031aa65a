"""Measures the cost of each strategy: its counted arithmetic and its step time, relative to its networks alone.

    python benchmarks/strategies.py [--rounds 5] [--steps 12] [--side 96] [--batch 16] [--device cpu]

`funmatch.distill` runs each strategy in turn, round after round, on generated images. A step's time is the median of
a run's steps after the first three. Arithmetic is counted by torch's FlopCounterMode: that of a longer run minus that
of a shorter one, per step. It is compared with the cost of teacher (one forward pass) and student (forward and
backward) alone. Times are compared in the same way: since networks use a machine differently, a step is compared with
the sum of its parts, measured in the same round on a prepared batch. A fixed teacher has no part in a step.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise, repeat
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import funmatch
from funmatch.config.choices import STRATEGIES
from funmatch.data.loader import Batch
from funmatch.models.inference.frozen import Frozen
from funmatch.models.inference.modes import InferenceMode
from funmatch.models.inference.native.layers import kinds_of
from funmatch.models.load import load
from funmatch.ops.distances import kl
from funmatch.ops.optim.factory import create_optimizer
from funmatch.runtime import devices
from funmatch.training.loop import LoopOptions, fit
from funmatch.training.student.step_times import use_kernels


def make_images(folder: Path, count: int) -> None:
    """Coloured noise of several scales, 160 × 160 pixels, of two classes."""
    rng = np.random.default_rng(0)
    for split, number in (("train", count), ("val", 8)):
        for i in range(number):
            path = folder / split / "ab"[i % 2] / f"{i:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            layers = [
                np.asarray(Image.fromarray(rng.integers(0, 256, (s, s, 3), dtype=np.uint8)).resize((160, 160)))
                for s in (4, 16, 64)
            ]
            Image.fromarray(np.mean(layers, axis=0).astype(np.uint8)).save(path)


def distil(folder: Path, strategy: str, steps: int, options: argparse.Namespace, name: str) -> Path:
    """Distil with the given strategy and return the run folder."""
    more: dict[str, Any] = {"strategy": strategy} | ({"teacher_crops": 4} if strategy == "fix/ic_ens" else {})
    return funmatch.distill(
        data=str(folder / "images"), val="none", teacher=options.teacher, teacher_weights=str(folder / "teacher.pt"),
        student=options.student, side=options.side, batch=options.batch, steps=steps,
        out=folder / "runs" / name, log_every=1, eval_every=10**6, save_every=10**6, device=options.device,
        teacher_precision="fp32", precision="fp32", allow_weak_teacher=True, **more,
    ).folder  # fmt: skip


def flops_a_step(folder: Path, strategy: str, options: argparse.Namespace) -> float:
    """Counted: (a run of five steps − a run of two) / 3, after the logits of a fixed teacher have been computed."""
    label = strategy.replace("/", "-")
    distil(folder, strategy, 1, options, f"before-{label}")
    counted = []
    for steps in (2, 5):
        with FlopCounterMode(display=False) as counter:
            distil(folder, strategy, steps, options, f"count-{label}-{steps}")
        counted.append(counter.get_total_flops())
    return (counted[1] - counted[0]) / 3


def parts(folder: Path, options: argparse.Namespace) -> tuple[Callable[[], object], Callable[[], object]]:
    """The work of a teacher and of a student in a step, on a prepared batch."""
    device = devices.pick_device(options.device)
    teacher = Frozen(load(options.teacher, weights=folder / "teacher.pt"), InferenceMode()).to(device)
    batch = prepared_batch(options)
    return lambda: teacher(batch).sum().item(), student_step(options, teacher.classifier.num_classes)


def prepared_batch(options: argparse.Namespace) -> torch.Tensor:
    device = devices.pick_device(options.device)
    batch = torch.rand(options.batch, 3, options.side, options.side, device=device)
    return batch.contiguous(memory_format=torch.channels_last)


def student_step(
    options: argparse.Namespace, classes: int, precision: str = "fp32", *, native: bool = False
) -> Callable[[], object]:
    """A student's step on a prepared batch, in a precision and with all native kernels that it can use, or none."""
    device, batch = devices.pick_device(options.device), prepared_batch(options)
    student = load(options.student, classes=classes).to(device)
    if native:
        use_kernels(student, kinds_of(student.net))
    options_of_loop = LoopOptions(10**6, 1e-3, lambda _step: 1.0, 1.0, 0, device, precision)
    labels = torch.zeros(options.batch + 1, dtype=torch.long)
    ready = repeat(Batch(torch.cat([batch[:1], batch]), labels, 1.0))
    truth = torch.randn(options.batch, student.num_classes, device=device)
    optimizer = create_optimizer("adamw", student.net, 1e-3, 1e-4)

    def loss_of(one: Batch) -> dict[str, torch.Tensor]:
        return {"loss": kl(student(one.crops[1:]), truth).mean()}

    steps = fit(options_of_loop, student, optimizer, devices.loss_scaler(device, precision), ready, loss_of)
    return lambda: next(steps)[1]["loss"].item()


def flops_of(work: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def seconds_of(work: Callable[[], object], steps: int) -> float:
    """The median over a number of calls after the first three."""
    times = [time.perf_counter()]
    for _ in range(steps):
        work()
        times.append(time.perf_counter())
    return statistics.median(after - before for before, after in pairwise(times[3:]))


def seconds_a_step(run: Path, batch: int) -> float:
    """The median of a run's steps after the first three."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    rates = [record["images_per_second"] for record in records if record["event"] == "step"]
    return batch / statistics.median(rates[3:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--side", type=int, default=96)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--teacher", default="resnet50")
    parser.add_argument("--student", default="resnet18")
    parser.add_argument("--device", default="cpu", help="cpu, auto, or as torch names it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["FUNMATCH_CACHE"] = str(folder / "cache")
        make_images(folder / "images", 64)
        # Random weights cost the same time as trained ones; the head sets the number of classes.
        weights = folder / "teacher.pt"
        torch.save(timm.create_model(options.teacher, num_classes=2).state_dict(), weights)
        flops = {name: flops_a_step(folder, name, options) for name in STRATEGIES}
        teacher_pass, student_step = parts(folder, options)
        alone = flops_of(teacher_pass), flops_of(student_step)
        times: dict[str, list[float]] = {name: [] for name in STRATEGIES}
        of_parts: list[tuple[float, float]] = []
        for number in range(options.rounds):
            of_parts.append((seconds_of(teacher_pass, options.steps), seconds_of(student_step, options.steps)))
            for name in STRATEGIES:
                run = distil(folder, name, options.steps, options, f"time-{name.replace('/', '-')}-{number}")
                times[name].append(seconds_a_step(run, options.batch))
                shutil.rmtree(run)
    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    print(f"{machine}, torch {torch.__version__}, timm {timm.__version__}\n")
    print(f"alone: teacher {alone[0] / 1e9:.2f} GFLOP, student {alone[1] / 1e9:.2f} GFLOP\n")
    print("| strategy | GFLOP a step | of its networks alone | ms a step | of its networks alone (least … most) |")
    print("|---|---:|---:|---:|---:|")
    for name, strategy in STRATEGIES.items():
        ideal = alone[1] + (0 if strategy.fixed else alone[0])
        ratios = [
            mine / (student + (0 if strategy.fixed else teacher))
            for mine, (teacher, student) in zip(times[name], of_parts, strict=True)
        ]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} … {max(ratios):.2f})"
        middle = 1e3 * statistics.median(times[name])
        print(f"| {name} | {flops[name] / 1e9:.2f} | {flops[name] / ideal:.3f} | {middle:.0f} | {spread} |")


if __name__ == "__main__":
    main()
