"""Compares distillation from a folder of JPEGs with timm's components, put together as in its train.py.

    python benchmarks/versus_timm.py [--rounds 5] [--steps 8] [--only funmatch timm-bf16]

Each measurement is a process of its own: `funmatch distill`, or timm's loader (two workers, FastCollateMixup), its
`LogitDistillationTask` (without a label term), its AdamW and clipping by the norm. Measurements alternate, ratios are
within a round. A step's time is the median after the first three steps. Before, the losses of both on the same batch
are compared.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image

from funmatch.ops.distances import kl

CLASSES, WARM = 10, 3
TIMM = {
    "timm-fp32": (),
    "timm-bf16": ("bf16",),
    "timm-bf16-last": ("bf16", "last"),
    "timm-bf16-last-compiled": ("bf16", "last", "compiled"),
}
"""Whether with autocast, --channels-last, --torchcompile."""
OURS = {
    "funmatch": [],
    "funmatch-eager": ["--compile", "off"],
    "funmatch-fp32": ["--precision", "fp32", "--compile", "off"],
}
LONG = 10_000
"""Steps of funmatch's runs, stopped when enough are measured: short runs are neither compiled nor tuned."""


def make_images(folder: Path, count: int) -> None:
    """JPEGs of 384 × 384 pixels with the detail of photographs: smooth noise of several scales."""
    rng = np.random.default_rng(0)
    for i in range(count):
        layers = [
            np.asarray(Image.fromarray(rng.integers(0, 256, (s, s, 3), dtype=np.uint8)).resize((384, 384)))
            for s in (6, 24, 96)
        ]
        temporary = folder / "train" / f"{i % CLASSES}" / f"{i:05}.jpg"
        temporary.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.mean(layers, axis=0).astype(np.uint8)).save(temporary, quality=92)


def network(name: str, seed: int, side: int = 128, weights: Path | None = None) -> Any:
    """A network with random weights, including a head that is not zero, or with those of a file."""
    torch.manual_seed(seed)
    sized: dict[str, Any] = {"img_size": side} if any(kind in name for kind in ("vit", "deit", "swin")) else {}
    net: Any = timm.create_model(name, num_classes=CLASSES, **sized)
    torch.nn.init.normal_(net.get_classifier().weight, std=0.01)
    if weights and weights.is_file():
        net.load_state_dict(torch.load(weights, weights_only=True))
    return net


def timm_turn(folder: Path, options: argparse.Namespace, variant: tuple[str, ...]) -> float:
    """Seconds a step of timm's components."""
    from timm.data import FastCollateMixup, create_dataset, create_loader
    from timm.optim import create_optimizer_v2
    from timm.task import LogitDistillationTask
    from timm.utils import dispatch_clip_grad

    teacher = network(options.teacher, 0, options.side, folder / "teacher.pt")
    student = network(options.student, 1, options.side, folder / "student.pt")
    if "last" in variant:
        teacher, student = (net.to(memory_format=torch.channels_last) for net in (teacher, student))
    dataset = create_dataset("", root=str(folder / "images"), split="train", is_training=True, batch_size=options.batch)
    cpu = torch.device("cpu")
    card: Any = student.pretrained_cfg
    unchanged: Any = None
    loader = create_loader(
        dataset, (3, options.side, options.side), options.batch, is_training=True, use_prefetcher=True,
        scale=(0.05, 1.0), ratio=(3 / 4, 4 / 3), hflip=0.5, color_jitter=unchanged, interpolation="bilinear",
        mean=card["mean"], std=card["std"], num_workers=2, device=cpu,
        collate_fn=FastCollateMixup(mixup_alpha=1.0, num_classes=CLASSES), persistent_workers=True,
    )  # fmt: skip
    task = LogitDistillationTask(
        student, teacher, torch.nn.CrossEntropyLoss(), task_loss_weight=0.0, distill_loss_weight=1.0,
        temperature=options.temperature, device=cpu, verbose=False,
    )  # fmt: skip
    task.train()
    if "compiled" in variant:
        task.compile()
    optimizer = create_optimizer_v2(student, opt="adamw", lr=1e-3, weight_decay=1e-4)
    amp = torch.autocast("cpu", torch.bfloat16) if "bf16" in variant else contextlib.nullcontext()
    times: list[float] = []
    while len(times) <= options.steps + WARM:
        for images, target in loader:
            if "last" in variant:
                images = images.contiguous(memory_format=torch.channels_last)
            with amp:
                loss = task(images, target)["loss"]
            optimizer.zero_grad()
            loss.backward()
            dispatch_clip_grad(student.parameters(), 1.0, mode="norm")
            optimizer.step()
            times.append(time.perf_counter())
            if len(times) > options.steps + WARM:
                break
    return statistics.median(after - before for before, after in zip(times[WARM:], times[WARM + 1 :], strict=False))


