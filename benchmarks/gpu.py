"""Measures distillation on an accelerator within minutes: is it right, how fast is it beside timm, does it resume.

    python benchmarks/gpu.py --out results            # at most 8 minutes on one large GPU and 16 cores
    python benchmarks/gpu.py --device cpu --quick     # all parts on small networks, as a check

Parts, in this order; those after `resume` run with --all or if named by --only:

kernel     crops by the accelerator's kernel beside those of the CPU.
precision  teachers in bf16, fp16 and fp32 beside fp32 without TF32 (KL, agreement); losses of the same steps, and what
           a short run reaches, in bf16 and fp32 beside the CPU.
pair …     images/s of three pairs: ours, and timm's LogitDistillationTask with AMP; compiled and not; fed from tensors
           on the device (the steps alone) and from JPEGs (ours as a run reads them; timm's loader with 16 workers).
peak       matrix products in bf16, TF32 and fp32; what share of bf16's the steps above reach; times timm.
resume     whether a run that is stopped halfway and resumed ends with the same bits.
waits      where steps make the CPU wait.
predict    JPEGs a second that `predict` classifies.

Each result is a line of results.jsonl, on the disk before the next is measured, and results.md is the table of all. A
part that fails, takes too long or no longer fits into --minutes is a line too, and the next one begins.

A machine without a network, which has PyTorch, timm, rich and jinja2 but lacks pydantic and tyro, gets these as wheels.
First where there is a network, then there, both in the root of the repository (3.12 is the version of Python there):

    pip download -d .whl -c constraints.txt --no-deps --only-binary=:all: --implementation cp --python-version 3.12 \
        --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
        pydantic pydantic-core annotated-types typing-inspection typing-extensions tyro docstring-parser typeguard
    python3 -m pip install -q --no-index --no-deps --upgrade --target /tmp/site .whl/*.whl &&
        PYTHONPATH=/tmp/site:. python3 benchmarks/gpu.py --out results
"""

import argparse
import json
import math
import os
import platform
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import timm
import torch
from gpu_parts import Bench, Pair  # pyrefly: ignore

from funmatch.runtime import devices

PAIRS = [
    Pair("resnetv2_101x3_bit", "resnetv2_50x1_bit", 128, 512),
    Pair("vit_large_patch16_224", "vit_small_patch16_224", 224, 256),
    Pair("resnet50", "mobilenetv3_large_100", 128, 512),
]
QUICK = [Pair("test_vit", "test_vit", 160, 4), Pair("resnet10t", "test_resnet", 64, 8)]


class OutOfTime(BaseException):
    """The time of a part is over; not an `Exception`, which a failing compiler's fallback would catch."""


