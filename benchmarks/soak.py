"""Watches a long run: memory, open files, threads and processor time a step, which must all stay flat.

    python benchmarks/soak.py --steps 200000

The run is a distillation of the bundled student on the bundled images, in batches of 2, with an average of the weights,
evaluations and checkpoints. Every so many seconds the process is looked at; the table has a line for each tenth of the
steps, with the largest of each.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = [
    "--data", "fashion-mini", "--teacher", "fashion-mini-teacher", "--student", "fashion-mini-student", "--batch", "2",
    "--ema", "0.999", "--eval-every", "20000", "--save-every", "5000", "--log-every", "100", "--val", "none",
]  # fmt: skip
TICK = os.sysconf("SC_CLK_TCK")


def look(pid: int) -> dict[str, float] | None:
    """Measures a process: resident and anonymous memory in MB, open files, threads, processor seconds."""
    place = Path(f"/proc/{pid}")
    try:
        status = dict(line.split(":", 1) for line in (place / "status").read_text().splitlines())
        times = (place / "stat").read_text().rpartition(")")[2].split()
        return {
            "rss": int(status["VmRSS"].split()[0]) / 1024,
            "anonymous": int(status["RssAnon"].split()[0]) / 1024,
            "files": len(os.listdir(place / "fd")),
            "threads": int(status["Threads"]),
            "cpu": (int(times[11]) + int(times[12])) / TICK,
        }
    except (OSError, KeyError):
        return None  # it has ended


def last_step(metrics: Path) -> int:
    """Returns the latest step that is logged."""
    try:
        with open(metrics, "rb") as file:
            file.seek(max(0, os.path.getsize(metrics) - 2000))
            lines = file.read().splitlines()
        return max((json.loads(line)["step"] for line in lines[1:] if line.endswith(b"}")), default=0)
    except OSError:
        return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--every", type=float, default=2.0, help="seconds between two looks")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "run"
        command = [
            sys.executable,
            "-m",
            "funmatch",
            "distill",
            *WORDS,
            "--steps",
            str(options.steps),
            "--out",
            str(out),
        ]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        print("| steps | RSS MB | anonymous MB | open files | threads | CPU ms a step |\n|---|---|---|---|---|---|")
        part, seen, began = 1, [], (0, 0.0)
        while process.poll() is None:
            time.sleep(options.every)
            found, step = look(process.pid), last_step(out / "metrics.jsonl")
            if found is None or not step:
                continue
            began = began if began[0] else (step, found["cpu"])
            seen.append(found)
            if step >= part * options.steps // 10 and step > began[0]:
                most = [max(each[name] for each in seen) for name in ("rss", "anonymous", "files", "threads")]
                each_step = 1000 * (found["cpu"] - began[1]) / (step - began[0])
                print(
                    f"| {step:,} | {most[0]:.0f} | {most[1]:.0f} | {most[2]} | {most[3]} | {each_step:.2f} |",
                    flush=True,
                )
                part, seen, began = part + 1, [], (step, found["cpu"])
        sys.exit(process.returncode)


if __name__ == "__main__":
    main()
