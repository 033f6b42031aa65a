"""Compares the estimate of `funmatch plan` with the actual run, and measures where the run's time goes.

    python benchmarks/forecast.py [--rounds 5] [--only embedded small large]

Each round alternates plan and run, each in a process of its own, for three distillations: the bundled images on one
thread, ResNet-50 into ResNet-18 at 96 px, and R101x1 into R50x1 at 128 px as in `versus_timm.py` (in bf16). The run
profiles itself (`--profile`); the share of a step outside teacher, student, backward pass and optimizer is reported
too.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import timm
import torch
from versus_timm import make_images, network  # pyrefly: ignore[missing-import]

NETWORKS = {"teacher", "student", "backward", "optimizer"}


def command_lines(folder: Path) -> dict[str, list[str]]:
    """The command line of each run."""
    photos = ["--data", f"{folder}/images", "--val", "none", "--unlabelled", "--allow-weak-teacher"]
    photos += ["--log-every", "5"]
    return {
        "embedded": [
            "--data", "fashion-mini", "--teacher", "fashion-mini-teacher", "--student", "fashion-mini-student",
            "--threads", "1", "--steps", "1500", "--batch", "64",
        ],
        "small": [
            *photos, "--teacher", "resnet50", "--teacher-weights", f"{folder}/resnet50.pt", "--student", "resnet18",
            "--side", "96", "--batch", "16", "--steps", "250", "--eval-every", "100", "--save-every", "100",
        ],
        "large": [
            *photos, "--teacher", "resnetv2_101x1_bit", "--teacher-weights", f"{folder}/resnetv2_101x1_bit.pt",
            "--student", "resnetv2_50x1_bit", "--side", "128", "--batch", "32", "--steps", "40", "--eval-every", "40",
            "--save-every", "40", "--precision", "bf16",
        ],
    }  # fmt: skip


def run_json(*argv: str) -> dict:
    """Run `funmatch …` in a process of its own and return its JSON output."""
    done = subprocess.run([sys.executable, "-m", "funmatch", *argv, "--json"], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=["embedded", "small", "large"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["FUNMATCH_CACHE"] = str(folder / "cache")
        make_images(folder / "images", 256)
        for name in ("resnet50", "resnetv2_101x1_bit"):
            torch.save(network(name, 0).state_dict(), folder / f"{name}.pt")
        found: dict[str, list[tuple[float, float, float]]] = {}
        for name, argv in command_lines(folder).items():
            if options.only and name not in options.only:
                continue
            for number in range(options.rounds + 1):  # the first round fills caches and is not counted
                out = folder / "run"
                planned = run_json("plan", "distill", *argv, "--out", str(out))["seconds"]
                began = time.monotonic()
                run_json("distill", *argv, "--profile", "--out", str(out))
                seconds = time.monotonic() - began
                profile = json.loads((out / "profile.json").read_text())
                parts = profile["parts_ms"]
                outside = 1 - sum(ms for part, ms in parts.items() if part in NETWORKS) / profile["step_ms"]
                shutil.rmtree(out)
                if number:
                    found.setdefault(name, []).append((planned, seconds, outside))
                    print(f"{name} {number}: planned {planned:.1f} s, taken {seconds:.1f} s; {parts}", flush=True)
    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    print(f"\n{machine}, torch {torch.__version__}, timm {timm.__version__}\n")
    print("| run | planned, s | taken, s | planned / taken (least … most) | outside the networks, % of a step |")
    print("|---|---:|---:|---|---|")
    for name, turns in found.items():
        planned, seconds, outside = zip(*turns, strict=True)
        ratios = [a / b for a, b in zip(planned, seconds, strict=True)]
        print(
            f"| {name} | {statistics.median(planned):.1f} | {statistics.median(seconds):.1f} | {spread(ratios)} | "
            f"{spread([100 * each for each in outside])} |"
        )


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} … {max(values):.2f})"


if __name__ == "__main__":
    main()
