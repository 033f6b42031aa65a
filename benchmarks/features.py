"""Measures what a step costs that matches features, beside one that matches logits, with the same networks and views.

    python benchmarks/features.py [--rounds 9] [--steps 4] [--side 64] [--batch 16] [--device cpu]

Distils ResNet-18 into ResNet-18 from the bundled images. In each round every variant takes some steps on the same
batches, made beforehand: teacher, student, loss, backward pass and optimizer. Ratios are to logits in the same round,
so that a drift of the machine affects both. On a CPU the time is that of the process, in which waiting for others that
share the machine does not count.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import timm
import torch

from funmatch.config import Distill
from funmatch.runtime import devices
from funmatch.training import distill
from funmatch.training.loop import fit

VARIANTS: Mapping[str, dict[str, Any]] = {
    "logits": {},
    "features": {"match": ("features",)},
    "features, l2": {"match": ("features",), "feature_loss": ("l2",)},
    "features, queue of 4,096": {"match": ("features",), "feature_loss": ("cosine", "queue-kl")},
    "logits and features": {"match": ("logits", "features")},
    "features and tokens": {"match": ("features", "tokens")},
}


def networks() -> dict[str, torch.nn.Module]:
    """Teacher and student with random weights."""
    torch.manual_seed(0)
    return {"t": timm.create_model("resnet18", num_classes=10), "s": timm.create_model("resnet18", num_classes=10)}


def seconds_a_step(distillation: distill.Distillation, batches: list, steps: int) -> float:
    """Mean seconds of a step; of the process on a CPU, else of the clock."""
    setup = distillation.setup
    clock = time.process_time if setup.loop.device.type == "cpu" else time.perf_counter
    scaler = devices.loss_scaler(setup.loop.device, setup.loop.precision)
    devices.synchronize(setup.loop.device)
    began = clock()
    for _ in fit(
        setup.loop, setup.student.classifier, setup.student.optimizer, scaler, batches[:steps], distillation.loss
    ):
        pass
    devices.synchronize(setup.loop.device)
    return (clock() - began) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("rounds", 9), ("steps", 4), ("side", 64), ("batch", 16)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cpu", help="cpu, or as torch names it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        ready = {}
        for number, (name, more) in enumerate(VARIANTS.items()):
            config = Distill.checked(
                data="fashion-mini", teacher="t", student="s", side=options.side, batch=options.batch, steps=10_000,
                device=options.device, allow_weak_teacher=True, out=Path(folder) / str(number), compile="off",
                precision="fp32", teacher_precision="fp32", **more,
            )  # fmt: skip
            cache, resolved, loaded = distill.open_inputs(config, networks())
            setup = distill.build_distill_setup(resolved, cache, loaded, networks())
            distillation = stack.enter_context(distill.prepare(setup, loaded))
            device = distillation.setup.loop.device
            ready[name] = (
                distillation,
                # Of steps at which a queue is full.
                [distillation.batches.batch_at(5000 + step).to(device) for step in range(options.steps)],
            )
        for turn in range(options.rounds + 1):
            for name, (distillation, batches) in ready.items():
                took = seconds_a_step(distillation, batches, options.steps)
                if turn:  # the first round allocates and chooses kernels
                    times[name].append(took)
    rows = []
    for name, each in times.items():
        ratios = [took / base for took, base in zip(each, times["logits"], strict=True)]
        rows.append({"variant": name, "step_ms": spread(each, 1e3), "ratio": spread(ratios, 1)})
    versions = {"torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version()}
    print(json.dumps({"machine": platform.processor() or platform.machine(), **versions, "rows": rows}, indent=1))


def spread(values: list[float], scale: float) -> str:
    """Median, lowest and highest of the rounds."""
    low, middle, high = (scale * of(values) for of in (min, statistics.median, max))
    return f"{middle:.3f} ({low:.3f} … {high:.3f}, n = {len(values)})"


if __name__ == "__main__":
    main()
