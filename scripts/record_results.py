"""Records the results of short, real commands run from a checkout, and compares two such records.

    python scripts/record_results.py --checkout PATH --out old.json [--only NAME ...] [--jobs 2]
    python scripts/record_results.py --compare old.json new.json [--only NAME ...]

Use it around a change that must not change any result. Every command runs in a process of its own, on the CPU with one
thread, with the `funmatch` package of the given checkout and a fresh cache. The record holds metrics and losses as they
were written, and the SHA-256 of every student, newest checkpoint, tape and shard, by its path below the case's folder.
Comparing prints a table and exits with 1 on any difference. Both records must come from the same machine and the same
versions of torch and timm, since neither promises equal bits elsewhere.
"""

import argparse
import fnmatch
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

LOOP = "--batch 8 --threads 1 --log-every 4 --eval-every 6 --save-every 6"
MINI = f"--data fashion-mini {LOOP}"
STUDENT = "--student fashion-mini-student"
TEACHER = "--teacher fashion-mini-teacher"
DISTILL = f"distill {MINI} {TEACHER} {STUDENT}"
SMALL_BIT = "--student resnetv2_50x1_bit --student-kwargs channels=128,256,512,512"
LONG = f"distill --data fashion-mini {TEACHER} {STUDENT} --batch 16 --threads 1 --log-every 5 --eval-every 40"

TWICE, STOPPED = "2x ", "stopped "
"""Prefixes of commands: run by two processes; ended by SIGTERM as soon as there is a checkpoint."""

