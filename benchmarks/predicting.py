"""Measures `funmatch predict`: its rate beside the network's own, its memory, and the time to the first row.

    python benchmarks/predicting.py --photos FOLDER [--model timm.models:resnet50] [--turns 5] [--parts rate]

The photographs of a folder (any large JPEGs or PNGs) are scaled to 500 × 375 and saved as JPEGs of quality 90 in a
temporary folder. Rates: the network alone on a batch that lies in memory, then `predict` from the files, in turns, so
that a machine that slows down slows both; and the network's share of the CPU time of `predict`, which is the ratio that
other processes do not disturb. Memory: the peak of processes that predict 1,000 to 100,000 files (links to
smaller copies) by a small network. Start: from the start of Python to the first row, and of a process that only imports
torch and timm.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from funmatch.config import Predict
from funmatch.runtime import devices, functions
from funmatch.runtime.malloc import keep_freed_memory
from funmatch.shipping import predict
from funmatch.shipping.inference import ready
from funmatch.shipping.predictor import open_predictor
from funmatch.training.student.trained_model import open_trained_model

SIZE = 500, 375
SMALL_SIZE = 160, 120
FILES, BATCH = 192, 64
PASSES = 16
"""Times that the files are predicted in a row: of few images, most of the time is that of the first batches."""
SMALL = "fashion-mini-teacher"


def make_photos(source: Path, folder: Path, count: int, size: tuple[int, int] = SIZE) -> list[Path]:
    """Writes JPEGs, each another cut of the photographs of a folder."""
    folder.mkdir()
    found = sorted(path for path in source.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    paths = []
    for number in range(count):
        with Image.open(found[number % len(found)]) as image:
            width, height = image.size
            # Cuts of other sizes, so that no two files are equal.
            share = 0.5 + 0.5 * (number // len(found) + 1) / (count // len(found) + 1)
            box = (0, 0, round(width * share), round(height * share))
            photo = image.convert("RGB").crop(box).resize(size, Image.Resampling.LANCZOS)
        paths.append(folder / f"{number:06}.jpg")
        photo.save(paths[-1], quality=90)
    return paths


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):,.3g} ({min(values):,.3g} … {max(values):,.3g})"


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def busy(work: Callable[[], object]) -> float:
    """Returns the seconds of all cores that this process's threads take."""
    began = time.process_time()
    work()
    return time.process_time() - began


def rates(model: str, folder: Path, turns: int) -> None:
    """Prints the rates of the network alone and of `predict`, and their ratio in each turn."""
    device = torch.device("cpu")
    functions.allow(model)
    trained = open_trained_model(model)
    network = ready(trained, device, devices.resolve_precision("auto", device))
    side = trained.preprocessing.side
    views = torch.rand(BATCH, 3, side, side).contiguous(memory_format=torch.channels_last)
    config = Predict(model=model, paths=(str(folder),) * PASSES, out=Path(os.devnull), format="csv", batch=BATCH)

    def network_alone() -> None:
        # As in `predict`, for a fair comparison.
        with torch.inference_mode(), keep_freed_memory(device):
            for _ in range(PASSES * FILES // BATCH):
                network.outputs(views)

    def from_files() -> None:
        # Its own clock, which begins when the model is loaded.
        whole.append(PASSES * FILES / predict.run(config)["seconds"])

    network_alone()
    alone, whole, ratios, shares = [], list[float](), [], []
    for _ in range(turns):
        network_seconds = busy(lambda: alone.append(PASSES * FILES / timed(network_alone)))
        loading = busy(lambda: open_predictor(config))
        shares.append(network_seconds / (busy(from_files) - loading))
        ratios.append(whole[-1] / alone[-1])
    cells = [f"{model}, {side} px", *map(spread, (alone, whole, ratios, shares))]
    print(f"| {' | '.join(cells)} |", flush=True)


def decoding(folder: Path) -> None:
    """Prints the milliseconds of one core that a file takes before the network."""
    trained = open_trained_model(SMALL, side=224)
    from funmatch.data.jpeg import pick_decoder
    from funmatch.shipping.sources.files import Decoding, one_file

    how = Decoding(512, pick_decoder("auto"))
    paths = sorted(folder.iterdir())[:200]

    def read() -> None:
        for path in paths:
            trained.preprocessing.view(torch.from_numpy(one_file(str(path)).pixels(how).copy()))

    read()
    each = [1000 * timed(read) / len(paths) for _ in range(5)]
    print(f"decode ({how.decoder}) and resize: {spread(each)} ms a file on one core", flush=True)


def memory(photos: list[Path], folder: Path) -> None:
    """Prints the peak memory of processes that predict few and many files."""
    for count in (1_000, 10_000, 100_000):
        many = folder / f"many-{count}"
        many.mkdir()
        for number in range(count):
            os.link(photos[number % len(photos)], many / f"{number:06}.jpg")
        code = (
            "import sys, funmatch.cli\n"
            "try: funmatch.cli.main(sys.argv[1:])\n"
            "finally:\n"
            " lines = open('/proc/self/status').read().splitlines()\n"
            " print(*(line for line in lines if line.startswith(('VmHWM', 'VmRSS'))), file=sys.stderr)\n"
        )
        words = ["predict", SMALL, str(many), "--out", str(folder / f"{count}.csv"), "--topk", "1"]
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
        print(f"{count:,} files: {done.stderr.splitlines()[-1]}; {time.perf_counter() - began:,.0f} s", flush=True)


def start(folder: Path, turns: int) -> None:
    """Prints the seconds to the first row, of the command and of importing torch and timm alone."""
    first, imports = [], []
    words = [sys.executable, "-m", "funmatch", "predict", SMALL, str(folder), "--topk", "1"]
    for _ in range(turns):
        imports.append(timed(lambda: subprocess.run([sys.executable, "-c", "import torch, timm"], check=True)))
        began = time.perf_counter()
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout
            # The head of the table, then the first row.
            process.stdout.readline()
            process.stdout.readline()
            first.append(time.perf_counter() - began)
            process.kill()
    print(f"first row after {spread(first)} s; importing torch and timm alone: {spread(imports)} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--model", nargs="+", default=["timm.models:resnet50"])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--parts", default="rate,memory,start")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        make_photos(options.photos, Path(name) / "photos", FILES)
        if "start" in options.parts:
            start(Path(name) / "photos", options.turns)
        if "rate" in options.parts:
            decoding(Path(name) / "photos")
            heads = [
                "model",
                "network alone, images/s",
                "predict, images/s",
                "ratio",
                "share of CPU time",
            ]
            print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
            for model in options.model:
                rates(model, Path(name) / "photos", options.turns)
        if "memory" in options.parts:
            memory(make_photos(options.photos, Path(name) / "small", 96, SMALL_SIZE), Path(name))


if __name__ == "__main__":
    main()
