"""Runs each command that uses a finished run, several times, and writes time, memory and figures as Markdown.

    funmatch demo                          # the first of the two default runs
    python benchmarks/shipping.py runs/demo-7000-steps-seed-0/funmatch runs/real [--rounds 3] [--threads 1]
        [--images 500] [--only predict benchmark] [--out benchmarks/results/shipping-cpu.md]

Each command is a process of its own, so its start-up (Python, PyTorch, timm) counts. The commands take turns: a round
has each of them once. Times are medians over rounds (lowest … highest). Memory is the peak of the process, with its
libraries. predict and embed read images of the run's own evaluation split, which are first written as PNG files. A
command that fails has its message in the table; one that this version lacks is left out.
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
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from funmatch.commands.verbs import TABLES
from funmatch.config import Evaluate
from funmatch.runtime.text import counted, format_bytes, percent
from funmatch.shipping.benchmark.formats import Machine
from funmatch.shipping.benchmark.result import describe_machine
from funmatch.training import datasets
from funmatch.training.evaluation import scoring
from funmatch.training.evaluation.subject import pick_split
from funmatch.training.student.trained_model import open_trained_model

LIBRARIES = ("funmatch", "torch", "timm", "onnxruntime", "openvino", "numpy")
Figures = Callable[[dict[str, Any], Path], str]
"""Says in a few words what a command's JSON, and the folder that it wrote into, hold."""


def of_evaluation(found: dict[str, Any], _folder: Path) -> str:
    return f"top-1 {percent(found['top1'])}, agreement {percent(found['agreement'])} on {found['pictures']:,} images"


def of_export(found: dict[str, Any], _folder: Path) -> str:
    formats = found["formats"].items()
    return "; ".join(
        f"{name} {format_bytes(each['bytes'])}, same top-1 {percent(each.get('same_top1'))}" for name, each in formats
    )


def of_quantization(found: dict[str, Any], _folder: Path) -> str:
    each = found["quantized"]
    before, after = each["before"], each["after"]
    what = "top1" if after.get("top1") is not None else "agreement"
    return (
        f"{what} {percent(before[what])} → {percent(after[what])} on {each['images']:,} images of {each['split']}, "
        f"{format_bytes(before['bytes'])} → {format_bytes(after['bytes'])}, {len(each['fp32'])} of {each['layers']} "
        f"layers in fp32, ranges by {each['method']}"
    )


def of_files(_found: dict[str, Any], folder: Path) -> str:
    return ", ".join(f"{each.name} {format_bytes(each.stat().st_size)}" for each in sorted(folder.iterdir()))


def of_benchmark(found: dict[str, Any], _folder: Path) -> str:
    measured = [each for each in found["results"] if each["status"] == "ok"]
    return f"{len(measured)} of {len(found['results'])} formats measured; the table below"


@dataclass(frozen=True)
class Row:
    """A command.

    Attributes:
        name: in the table.
        words: after `funmatch`; {run}, {images}, {out}, {threads} and {count} are filled in.
        figures: what to say of its result.
        option: an option that it needs; without it, the row is left out.
    """

    name: str
    words: str
    figures: Figures
    option: str = "as_json"

    @property
    def verb(self) -> str:
        """The command's name."""
        return self.words.split()[0]

    @property
    def exists(self) -> bool:
        """Whether this version has it."""
        return self.verb in TABLES and TABLES[self.verb].field_of(self.option) is not None


ROWS = (
    Row("predict", "predict {run} {images} --out {out}/predictions.csv --json", of_files),
    Row("embed", "embed {run} {images} --out {out}/features.npy --json", of_files),
    Row("evaluate", "evaluate {run} --json", of_evaluation),
    Row("export", "export {run} --format onnx openvino torch-export timm --out {out}/exported --json", of_export),
    Row("quantize", "export {run} --format onnx --quantize 8 --out {out}/int8 --json", of_quantization, "quantize"),
    Row(
        "benchmark",
        "benchmark {run} --threads {threads} --images {count} --report {out}/benchmark.html --json",
        of_benchmark,
    ),
)
"""The commands in their order; a new one is a row here."""


@dataclass
class Measured:
    """The runs of a command.

    Attributes:
        seconds, bytes: wall time and peak memory of each.
        figures: of the last one.
        result: its JSON.
        error: its message, if it failed.
    """

    seconds: list[float] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    figures: str = ""
    result: dict[str, Any] = field(default_factory=dict)
    error: str = ""


def write_images(run: str, folder: Path, count: int) -> None:
    """Writes images of a run's evaluation split as PNG files, evenly spread over it."""
    model = open_trained_model(run)
    assert model.run
    cache, _, _ = datasets.open_evaluation_data(Evaluate(model=run), run, model.run.config["verb"], model.knobs)
    split = pick_split(cache, "auto", with_teacher=True)
    folder.mkdir(parents=True)
    for place in scoring.evenly_spread(len(split), count):
        Image.fromarray(split.image(int(place)).numpy()).save(folder / f"{place:06}.png")


