"""Measures what a search costs and finds: 12 trials × 2 executions on the bundled images.

    python benchmarks/tune.py [--steps 300] [--trials 12] [--out FOLDER]

Distils the bundled student from the bundled teacher, with random learning rate × temperature × weight decay; trial 0
has the defaults. Measured are the best trial and trial 0; the time of one worker and of two, each pinned to one core
with one thread, in wall-clock and in CPU seconds (which a busy machine disturbs less); the time outside the trials,
in a process that has already imported everything; and the final table of a search that was killed (SIGKILL) five
times at random times, compared with one that was not.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import torch

import funmatch
from funmatch.training import distill

OPTIONS: dict[str, Any] = {
    "data": "fashion-mini", "teacher": "fashion-mini-teacher", "student": "fashion-mini-student", "batch": 32,
    "threads": 1, "workers": 1,
}  # fmt: skip
SPACE = {"lr": "log:1e-3..3e-2", "temperature": "1,2,5,10", "weight_decay": "1e-5,1e-4,1e-3"}
KILLS = 5
UNLIKE = ("study", "best_run", "command", "storage", "name")


def start_worker(out: Path, options: argparse.Namespace, core: int) -> subprocess.Popen:
    """Starts a worker on a core of its own."""
    argv = [sys.executable, "-m", "funmatch", "tune", "distill", "--json", "--out", str(out)]
    for name, value in {**OPTIONS, **lengths(options), "executions": 2, "trials": options.trials}.items():
        argv += [f"--{name.replace('_', '-')}", str(value)]
    argv += ["--space", *(f"{name}={values}" for name, values in SPACE.items())]
    with open(f"{out}-{core}.log", "a") as log:
        return subprocess.Popen(
            ["taskset", "-c", str(core), *argv], stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )


def lengths(options: argparse.Namespace) -> dict[str, Any]:
    return {"steps": options.steps, "eval_every": max(1, options.steps // 5), "save_every": max(1, options.steps // 5)}


def seconds(workers: Sequence[subprocess.Popen], began: float) -> tuple[float, float]:
    """(wall-clock seconds, CPU seconds of the busiest worker) when all workers have succeeded."""
    computed = []
    for worker in workers:
        _, status, usage = os.wait4(worker.pid, 0)
        worker.returncode = os.waitstatus_to_exitcode(status)
        if worker.returncode:
            sys.exit(f"a worker ended with {worker.returncode}; see its log")
        computed.append(usage.ru_utime + usage.ru_stime)
    return time.monotonic() - began, max(computed)


def table(out: Path) -> dict[str, Any]:
    """The final table without times and paths."""
    result = json.loads((out / "result.json").read_text())
    trials = [
        {name: value for name, value in trial.items() if name not in ("seconds", "runs")} for trial in result["trials"]
    ]
    return {name: value for name, value in result.items() if name not in UNLIKE} | {"trials": trials}


def outside(out: Path, options: argparse.Namespace) -> tuple[float, float]:
    """(seconds in the trials, seconds of the whole search) in this process, which has already imported everything."""
    funmatch.tune("distill", out / "warm", space=SPACE, trials=4, **OPTIONS, steps=1)
    original, inside = distill.run, 0.0

    def timed(*args: Any) -> dict[str, Any]:
        nonlocal inside
        began = time.monotonic()
        try:
            return original(*args)
        finally:
            inside += time.monotonic() - began

    distill.run = timed  # pyrefly: ignore[bad-assignment]
    began = time.monotonic()
    funmatch.tune(
        "distill", out / "timed", space=SPACE, trials=options.trials, executions=2, **OPTIONS, **lengths(options)
    )
    total = time.monotonic() - began
    distill.run = original
    return inside, total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp(prefix="funmatch-tune-"))
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    one, one_computed = seconds([start_worker(out / "one", options, 0)], began)
    began = time.monotonic()
    two, two_computed = seconds([start_worker(out / "two", options, core) for core in (0, 1)], began)
    rng, workers, began = (
        random.Random(0),
        [start_worker(out / "killed", options, core) for core in (0, 1)],
        time.monotonic(),
    )
    for _ in range(KILLS):
        time.sleep(rng.uniform(0.05, 0.2) * two)
        core = rng.randrange(2)
        workers[core].kill()
        workers[core].wait()
        workers[core] = start_worker(out / "killed", options, core)
    killed, _ = seconds(workers, began)
    inside, total = outside(out, options)
    result = table(out / "one")
    versions = f"torch {torch.__version__}, optuna {optuna.__version__}, Python {platform.python_version()}"
    print(json.dumps({
        "machine": f"{platform.machine()}, {os.cpu_count()} cores", "versions": versions,
        "best": {name: result[name] for name in ("best", "value", "spread", "knobs", "test")},
        "defaults": {name: result["trials"][0][name] for name in ("value", "spread", "knobs")},
        "one_worker_seconds": round(one, 1), "two_workers_seconds": round(two, 1), "ratio": round(two / one, 3),
        "one_worker_cpu_seconds": round(one_computed, 1), "busier_of_two_cpu_seconds": round(two_computed, 1),
        "cpu_ratio": round(two_computed / one_computed, 3),
        "same_with_two": table(out / "two") == result,
        "killed_seconds": round(killed, 1), "same_when_killed": table(out / "killed") == result,
        "trials_seconds": round(inside, 2), "search_seconds": round(total, 2),
        "outside_percent": round(100 * (total - inside) / inside, 2),
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
