"""Measures how soon a run that was killed trains again, and how much faster two processes train than one.

    python benchmarks/resuming.py [--rounds 3] [--only demo big processes teacher]

"demo" are the embedded images, teacher and student, "big" is R101x3 to R50x1 at 128 px with batch 2 on prepared images:
each run is killed (SIGKILL) once it has saved and trained on, and started again. Seconds count from the process's
beginning until the first step after the checkpoint is recorded on the disk; the step after it says how much of that is
the step itself. "processes" compares images a second of R101x1 to ResNet-18 at 128 px, batch 64, in one process of one
thread and in two, in alternating order; "teacher" those of R101x3 to R50x1, whose teacher takes most of the step.
Networks have random weights, so the second pair's teacher is told its precision.
"""

import argparse
import json
import os
import shutil
import signal
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
COMMON = ["--log-every", "1", "--eval-every", "100000", "--steps", "1000"]
DEMO = ["--data", "fashion-mini", "--teacher", "fashion-mini-teacher", "--student", "fashion-mini-student"]
SHARED = {
    "processes": ("resnetv2_101x1_bit", "resnet18", 64, []),
    "teacher": ("resnetv2_101x3_bit", "resnetv2_50x1_bit", 64, ["--teacher-precision", "bf16"]),
}
"""Teacher, student, batch and further words of the runs that are shared by processes."""
SKIPPED = 5
"""Steps at the beginning of a run that do not count towards its speed."""
COUNTED = 8
IMAGES = 64


def pair(folder: Path, teacher: str, student: str, batch: int) -> list[str]:
    """Returns the words about two networks at 128 px; writes the teacher's weights, which are random."""
    from safetensors.torch import save_file

    weights = folder / f"{teacher}.safetensors"
    if not weights.is_file():
        save_file(network(teacher, 0).state_dict(), weights)
    return [
        *("--data", str(folder / "images"), "--teacher", teacher, "--teacher-weights", str(weights)),
        *("--student", student, "--side", "128", "--batch", str(batch)),
        *("--allow-weak-teacher", "--unlabelled", "--val", "none"),
    ]


def steps(out: Path) -> list[dict]:
    """Returns the records of steps of a run, as far as they are on the disk."""
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    events = [json.loads(line) for line in lines if line.endswith("\n")]
    return [event for event in events if event["event"] == "step"]


def train_until(
    words: list[str], out: Path, done: Callable[[list[dict]], object], processes: int | None = None
) -> float:
    """Trains until `done` says so of the records of steps, then kills the run; returns its seconds.

    Args:
        processes: of one thread each, started by torchrun; None for one that uses all cores.
    """
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"] if processes else []
    command = [sys.executable, "-m", *launcher, "funmatch", "distill", *words, *COMMON]
    env = (
        os.environ | {"PYTHONPATH": str(HERE), "HF_HUB_OFFLINE": "1"} | ({"OMP_NUM_THREADS": "1"} if processes else {})
    )
    began = time.perf_counter()
    with (out.parent / "log.txt").open("w") as log:
        process = subprocess.Popen([*command, "--out", str(out)], env=env, stdout=log, stderr=log)
        while not done(steps(out)):
            if process.poll() is not None:
                sys.exit((out.parent / "log.txt").read_text())
            time.sleep(0.005)
        took = time.perf_counter() - began
        # torchrun passes SIGTERM on to its processes, but SIGKILL leaves them behind.
        process.send_signal(signal.SIGTERM if processes else signal.SIGKILL)
        process.wait()
    return took


def resume(words: list[str], folder: Path) -> tuple[float, float]:
    """Kills a run after a checkpoint; returns the seconds of the next start until its first step, and of a step."""
    out, every = folder / "run", [*words, "--save-every", "3"]
    shutil.rmtree(out, ignore_errors=True)
    train_until(every, out, lambda _: any(out.glob("checkpoints/step-*/state.json")))
    saved = max(int(path.name.split("-")[1]) for path in out.glob("checkpoints/step-*"))
    # As the next start does, so that what it adds can be told from what was there.
    lines = [line for line in (out / "metrics.jsonl").read_text().splitlines() if json.loads(line)["step"] <= saved]
    (out / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    took = train_until(every, out, lambda done: done[-1:] and done[-1]["step"] > saved)
    return took, int(words[words.index("--batch") + 1]) / steps(out)[1]["images_per_second"]


def speed(words: list[str], folder: Path, processes: int) -> float:
    """Returns the images a second that a new run trains."""
    out = folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    train_until(words, out, lambda done: len(done) >= SKIPPED + COUNTED, processes)
    return statistics.median(each["images_per_second"] for each in steps(out)[SKIPPED:])


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} … {max(values):.2f})"


def measure(what: str, rounds: int, folder: Path) -> str:
    """Returns a row of the table."""
    if what in SHARED:
        teacher, student, batch, further = SHARED[what]
        words, found = [*pair(folder, teacher, student, batch), *further], []
        for number in range(rounds):
            order = (1, 2) if number % 2 else (2, 1)
            found.append({processes: speed(words, folder, processes) for processes in order})
        one, two = ([each[processes] for each in found] for processes in (1, 2))
        ratios = spread([b / a for a, b in zip(one, two, strict=True)])
        return f"| two processes / one, {teacher} → {student} | {ratios} | images/s: {spread(one)}, {spread(two)} |"
    big = ("resnetv2_101x3_bit", "resnetv2_50x1_bit", 2)
    words = [*DEMO, "--batch", "64"] if what == "demo" else pair(folder, *big)
    took, step = zip(*(resume(words, folder) for _ in range(rounds)), strict=True)
    return f"| first step after a resume, {what} | {spread([*took])} s | of these a step: {spread([*step])} s |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=["demo", "big", *SHARED])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder) / "images", IMAGES)
        print(f"{machine()}\n\n| what | median (lowest … highest) | |\n|---|---|---|", flush=True)
        for what in options.only:
            print(measure(what, options.rounds, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