CASES: dict[str, tuple[str, ...]] = {
    "fix-rs": (f"{DISTILL} --steps 12 --strategy fix/rs --out run",),
    "fix-cc": (f"{DISTILL} --steps 12 --strategy fix/cc --out run",),
    "fix-ic-ens": (f"{DISTILL} --steps 12 --strategy fix/ic_ens --teacher-crops 4 --out run",),
    "ind-rc": (f"{DISTILL} --steps 12 --strategy ind/rc --out run",),
    "ind-ic": (f"{DISTILL} --steps 12 --strategy ind/ic --out run",),
    "same-rc": (f"{DISTILL} --steps 12 --strategy same/rc --out run",),
    "same-ic": (f"{DISTILL} --steps 12 --strategy same/ic --out run",),
    "funmatch": (f"{DISTILL} --steps 30 --seed 3 --out run",),
    "tape": (
        f"{DISTILL} --steps 12 --tape tape --out recorded",
        f"{DISTILL} --steps 12 --tape tape --out replayed",
        f"{DISTILL} --steps 16 --tape tape --lr 1e-2 --temperature 2 --out longer",
    ),
    "tape-top": (
        f"{DISTILL} --steps 8 --tape tape --tape-top 3 --out recorded",
        f"{DISTILL} --steps 8 --tape tape --tape-top 3 --optimizer lamb --out replayed",
    ),
    "several": (f"{DISTILL} --student test_resnet --side 32 --steps 10 --out runs",),
    "wsd": (
        f"{DISTILL} --schedule wsd --cooldown-steps 6 --ema 0.9 --steps 20 --out run",
        f"{DISTILL} --schedule wsd --cooldown-steps 9 --ema 0.9 --steps 34 --out run",
    ),
    "finetune": (
        f"finetune {MINI} --model fashion-mini-teacher --side 32 --steps 12 --warmup-steps 3 --out run",
        f"finetune {MINI} --model run --side 32 --steps 12 --freeze-until layer4 --optimizer adamw --out again",
    ),
    "train": (f"train {MINI} {STUDENT} --steps 16 --label-smoothing 0.1 --schedule linear --out run",),
    "tune": (f"tune {DISTILL} --steps 6 --space lr=log:1e-4..1e-1 --space temperature=1,2 --trials 3 --out tuned",),
    "tune-tpe": (
        f"tune train {MINI} {STUDENT} --steps 4 --space lr=log:1e-4..1e-1 --trials 3 --sampler tpe --executions 2"
        " --out search",
    ),
    "study": ("study ../inputs/tiny.toml --jobs 1 --out study",),
    "tfrecord": (
        "prepare ../inputs/labelled --to tfrecord --shard-size 6 --out shards",
        f"train --data tfrecord:shards {LOOP} {STUDENT} --steps 8 --out run",
    ),
    "webdataset": (f"distill --data wds:../inputs/some.tar {LOOP} {TEACHER} {STUDENT} --steps 8 --out run",),
    "folder-cut": (
        f"distill --data ../inputs/flat {LOOP} {TEACHER} {STUDENT} --val 25% --decoder pillow --steps 8 --out run",
    ),
    "streaming": (f"{DISTILL} --steps 12 --pixels streaming --out run",),
    "two-processes": (f"{TWICE}{DISTILL} --steps 12 --ema 0.9 --out run",),
    "ema-pieces": (f"{DISTILL} --steps 12 --ema 0.9 --micro-batch 3 --grad-checkpointing --out run",),
    "adamw": (f"{DISTILL} --steps 12 --optimizer-kwargs eps=1e-6 --momentum-dtype bf16 --out run",),
    "sgd": (f"{DISTILL} --steps 12 --optimizer sgd --momentum 0.8 --lr 0.1 --schedule staircase"
            " --decay-steps 6 9 --out run",),
    "shampoo": (f"{DISTILL} --steps 12 --optimizer shampoo --lr 0.1 --schedule quadratic --optimizer-kwargs"
                " block_size=16 start_preconditioning_step=2 --out run",),
    "muon": (f"{DISTILL} --steps 8 --optimizer muon --lr 0.01 --out run",),
    "cutmix-randaugment": (f"{DISTILL} --steps 12 --cutmix 1 --randaugment 2 9 --mixup-mode image --out run",),
    "label-weight": (f"{DISTILL} --steps 12 --label-weight 0.3 --label-smoothing 0.1 --teacher-ahead --out run",),
    "distances": (
        f"{DISTILL} --steps 6 --distance dist --temperature 2 --out dist",
        f"{DISTILL} --steps 6 --distance js --standardise --no-t-squared --out js",
        f"{DISTILL} --steps 6 --distance log-softmax-l2 --out l2",
    ),
    "teachers": (
        f"distill {MINI} {TEACHER} --teacher ../inputs/teacher --teacher-side 32 28 --combine mean-probabilities"
        f" --teacher-share 2 1 {STUDENT} --steps 8 --allow-weak-teacher --out run",
    ),
    "dropout-best": (f"{DISTILL} --steps 18 --drop-rate 0.2 --drop-path 0.1 --keep best --patience 2 --out run",),
    "resumed": (
        f"{STOPPED}{LONG} --steps 120 --save-every 20 --out run",
        f"{LONG} --steps 120 --save-every 20 --out run",
    ),
    "several-resumed": (
        f"{STOPPED}{LONG} --student test_resnet --side 32 --steps 60 --save-every 10 --out runs",
        f"{LONG} --student test_resnet --side 32 --steps 60 --save-every 10 --out runs",
    ),
    "bf16": (f"{DISTILL} --steps 8 --precision bf16 --teacher-precision bf16 --out run",),
    "own-kernels": (
        f"train --data ../inputs/large {SMALL_BIT} --side 64 --batch 4 --threads 1 --steps 4 --compile native"
        " --precision fp32 --log-every 1 --out run",
    ),
    "evaluate": (
        f"{DISTILL} --steps 8 --ema 0.9 --out run",
        "evaluate run --split val --json",
        "evaluate fashion-mini-teacher --data fashion-mini --json",
    ),
    "import": (
        "import fashion-mini-teacher --out net --json",
        f"distill {MINI} --teacher local-dir:net {STUDENT} --steps 8 --out run",
    ),
}  # fmt: skip
"""Command lines of `python -m funmatch` by case, run in turn in a folder of the case's own."""

