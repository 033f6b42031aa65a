"""Compares the speed of two checkouts of funmatch on the same machine: images per second, and seconds to start.

    python benchmarks/versions.py OTHER_CHECKOUT                   # all parts, five rounds
    python benchmarks/versions.py OTHER_CHECKOUT --only demo large start --rounds 7

Each round runs one after the other, in alternating order, so that a machine whose speed drifts treats both
alike. A rate is what a run itself logs (`images_per_second`), evaluations and checkpoints left out. `demo` is the
demonstration's pair at 32 pixels; `large` is BiT R101x1 to R50x1 at 128 pixels with random weights, on a few images.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
DISTIL = [
    "distill", "--data", "fashion-mini", "--device", "cpu", "--eval-every", "100000", "--save-every", "100000",
    "--workers", "1", "--precision", "fp32", "--teacher-precision", "fp32",
]  # fmt: skip
DEMO = [
    *DISTIL, "--teacher", "fashion-mini-teacher", "--student", "fashion-mini-student", "--batch", "64",
    "--steps", "200", "--log-every", "50", "--threads", "1",
]  # fmt: skip
LARGE = [
    *DISTIL, "--teacher", "resnetv2_101x1_bit", "--student", "resnetv2_50x1_bit", "--side", "128", "--batch", "16",
    "--steps", "6", "--log-every", "2", "--allow-weak-teacher", "--threads", "1",
]  # fmt: skip
STARTS = {
    "--help": ["--help"],
    "distill --help": ["distill", "--help"],
    "import funmatch": None,
    "models": ["models", "resnet10t"],
    "evaluate, bad path": ["evaluate", "no-such-folder"],
    "distill, bad option": ["distill", "--no-such-option"],
    "recipes": ["recipes", "pet37-fast"],
}


def run(checkout: Path, argv: list[str] | None, folder: Path) -> float:
    """Runs a command of a checkout; returns its seconds."""
    command = [sys.executable, *(["-c", "import funmatch"] if argv is None else ["-m", "funmatch", *argv])]
    env = os.environ | {"PYTHONPATH": str(checkout), "FUNMATCH_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    began = time.perf_counter()
    result = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, check=False)
    took = time.perf_counter() - began
    if argv and argv[0] == "distill" and "--steps" in argv and result.returncode:
        raise SystemExit(result.stderr)
    return took


def rate(checkout: Path, argv: list[str], folder: Path) -> float:
    """Images a second of a run, the mean of all its records but the first, which warms up."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        run(checkout, [*argv, "--out", f"{out}/run"], folder)
        lines = map(json.loads, Path(out, "run", "metrics.jsonl").read_text().splitlines())
        rates = [line["images_per_second"] for line in lines if line["event"] == "step"]
    return statistics.harmonic_mean(rates[1:])


def teacher_file(folder: Path) -> Path:
    """Random weights of the large teacher: the speed does not depend on them."""
    import timm
    from safetensors.torch import save_file

    path = folder / "teacher.safetensors"
    save_file(timm.create_model("resnetv2_101x1_bit", num_classes=10).state_dict(), path)
    return path


def few_images(folder: Path) -> Path:
    """A small folder of images for the large pair, which evaluates slowly; what they show does not matter."""
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (72, 96, 96, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        path = folder / "images" / ("val" if number < 8 else "train") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder / "images"


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} … {max(values):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="the checkout to compare with")
    parser.add_argument("--only", nargs="+", choices=["demo", "large", "start"], default=["demo", "large", "start"])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    other = options.other.resolve()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "a").mkdir()
        (folder / "b").mkdir()
        places = {HERE: folder / "a", other: folder / "b"}
        print("| what | here / there, median (min … max) | here | there |\n|---|---|---|---|")
        work = {"demo": DEMO, "large": LARGE}
        for part in options.only:
            if part == "large":
                LARGE[LARGE.index("fashion-mini")] = str(few_images(folder))
                LARGE.extend(["--teacher-weights", str(teacher_file(folder)), "--unlabelled"])
            if part in work:
                rows = {f"{part}, images per second": lambda at, argv=work[part]: rate(at, argv, places[at])}
            else:
                rows = {f"{n}, s": lambda at, argv=argv: run(at, argv, places[at]) for n, argv in STARTS.items()}
            for what, measure in rows.items():
                for at in places:
                    measure(at)  # fills the caches
                found: dict[Path, list[float]] = {HERE: [], other: []}
                for number in range(options.rounds):
                    for at in (HERE, other) if number % 2 == 0 else (other, HERE):
                        found[at].append(measure(at))
                ratios = [a / b for a, b in zip(found[HERE], found[other], strict=True)]
                print(f"| {what} | {spread(ratios)} | {spread(found[HERE])} | {spread(found[other])} |", flush=True)


if __name__ == "__main__":
    main()