class Results:
    """Results of all parts, written as they come.

    Args:
        folder: for results.jsonl and results.md; None prints only.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder, self.lines, self.began = folder, [], time.monotonic()
        if folder:
            folder.mkdir(parents=True, exist_ok=True)

    def add(self, part: str, **figures: Any) -> None:
        """Adds a result; it is on the disk when this returns, and survives whatever happens to the next part."""
        line = {"part": part, **figures, "at": round(time.monotonic() - self.began, 1)}
        self.lines.append(line)
        print(json.dumps(line), flush=True)
        if self.folder:
            with open(self.folder / "results.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def write_table(self) -> None:
        """Writes results.md: a table for each part that has results."""
        if not self.folder:
            return
        text = ["# Distillation on an accelerator", ""]
        for part in dict.fromkeys(line["part"] for line in self.lines):
            rows = [{k: v for k, v in line.items() if k not in ("part", "at")} for line in self.lines
                    if line["part"] == part]  # fmt: skip
            columns = list(dict.fromkeys(key for row in rows for key in row))
            text += [f"## {part}", "", "|" + "|".join(columns) + "|", "|" + "---|" * len(columns)]
            text += ["|" + "|".join(cell(row.get(column)) for column in columns) + "|" for row in rows] + [""]
        (self.folder / "results.md").write_text("\n".join(text))


def cell(value: Any) -> str:
    """Returns a value as a cell: spreads as "median (least … most)"."""
    if isinstance(value, dict) and "median" in value:
        return f"{value['median']:.4g} ({value['least']:.4g} … {value['most']:.4g})"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(cell, value))
    return "" if value is None else str(value).replace("|", "\\|").replace("\n", " ")


@dataclass(frozen=True)
class Part:
    """A part of the benchmark.

    Attributes:
        need: seconds without which it is not begun; kept free for it by the parts before.
        limit: seconds after which it is ended.
    """

    name: str
    work: Callable[[], object]
    need: float
    limit: float


def parts_of(bench: Bench) -> list[Part]:
    """Returns all parts in their order, with times for a large GPU."""
    pairs = [
        Part(f"pair {number} {who}", lambda pair=pair, work=work: work(pair), 25, 100)
        for number, pair in enumerate(bench.pairs)
        for who, work in (("ours", bench.ours), ("timm", bench.timm))
    ]
    return [
        Part("kernel", bench.kernel, 5, 20), Part("precision", bench.precision, 20, 80), *pairs,
        Part("peak", bench.peak, 5, 15), Part("resume", bench.resume, 20, 150),
        Part("waits", bench.waits, 15, 60), Part("predict", bench.predict, 15, 60),
    ]  # fmt: skip


def run(parts: list[Part], results: Results, seconds: float) -> None:
    """Runs parts one after another, as far as the time goes."""

    def end(_number: int, _frame: FrameType | None) -> None:
        raise OutOfTime

    signal.signal(signal.SIGALRM, end)
    for number, part in enumerate(parts):
        # What the parts after it need at least is theirs; what they do not use is this one's.
        left = seconds - (time.monotonic() - results.began) - sum(each.need for each in parts[number + 1 :])
        # Half of it will do: the part before may have ended a little late.
        if left < part.need / 2:
            results.add("skipped", name=part.name, why=f"{left:.0f} s are left for it, it needs {part.need:.0f} s")
            continue
        try:
            signal.setitimer(signal.ITIMER_REAL, min(left, part.limit))
            part.work()
        except OutOfTime:
            results.add("ended", name=part.name, why=f"took more than {min(left, part.limit):.0f} s")
        except Exception as error:  # whatever fails on this machine, the other parts are still measured
            where = traceback.extract_tb(error.__traceback__)[-1]
            why = f"{type(error).__name__}: {error}"[:500]
            results.add("failed", name=part.name, why=why, at_line=f"{Path(where.filename).name}:{where.lineno}")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        torch._dynamo.reset()
        results.write_table()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="time for all parts")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="parts by the beginning of their names")
    parser.add_argument("--all", action="store_true", help="also the parts after resume")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="small networks, a few steps, nothing compiled")
    parser.add_argument("--out", type=Path, help="folder of results.jsonl and results.md")
    options = parser.parse_args()
    results, device = Results(options.out), devices.pick_device(options.device)
    name = platform.machine() if device.type == "cpu" else devices.machine_signature(device)[0]
    results.add(
        "machine", device=name, cores=os.cpu_count(), torch=torch.__version__, timm=timm.__version__,
        python=platform.python_version(), command=" ".join(sys.argv),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(results.add, device, Path(folder), QUICK if options.quick else PAIRS, quick=options.quick)
        parts = parts_of(bench)
        if options.only:
            parts = [part for part in parts if part.name.startswith(tuple(options.only))]
        elif not options.all:
            parts = parts[:-2]
        # The check may run on a slow machine, and has no limits but the whole.
        limits = [replace(part, limit=math.inf) for part in parts] if options.quick else parts
        run(limits, results, 60 * options.minutes)
    print(f"all in {time.monotonic() - results.began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
