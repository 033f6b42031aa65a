"""Measures how long it takes until a mistake is answered, and prints what the answer is.

    python benchmarks/mistakes.py                  # five rounds
    python benchmarks/mistakes.py --rounds 1 --only device

Every mistake is a command in a process of its own, as a person types it, with small images in a temporary folder. Each
must end with exit code 2 and without a traceback. The first round is not counted: it fills the caches of names, of
images and of the file system. Mistakes are in two groups: those that neither PyTorch nor the images are needed to find,
which must be answered within a second, and those that depend on them.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent.parent
TARGET = 1.0
"""Seconds in which a mistake is to be answered that needs neither PyTorch nor images: the median over such mistakes."""
DATA, SIZES, END = "--data images", "--side 32 --batch 16", "--steps 4 --out runs/new"
TEACHER, STUDENT = "--teacher runs/teacher", "--student resnet10t"
RUN = f"distill {DATA} {TEACHER} {STUDENT} {SIZES}"
STARTED = (
    "distill --data images --teacher runs/teacher --student resnet10t --side 32 --batch 16 --steps 4 --out runs/done"
)

EARLY = {
    "wrong path of images": f"distill --data nopics {TEACHER} {STUDENT} {END}",
    "wrong path of weights": f"{RUN} {END} --student-weights nope.safetensors",
    "misspelt option": f"{RUN} {END} --teacher-weight t.safetensors",
    "several values of a number": f"{RUN} {END} --lr 3e-3,1e-3",
    "no number": f"{RUN} {END} --lr abc",
    "unknown choice": f"{RUN} {END} --schedule cosin",
    "empty folder of images": f"distill --data empty {TEACHER} {STUDENT} {END}",
    "image size 0": f"{RUN} {END} --side 0",
    "unknown model": f"distill {DATA} {TEACHER} --student resnet81 {END}",
    "name of the Hub without hf-hub:": f"distill {DATA} --teacher google/vit-base-patch16-224 {STUDENT} {END}",
    "other options on resume": f"{STARTED} --lr 0.1 --temperature 2",
    "more steps on resume": f"{STARTED} --steps 400",
    "another command on resume": f"train {DATA} {STUDENT} {SIZES} --steps 4 --out runs/done",
    "out is another folder": f"{RUN} --steps 4 --out unrelated",
    "out cannot be written": f"{RUN} --steps 4 --out /proc/run",
    "out is below a file": f"{RUN} --steps 4 --out text.pt/run",
    "device gpu": f"{RUN} {END} --device gpu",
    "text file as weights": f"{RUN} {END} --student-weights text.pt",
    "weights of the model as those of a teacher": f"evaluate resnet10t --teacher-weights text.pt {DATA}",
    "contradictions": f"{RUN} {END} --epochs 2 --tape-top 2 --decay-steps 2 --cooldown-steps 2 --mixup -1",
    "no length": f"{RUN} --out runs/new",
    "unknown short options": "distill -d images -t runs/teacher -s resnet10t -o runs/new",
    "command of another tool": "validate runs/done",
    "option of another tool": f"{RUN} {END} --wandb",
    "option before the command": f"{DATA} {TEACHER}",
    "file of options is missing": "distill --config x.yaml",
}
LATE = {
    "other number of classes": f"distill --data five {TEACHER} {STUDENT} {SIZES} {END}",
    "one class only": f"train --data one {STUDENT} {SIZES} {END}",
    "labels are absent": f"train --data unlabelled {STUDENT} {SIZES} {END}",
    "weight of labels that are absent": (
        f"distill --data unlabelled {TEACHER} {STUDENT} {SIZES} {END} --label-weight 0.5"
    ),
    "GPU is absent": f"{RUN} {END} --device cuda",
    "weights of another network": (
        f"train {DATA} --student resnet18 --student-weights runs/teacher/student/model.safetensors {SIZES} {END}"
    ),
    "no network": f"evaluate resnet10t.c3_in1k {DATA}",
    "unknown split": "evaluate runs/done --split nowhere",
}


def make_inputs(folder: Path) -> None:
    """Makes the images and files that the mistakes are about."""
    rng = np.random.default_rng(0)
    for name, splits, classes in (
        ("images", ("train", "val"), 3),
        ("five", ("train", "val"), 5),
        ("one", ("train",), 1),
    ):
        for place in (folder / name / split / f"class{k}" for split in splits for k in range(classes)):
            place.mkdir(parents=True)
            _save_images(place, rng)
    (folder / "unlabelled").mkdir()
    _save_images(folder / "unlabelled", rng)
    (folder / "empty").mkdir()
    (folder / "unrelated").mkdir()
    (folder / "unrelated" / "letter.txt").write_text("mine")
    (folder / "text.pt").write_text("not found")


def _save_images(place: Path, rng: np.random.Generator) -> None:
    for i in range(10):
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(place / f"{i}.jpg")


def run(words: str, folder: Path) -> tuple[float, subprocess.CompletedProcess[str]]:
    """Runs a command of this checkout; returns its seconds and how it ended."""
    command = [sys.executable, "-m", "funmatch", *words.split()]
    env = os.environ | {"PYTHONPATH": str(HERE), "FUNMATCH_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    began = time.perf_counter()
    result = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, check=False)
    return time.perf_counter() - began, result


def measure(mistakes: dict[str, str], rounds: int, folder: Path) -> Iterator[tuple[str, float]]:
    """Yields a row of the table for each mistake, and its median seconds; one more round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in mistakes}
    answers = {}
    for number in range(rounds + 1):
        for name, words in mistakes.items():
            took, result = run(words, folder)
            if result.returncode != 2 or "Traceback" in result.stderr:
                raise SystemExit(f"{name}: exit code {result.returncode}, expected 2\n{result.stderr}")
            seconds[name] += [took] if number else []
            answers[name] = next(line for line in result.stderr.splitlines() if line.startswith("funmatch: "))
    for name, each in seconds.items():
        answer = answers[name].removeprefix("funmatch: ").replace("|", "\\|").replace(str(folder), "…")
        span = f"{statistics.median(each):.2f} ({min(each):.2f} … {max(each):.2f})"
        yield f"| {name} | 2 | {span} | {answer} |", statistics.median(each)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures the seconds until a mistake is answered.")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (default: 5)")
    parser.add_argument("--only", default="", help="mistakes whose name holds this text")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder)
        train = f"train {DATA} {STUDENT} {SIZES} --steps 4 --out runs/teacher"
        for words in (train, f"{STARTED} --allow-weak-teacher"):
            if (made := run(words, folder)[1]).returncode:
                raise SystemExit(made.stderr)
        every: list[float] = []
        for title, group in (("Neither PyTorch nor images are needed", EARLY), ("PyTorch or images are needed", LATE)):
            chosen = {name: words for name, words in group.items() if options.only in name}
            if not chosen:
                continue
            print(f"## {title}\n\n| mistake | exit code | seconds | first line of the answer |\n|---|---|---|---|")
            medians = []
            for row, median in measure(chosen, options.rounds, folder):
                print(row, flush=True)
                medians.append(median)
            target = f" (target: at most {TARGET} s)" if group is EARLY else ""
            print(f"\nMedian of these {len(chosen)}: {statistics.median(medians):.2f} s{target}\n", flush=True)
            every += medians
        print(f"Median of all {len(every)}: {statistics.median(every):.2f} s")


if __name__ == "__main__":
    main()
