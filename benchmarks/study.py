"""Measures a study of 27 short runs with one run at a time and with two, and after kills.

    python benchmarks/study.py [--steps 300] [--rounds 3] [--kills 4]

The bundled consistency study with three seeds, each run shortened to `--steps`. Rounds alternate. Then one study is
killed (-9) at random times and restarted until it ends: its metrics must be those of an uninterrupted one, and no
finished run may be repeated.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def study_command(out: Path, steps: int, jobs: int) -> list[str]:
    options = ["--set", f"steps={steps}", "--jobs", str(jobs), "--out", str(out)]
    return [sys.executable, "-m", "funmatch", "study", "consistency", *options]


def seconds(out: Path, steps: int, jobs: int) -> float:
    began = time.monotonic()
    subprocess.run(study_command(out, steps, jobs), check=True, capture_output=True)
    return time.monotonic() - began


def comparable_results(out: Path) -> list[dict]:
    """The results of a study's runs, without times."""
    found = []
    for line in (out / "results.jsonl").read_text().splitlines():
        result = json.loads(line)
        metrics = {name: value for name, value in result["figures"].items() if name != "seconds"}
        found.append({"place": result["place"], "figures": metrics, "eval": result["curves"]["eval"]})
    return found


def repeated_after_kills(out: Path, steps: int, kills: int, typical: float) -> int:
    """Runs a study with kills; returns how many finished runs were repeated."""
    rng, repeated = random.Random(0), 0
    for number in range(kills + 1):
        before = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/result.json")}
        process = subprocess.Popen(study_command(out, steps, 2), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if number < kills:
            time.sleep(rng.uniform(0.1, 0.9) * typical / kills)
            process.send_signal(signal.SIGKILL)
        process.wait()
        repeated += sum(path.stat().st_mtime_ns != stamp for path, stamp in before.items())
    return repeated


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kills", type=int, default=4)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["FUNMATCH_CACHE"] = str(folder / "cache")
        seconds(folder / "warm", 2, 2)  # fills the cache: decoded images and logits of fixed teachers
        pairs = [
            (seconds(folder / f"one-{n}", options.steps, 1), seconds(folder / f"two-{n}", options.steps, 2))
            for n in range(options.rounds)
        ]
        ratios = [two / one for one, two in pairs]
        repeated = repeated_after_kills(folder / "killed", options.steps, options.kills, pairs[0][1])
        same = comparable_results(folder / "killed") == comparable_results(folder / "two-0")
    print(f"27 runs of {options.steps} steps: {statistics.median(one for one, _ in pairs):.0f} s one at a time,")
    print(f"{statistics.median(two for _, two in pairs):.0f} s two at a time: {statistics.median(ratios):.2f} ", end="")
    print(f"({min(ratios):.2f} … {max(ratios):.2f}) of it")
    print(f"after {options.kills} kills: {repeated} finished runs repeated, metrics {'equal' if same else 'DIFFERENT'}")


if __name__ == "__main__":
    main()