def our_command(folder: Path, options: argparse.Namespace, steps: int, out: Path, *more: Any) -> list[str]:
    """The command line of a run of ours on a pair's images and weights."""
    argv = [
        *("--data", folder / "images", "--teacher", options.teacher, "--teacher-weights", folder / "teacher.pt"),
        *("--student", options.student, "--side", options.side, "--batch", options.batch, "--allow-weak-teacher"),
        *("--temperature", options.temperature, "--optimizer", "adamw", "--lr", "1e-3", "--weight-decay", "1e-4"),
        *("--clip-norm", "1", "--steps", steps, "--log-every", 1, "--eval-every", steps, "--save-every", steps),
        *("--out", out, "--val", "none", "--unlabelled", "--mixup", "1", *more),
    ]
    return [sys.executable, "-m", "funmatch", "distill", *map(str, argv)]


def our_turn(folder: Path, options: argparse.Namespace, more: list[str], out: Path) -> tuple[float, str]:
    """Seconds a step of `funmatch distill`, and the precision and kernels that it reports."""
    log = out.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as file:
        process = subprocess.Popen(our_command(folder, options, LONG, out, *more), stdout=file, stderr=file)
        rates: list[float] = []
        while len(rates) <= options.steps + WARM:
            if process.poll() is not None:
                sys.exit(log.read_text())
            time.sleep(0.5)
            metrics = out / "metrics.jsonl"
            records = map(json.loads, metrics.read_text().splitlines()) if metrics.is_file() else ()
            rates = [record["images_per_second"] for record in records if record["event"] == "step"]
        process.kill()
        process.wait()
    reported = [
        line
        for line in log.read_text().splitlines()
        if line.startswith(("teacher", "training", "compiling")) or "kernels" in line
    ]
    return options.batch / statistics.median(rates[WARM : WARM + options.steps]), "; ".join(reported)


@torch.no_grad()
def losses_agree(options: argparse.Namespace) -> tuple[float, float]:
    """The losses of funmatch and timm for one batch."""
    from timm.task import LogitDistillationTask

    teacher, student = network(options.teacher, 0).eval(), network(options.student, 1).eval()
    task = LogitDistillationTask(
        student, teacher, torch.nn.CrossEntropyLoss(), task_loss_weight=0.0, distill_loss_weight=1.0,
        temperature=options.temperature, verbose=False,
    )  # fmt: skip
    batch = torch.randn(8, 3, options.side, options.side)
    theirs = task.eval()(batch, torch.zeros(8, dtype=torch.long))["loss"]
    ours = kl(student(batch), teacher(batch), options.temperature).mean()
    return ours.item(), theirs.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a measurement")
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--images", "--pictures", type=int, default=320)
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--teacher", default="resnetv2_101x1_bit")
    parser.add_argument("--student", default="resnetv2_50x1_bit")
    parser.add_argument("--only", nargs="+", default=[*OURS, *TIMM], choices=[*OURS, *TIMM])
    parser.add_argument("--turn", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.turn:
        print(timm_turn(Path(options.turn), options, TIMM[options.only[0]]))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["FUNMATCH_CACHE"] = str(folder / "cache")
        make_images(folder / "images", options.images)
        torch.save(network(options.teacher, 0).state_dict(), folder / "teacher.pt")
        print("loss of a batch: ours {:.6f}, timm's {:.6f}".format(*losses_agree(options)), flush=True)
        times: dict[str, list[float]] = {name: [] for name in options.only}
        for number in range(options.rounds):
            for name in options.only:
                if name in OURS:
                    seconds, note = our_turn(folder, options, OURS[name], folder / "runs" / f"{name}-{number}")
                    if number == 0:
                        print(f"{name}: {note}", flush=True)
                else:
                    argv = [sys.executable, __file__, "--turn", str(folder), "--only", name]
                    for option in ("steps", "side", "batch", "temperature", "teacher", "student"):
                        argv += [f"--{option}", str(getattr(options, option))]
                    done = subprocess.run(argv, capture_output=True, text=True, check=True)
                    seconds = float(done.stdout.split()[-1])
                times[name].append(seconds)
                print(f"round {number}: {name} {seconds:.3f} s a step", flush=True)
    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    print(f"\n{machine}, torch {torch.__version__}, timm {timm.__version__}\n")
    theirs = [name for name in options.only if name in TIMM]
    print("| | s a step (least … most) | images/s |", *(f"times {name} |" for name in theirs))
    print("|---|---|---:|" + "---|" * len(theirs))
    for name, mine in times.items():
        middle = statistics.median(mine)
        cells = []
        for other in theirs:
            ratios = [their / own for their, own in zip(times[other], mine, strict=True)]
            cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} … {max(ratios):.2f})")
        rate = f"{middle:.3f} ({min(mine):.3f} … {max(mine):.3f}) | {options.batch / middle:.1f}"
        print(f"| {name} | {rate} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
