"""Seconds from Enter to the first training step of `funmatch distill`, of two checkouts on the same machine.

    python benchmarks/startup.py OTHER_CHECKOUT [--rounds 5] [--first 1] [--only help ...] [--out FILE]

Each start is a process of its own, from its beginning until the record of the first step is on the disk; then it is
killed. "again" starts find images decoded, kernels built, forms chosen and the teacher's validation images predicted,
as further runs with a teacher and its images do; "first" ones find an empty cache folder. A round has each checkout
once, in alternating order; ratios are within rounds. Teachers have random weights, and runs 2,000 steps of 8 images, so
that the first step takes next to nothing.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from pairs import machine, make_images  # pyrefly: ignore[missing-import]
from versus_timm import network  # pyrefly: ignore[missing-import]

HERE = Path(__file__).resolve().parent.parent
PAIRS = (
    "mobilenetv3_large_100:mobilenetv3_small_100:64",
    "resnetv2_50x1_bit:resnet18:128",
    "vit_small_patch16_224:vit_tiny_patch16_224:224",
)
"""Teacher, student and side."""
IMAGES = 320


def environment(checkout: Path, cache: Path) -> dict[str, str]:
    """Returns the variables of a process of a checkout, with Python's bytecode kept as users have it."""
    variables = {"PYTHONPATH": str(checkout), "FUNMATCH_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"} | variables


def seconds_of(checkout: Path, cache: Path, words: list[str]) -> float:
    """Returns the seconds of a command that ends by itself."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "funmatch", *words]
    subprocess.run(command, env=environment(checkout, cache), cwd=cache.parent, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def seconds_to_step(checkout: Path, cache: Path, pair: str, folder: Path) -> float:
    """Returns the seconds until a run has recorded its first step."""
    teacher, student, side = pair.split(":")
    argv = [
        *("distill", "--data", folder / "images", "--teacher", teacher, "--student", student, "--side", side),
        *("--teacher-weights", folder / f"{teacher}.safetensors", "--allow-weak-teacher", "--unlabelled"),
        *("--val", "none", "--batch", "8", "--steps", "2000", "--log-every", "1", "--out", folder / "run"),
    ]
    shutil.rmtree(folder / "run", ignore_errors=True)
    metrics, log = folder / "run" / "metrics.jsonl", folder / "log.txt"
    began = time.perf_counter()
    with log.open("w") as file:
        command = [sys.executable, "-m", "funmatch", *map(str, argv)]
        process = subprocess.Popen(command, env=environment(checkout, cache), cwd=folder, stdout=file, stderr=file)
        while not (metrics.is_file() and '"event": "step"' in metrics.read_text()):
            if process.poll() is not None:
                sys.exit(log.read_text())
            time.sleep(0.002)
        took = time.perf_counter() - began
        process.kill()
        process.wait()
    return took


def write_teacher(name: str, side: int, folder: Path) -> None:
    """Writes random weights of a teacher."""
    from safetensors.torch import save_file

    path = folder / f"{name}.safetensors"
    if not path.is_file():
        save_file(network(name, 0, side).state_dict(), path)


def measure(checkouts: tuple[Path, Path], rounds: int, seconds: Callable[[Path], float]) -> list[tuple[float, float]]:
    """Returns the seconds of both checkouts in each round."""
    found = []
    for number in range(rounds):
        order = checkouts if number % 2 == 0 else checkouts[::-1]
        took = {at: seconds(at) for at in order}
        found.append((took[checkouts[0]], took[checkouts[1]]))
    return found


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} … {max(values):.2f})"


def row(what: str, found: list[tuple[float, float]]) -> str:
    """Returns a row of the table."""
    here, there = map(list, zip(*found, strict=True))
    return f"| {what} | {spread([a / b for a, b in found])} | {spread(here)} | {spread(there)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="the checkout to compare with")
    parser.add_argument("--checkout", type=Path, default=HERE, help="the checkout that is compared")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--first", type=int, default=1, help="rounds with an empty cache folder")
    parser.add_argument("--only", nargs="+", default=["help", *PAIRS], help="help, and teacher:student:side")
    parser.add_argument("--folder", type=Path, help="folder of images, teachers and caches that stays")
    parser.add_argument("--out", type=Path, help="file of the table")
    options = parser.parse_args()
    checkouts = (options.checkout.resolve(), options.other.resolve())
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if not (folder / "images").is_dir():
            make_images(folder / "images", IMAGES)
        caches = {checkouts[0]: folder / "cache-here", checkouts[1]: folder / "cache-there"}
        lines = [
            machine(),
            "",
            "| start | here / there, median (min … max) | here, s | there, s |",
            "|---|---|---|---|",
        ]

        def add(what: str, rounds: int, seconds: Callable[[Path], float]) -> None:
            if rounds:
                lines.append(row(what, measure(checkouts, rounds, seconds)))
                print(lines[-1], flush=True)
                if options.out:
                    options.out.write_text("\n".join([*lines, ""]))

        for name in options.only:
            if name == "help":
                measure(checkouts, 1, lambda at: seconds_of(at, caches[at], ["--help"]))  # writes bytecode
                add("`--help`", options.rounds, lambda at: seconds_of(at, caches[at], ["--help"]))
                continue
            write_teacher(name.split(":")[0], int(name.split(":")[2]), folder)

            def first(at: Path, pair: str = name) -> float:
                shutil.rmtree(caches[at], ignore_errors=True)
                return seconds_to_step(at, caches[at], pair, folder)

            measure(checkouts, 1, lambda at, pair=name: seconds_to_step(at, caches[at], pair, folder))
            add(f"{name}, again", options.rounds, lambda at, pair=name: seconds_to_step(at, caches[at], pair, folder))
            add(f"{name}, first", options.first, first)


if __name__ == "__main__":
    main()
