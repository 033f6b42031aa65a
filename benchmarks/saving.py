"""Measures what saving costs: the share of a run's time that goes into checkpoints, checksums included.

    python benchmarks/saving.py --rounds 3

For each network: seconds of a training step (forward, backward, update; without the teacher, so the share is an upper
limit), of the snapshot for which training waits, of the write in the background, and of its checksums alone. The share
is that of snapshot and write, as if training waited for both, at the default interval of 500 steps.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from funmatch.models.load import load
from funmatch.runtime import transfers
from funmatch.runtime.disk.checksums import write_manifest
from funmatch.training.run import checkpoint
from funmatch.training.run.intervals import SAVE_CAP
from funmatch.training.run.state import TrainState

NETWORKS = {"demo's student": ("fashion-mini-student", 32, 64), "BiT-R50x1": ("resnetv2_50x1_bit", 128, 8)}
"""Name, image size and batch of each."""


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(name: str, side: int, batch: int) -> dict[str, float]:
    """Measures one round; returns seconds, and the size of a checkpoint in MB."""
    student = load(name, classes=10, pretrained=False).train()
    optimizer = torch.optim.AdamW(student.parameters(), 1e-4)
    views = torch.rand(batch, 3, side, side)

    def step() -> None:
        student(views).logsumexp(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    found = {"step": statistics.median(timed(step) for _ in range(5))}
    with tempfile.TemporaryDirectory() as place:
        tensors = {}
        found["snapshot"] = timed(
            lambda: tensors.update(transfers.snapshot(checkpoint.tensors_of(student.net, optimizer)))
        )
        found["write"] = timed(lambda: checkpoint.save(Path(place), tensors, TrainState(step=1)))
        saved = next(Path(place).glob("step-*"))
        found["checksums"] = timed(lambda: write_manifest(saved))
        found["MB"] = sum(path.stat().st_size for path in saved.iterdir()) / 1e6
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print("| network | batch | checkpoint MB | step s | snapshot s | write s | checksums s | share |\n|" + "---|" * 8)
    for name, (model, side, batch) in NETWORKS.items():
        rounds = [measure(model, side, batch) for _ in range(options.rounds)]
        shares = [100 * (each["snapshot"] + each["write"]) / (SAVE_CAP * each["step"]) for each in rounds]
        middle = {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
        seconds = " | ".join(f"{middle[key]:.4f}" for key in ("step", "snapshot", "write", "checksums"))
        share = f"{statistics.median(shares):.2f} % ({min(shares):.2f} … {max(shares):.2f})"
        print(f"| {name} at {side} px | {batch} | {middle['MB']:.1f} | {seconds} | {share} |", flush=True)


if __name__ == "__main__":
    main()
