"""Measures where the time of a step goes, and whether it depends on the number of images.

    python benchmarks/step.py [--images 500 5000] [--steps 20] [--device auto]

Distils ResNet-18 into ResNet-18 at 128 px from a folder of 500 × 375 JPEGs, twice with the same random choices: as in a
run, and with every batch made beforehand, so that only model, backward pass and optimizer remain. The difference is
everything else: sampling, cropping, resizing, mixing, transfers, logging. Pairs of runs alternate, so that a drift of
the machine affects both.
"""

import argparse
import json
import platform
import resource
import statistics
import tempfile
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image

from funmatch.data.cache.open_cache import open_cache
from funmatch.data.cache.stores import CachedSplit
from funmatch.data.cache.storing import CacheOptions
from funmatch.data.loader import Batch, Loader
from funmatch.data.prefetch import prefetch
from funmatch.models.inference.frozen import Frozen
from funmatch.models.load import load
from funmatch.ops.distances import kl
from funmatch.ops.mixing import mix_views
from funmatch.ops.optim.factory import create_optimizer
from funmatch.ops.view_spec import ViewSpec
from funmatch.runtime import devices
from funmatch.training.loop import LoopOptions, fit

SIDE = 128


def make_images(folder: Path, count: int) -> None:
    """JPEGs of 500 × 375 pixels with the detail of photographs: smooth noise of several scales."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for i in range(count):
        layers = [
            np.asarray(Image.fromarray(rng.integers(0, 256, (s * 3, s * 4, 3), dtype=np.uint8)).resize((500, 375)))
            for s in (2, 8, 32)
        ]
        Image.fromarray(np.mean(layers, axis=0).astype(np.uint8)).save(folder / f"{i:05}.jpg", quality=92)


def seconds_a_step(split: CachedSplit, options: argparse.Namespace, *, ready: bool) -> float:
    """Median over `steps` steps after three warm-up steps; `ready` makes the batches beforehand."""
    torch.manual_seed(0)
    teacher, student = Frozen(load("resnet18", classes=37)), load("resnet18", classes=37)
    device = devices.pick_device(options.device)
    precision = devices.resolve_precision("auto", device)
    loop = LoopOptions(options.steps + 3, 1e-3, lambda _step: 1.0, 1.0, 0, device, precision)
    teacher.to(device)
    student.to(device)
    optimizer = create_optimizer("adamw", student.net, loop.lr, 1e-4)
    loader = Loader(split, ViewSpec(0, options.batch, SIDE))
    pin = partial(Batch.pin_memory, device=device)
    batches = prefetch(loader, 0, loop.steps, workers=devices.spare_threads(), finish=pin)
    if ready:
        batches = [batch.to(device) for batch in batches]

    def loss_of(batch):
        (teacher_view,), student_view = mix_views(batch.crops, (None,), batch.lam)
        return {"loss": kl(student(student_view), teacher(teacher_view), 2.0).mean()}

    scaler = devices.loss_scaler(loop.device, loop.precision)
    times = [time.perf_counter()]
    for _, losses in fit(loop, student, optimizer, scaler, batches, loss_of):
        losses["loss"].item()
        times.append(time.perf_counter())
    return statistics.median(b - a for a, b in pairwise(times[3:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", "--pictures", type=int, nargs="+", default=[500, 5000])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="cpu, auto, or as torch names it")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder) / "some", 200)
        some = open_cache(f"{folder}/some", cache_options=CacheOptions(home=Path(folder) / "cache")).splits["train"]
        for count in options.images:
            # More images than files: the index repeats them, which costs a step as much as other images would.
            split = some.subset(np.resize(np.arange(len(some)), count))
            outside, in_run = [], []
            for _ in range(options.repeats):
                run = seconds_a_step(split, options, ready=False)
                model = seconds_a_step(split, options, ready=True)
                in_run.append(run)
                outside.append((run - model) / run)
            rows.append({"images": count, "step_ms": spread(in_run, 1e3), "outside_percent": spread(outside, 100)})
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    versions = {"torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version()}
    print(
        json.dumps(
            {"machine": machine, **versions, "batch": options.batch, "peak_mb": round(peak), "rows": rows}, indent=1
        )
    )


def spread(values: list[float], scale: float) -> str:
    """Median, lowest and highest of the runs."""
    low, middle, high = (scale * f(values) for f in (min, statistics.median, max))
    return f"{middle:.1f} ({low:.1f} … {high:.1f}, n = {len(values)})"


if __name__ == "__main__":
    main()