STUDY = """
title = "Tiny"
question = "Does it work?"
seeds = [0]
common = { data = "fashion-mini", teacher = "fashion-mini-teacher", student = "fashion-mini-student", steps = 6, \
batch = 8, threads = 1, log_every = 2, eval_every = 3 }
run = [{ name = "labels", verb = "train" }, { name = "from labels", student = "run:labels" }, \
{ name = "T = {temperature}", each = { temperature = [2.0] } }]
figure = [{ kind = "ends", value = "top1" }]
"""
METRICS = ("top1", "top5", "agreement", "kl", "loss", "step", "best_step", "teacher_top1")
EVENTS = ("step", "eval", "ema", "views", "teacher")
HASHED = ("model.safetensors", "answers.bin", "*.tfrec*")


def paint(path: Path, seed: int, width: int, height: int) -> None:
    """Writes an image of coloured blocks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC).save(path)


def write_inputs(folder: Path) -> None:
    """Writes the images, the tar file and the study that commands name by `../inputs`."""
    for s, (split, count) in enumerate((("train", 5), ("val", 3), ("test", 4))):
        for c, name in enumerate(("ant", "bee", "cat")):
            for i in range(count):
                seed = 100 * s + 10 * c + i
                paint(folder / "labelled" / split / name / f"{i}.{('png', 'webp')[i % 2]}", seed, 24 + i, 20 + c)
                paint(folder / "large" / split / name / f"{i}.png", seed, 90 + i, 80 + c)
    for i in range(24):
        paint(folder / "flat" / f"{i:02}.{('jpg', 'png')[i % 2]}", 1000 + i, 40 + i, 36)
    with tarfile.open(folder / "some.tar", "w") as tar:
        for path in sorted((folder / "flat").glob("*.png")):
            tar.add(path, path.name)
    (folder / "tiny.toml").write_text(STUDY)


def start(words: list[str], checkout: Path, folder: Path, work: Path) -> subprocess.Popen:
    """Starts `python words…` in a folder, with the checkout's package and its own cache."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("FUNMATCH")}
    env |= {"PYTHONPATH": str(checkout), "FUNMATCH_CACHE": str(work / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
    env |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, *words], cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def stop_once_saved(process: subprocess.Popen, folder: Path) -> None:
    """Sends SIGTERM as soon as the first checkpoint lies in the folder."""
    until = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < until:
        if any(folder.rglob("checkpoints/step-*/state.json")):
            process.send_signal(signal.SIGTERM)
            return
        time.sleep(0.01)


def run_command(command: str, checkout: Path, folder: Path, work: Path) -> tuple[float, str]:
    """Runs one command line of a case; returns its seconds and its standard output."""
    stopped, twice = command.startswith(STOPPED), command.startswith(TWICE)
    words = shlex.split(command.removeprefix(STOPPED).removeprefix(TWICE))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if twice else []
    began = time.monotonic()
    process = start([*launcher, "-m", "funmatch", *words], checkout, folder, work)
    if stopped:
        stop_once_saved(process, folder)
    out, err = process.communicate()
    expected = 128 + signal.SIGTERM if stopped else 0
    if process.returncode != expected:
        raise RuntimeError(f"funmatch {command}\nexit {process.returncode}, not {expected}\n{out}\n{err}")
    return round(time.monotonic() - began, 1), out


def metrics_of(record: dict) -> dict:
    """Picks the compared metrics of a JSON record, and those of the averaged weights (`ema`)."""
    metrics = {name: record[name] for name in METRICS if record.get(name) is not None}
    return metrics | ({"ema": metrics_of(record["ema"])} if isinstance(record.get("ema"), dict) else {})


def results_in(folder: Path) -> Iterator[tuple[str, object]]:
    """Yields what is recorded of each file in a case's folder: its path, and its metrics or its SHA-256."""
    newest = {max(each.glob("step-*"), default=None) for each in folder.rglob("checkpoints")}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if any(fnmatch.fnmatch(path.name, pattern) for pattern in HASHED) or (
            path.suffix == ".safetensors" and path.parent in newest
        ):
            yield name, hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.name == "result.json":
            yield name, metrics_of(json.loads(path.read_text()))
        elif path.name == "metrics.jsonl":
            lines = map(json.loads, path.read_text().splitlines())
            yield name, [[line["event"], metrics_of(line)] for line in lines if line["event"] in EVENTS]


def run_case(name: str, checkout: Path, work: Path) -> dict:
    """Runs the commands of a case; its results by the name of what is compared."""
    folder = work / name
    folder.mkdir()
    seconds, results = [], {}
    try:
        for number, command in enumerate(CASES[name], 1):
            duration, out = run_command(command, checkout, folder, work)
            seconds.append(duration)
            if "--json" in command.split():
                results[f"output of command {number}"] = metrics_of(json.loads(out))
        results |= dict(results_in(folder))
        status = f"{len(results)} results"
    except RuntimeError as error:
        results, status = {}, f"FAILED: {error}"  # the other cases are still compared
    print(f"{name:<20} {sum(seconds):6.1f} s  {status}", flush=True)
    return {"seconds": seconds, "commands": list(CASES[name]), "results": results}


def record(checkout: Path, names: list[str], jobs: int) -> dict:
    """Runs cases in a fresh folder, which is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="record-") as temporary:
        work = Path(temporary)
        write_inputs(work / "inputs")
        process = start(["-c", "import funmatch; print(funmatch.__file__)"], checkout, work, work)
        imported = Path(process.communicate()[0].strip() or "/")
        if not imported.is_relative_to(checkout):
            raise SystemExit(f"{checkout} is not the package that is imported: {imported}")
        # Also fills the cache, so that no case depends on the order of cases.
        run_command(f"train {MINI} {STUDENT} --steps 20 --lr 1e-2 --out inputs/teacher", checkout, work, work)
        with ThreadPoolExecutor(jobs) as pool:
            cases = pool.map(lambda name: run_case(name, checkout, work), names)
            return dict(zip(names, cases, strict=True))


def compare(one: dict, other: dict, names: list[str]) -> bool:
    """Prints a line for each case and each difference of two records; returns whether all are equal."""
    same = True
    for name in names:
        first, second = (cases.get(name, {}).get("results", {}) for cases in (one, other))
        differing = [what for what in sorted(first.keys() | second.keys()) if first.get(what) != second.get(what)]
        status = "missing" if not (first and second) else "DIFFERENT" if differing else "equal"
        same = same and status == "equal"
        print(f"{name:<20} {status:<10} {len(first)} results")
        for what in differing if first and second else []:
            print(f"    {what}: {str(first.get(what))[:200]} | {str(second.get(what))[:200]}")
    print("all equal" if same else "NOT all equal")
    return same


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkout", type=Path, help="the repository whose package is run")
    parser.add_argument("--out", type=Path, help="the record to write")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"cases, of {', '.join(CASES)}")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time (default: 1)")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="two records")
    args = parser.parse_args()
    names = [name for name in CASES if not args.only or any(fnmatch.fnmatch(name, each) for each in args.only)]
    if not names:
        parser.error(f"no case is called {' '.join(args.only)}; known: {', '.join(CASES)}")
    if args.compare:
        one, other = (json.loads(path.read_text()) for path in args.compare)
        sys.exit(not compare(one, other, names))
    if not args.checkout or not args.out:
        parser.error("give --checkout and --out, or --compare")
    cases = record(args.checkout.resolve(), names, args.jobs)
    args.out.write_text(json.dumps(cases, indent=1) + "\n")
    sys.exit(not all(case["results"] for case in cases.values()))


if __name__ == "__main__":
    main()