def measure(words: list[str], log: Path) -> tuple[float, int, str, str]:
    """Runs a command; returns its seconds, its peak memory in bytes, what it printed, and its message if it failed."""
    began = time.perf_counter()
    with log.open("w") as errors:
        process = subprocess.Popen([sys.executable, "-m", "funmatch", *words], stdout=subprocess.PIPE, stderr=errors)
        assert process.stdout
        printed = process.stdout.read().decode()
        # The usage of this process alone, not the largest of all children.
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    lines = log.read_text().strip().splitlines()
    return seconds, peak, printed, (lines or ["no message"])[-1] if process.returncode else ""


def measure_run(run: str, rows: list[Row], options: argparse.Namespace, folder: Path) -> dict[str, Measured]:
    """Runs all commands on a run, in rounds."""
    images = folder / "images"
    write_images(run, images, options.images)
    found = {row.name: Measured() for row in rows}
    for number in range(options.rounds):
        for row in rows:
            each = found[row.name]
            if each.error:
                continue
            out = folder / row.name
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            places = {"run": run, "images": images, "out": out, "threads": options.threads, "count": options.images}
            words = [word.format(**places) for word in row.words.split()]
            print(f"round {number + 1}: funmatch {' '.join(words)}", file=sys.stderr)
            seconds, peak, printed, each.error = measure(words, folder / "log.txt")
            if each.error:
                continue
            each.seconds.append(seconds)
            each.bytes.append(peak)
            each.result = json.loads(printed)
            each.figures = row.figures(each.result, out)
    return found


def describe(run: str, rows: list[Row], found: dict[str, Measured]) -> list[str]:
    """Returns the lines about a run: a table of commands, and that of the benchmark."""
    lines = [f"## {run}", "", "| command | s | peak memory | result |", "|---|---|---:|---|"]
    for row in rows:
        each = found[row.name]
        if each.error or not each.seconds:
            lines.append(f"| `{row.name}` | – | – | {each.error.replace('|', '∣')} |")
            continue
        low, middle, high = min(each.seconds), statistics.median(each.seconds), max(each.seconds)
        times = f"{middle:.1f} ({low:.1f} … {high:.1f})"
        lines.append(f"| `{row.name}` | {times} | {format_bytes(max(each.bytes))} | {each.figures} |")
    if results := found.get("benchmark", Measured()).result.get("results"):
        lines += ["", "| format | MB | top-1 | agreement | ms/image (p90) | spread | images/s (batch) | peak MB |"]
        lines += ["|---|---:|---:|---:|---:|---:|---:|---:|", *map(row_of_format, results)]
    return [*lines, ""]


def row_of_format(each: dict[str, Any]) -> str:
    """Returns the row of a format in the table of the benchmark."""
    name = f"{each['model']}, {each['label']}" if each["model"] else each["label"]
    if each["status"] != "ok":
        return f"| {name} | – | – | – | {each['status']}: {each['reason']} | – | – | – |"
    memory = "–" if each["memory_bytes"] is None else f"{each['memory_bytes'] / 1e6:.1f}"
    tail = "–" if each["ms_p90"] is None else f"{each['ms_p90']:.3g}"
    return (
        f"| {name} | {each['bytes'] / 1e6:.3g} | {percent(each['top1'])} | {percent(each['agreement'])} "
        f"| {each['ms']:.3g} ({tail}) | {percent(each['spread'])} "
        f"| {each['images_per_second']:,.0f} ({each['batch']}) | {memory} |"
    )


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--only", nargs="+", default=[row.name for row in ROWS], choices=[row.name for row in ROWS])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "shipping-cpu.md")
    options = parser.parse_args()
    rows = [row for row in ROWS if row.name in options.only and row.exists]
    machine = Machine(torch.device("cpu"), "fp32", options.threads)
    versions = ", ".join(f"{name} {version(name).partition('-')[0]}" for name in LIBRARIES)
    places = {"run": "RUN", "images": "IMAGES", "out": "OUT", "threads": options.threads, "count": options.images}
    lines = [
        "# The commands for a finished run, on the CPU",
        "",
        f"    python benchmarks/shipping.py {' '.join(sys.argv[1:])}",
        "",
        f"{describe_machine(machine)}; {versions}, Python {platform.python_version()}; {date.today():%-d %B %Y}. "
        f"{counted(options.rounds, 'round')}; seconds are medians (lowest … highest), with the start of Python "
        f"and PyTorch. predict and embed read {options.images} PNG files.",
        "",
        "Commands, with RUN, IMAGES and OUT for the places:",
        "",
        *(f"    funmatch {row.words.format(**places)}" for row in rows),
        "",
    ]  # fmt: skip
    for run in options.runs:
        with tempfile.TemporaryDirectory() as folder:
            lines += describe(run, rows, measure_run(run, rows, options, Path(folder)))
        # After each run: what was measured stays if a later one fails.
        options.out.write_text("\n".join(lines))
    print(options.out)


if __name__ == "__main__":
    main()
