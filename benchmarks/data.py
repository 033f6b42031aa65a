"""Measures how fast views are made, compared with timm's loader and `tf.data`, and what many images cost.

    pip install scikit-learn                    # for its two photographs; or --photos FOLDER
    python benchmarks/data.py                        # views per second, on one core
    python benchmarks/data.py --tensorflow PYTHON    # with tf.data, by an interpreter that has TensorFlow
    python benchmarks/data.py --many                 # memory and start-up with 1,000 and 100,000 images

A view is: decode, crop, resize to 128 × 128, flip. funmatch uses TensorFlow's Inception crop, resized without
antialiasing; timm its RandomResizedCrop with the same range of areas; tf.data the same crop as funmatch, with its own
operations. All contenders alternate on one core; results are ratios within a round, of the processor's time: what other
processes take of a shared machine counts for none. Freed memory is kept, as in a run on a CPU, for all in this process.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import create_dataset, create_loader

from funmatch.data.cache.open_cache import open_cache
from funmatch.data.cache.storing import CacheOptions
from funmatch.data.jpeg import pick_decoder
from funmatch.data.loader import Loader
from funmatch.ops.view_spec import ViewSpec
from funmatch.runtime.malloc import keep_freed_memory

SIDE, BATCH = 128, 64
SIZES = ((384, 384), (500, 375))

TENSORFLOW = """
import os, sys, time
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.sched_setaffinity(0, {int(sys.argv[3])})
import tensorflow as tf
tf.config.threading.set_intra_op_parallelism_threads(1)
tf.config.threading.set_inter_op_parallelism_threads(1)
files = tf.io.gfile.glob(sys.argv[1] + "/*/*.jpg")
side, batch = 128, 64

def view(path):
    data = tf.io.read_file(path)
    shape = tf.io.extract_jpeg_shape(data)
    begin, size, _ = tf.image.sample_distorted_bounding_box(
        shape, tf.zeros([0, 0, 4], tf.float32), area_range=(0.05, 1), min_object_covered=0,
        use_image_if_no_bounding_boxes=True)
    top, left, _ = tf.unstack(begin)
    height, width, _ = tf.unstack(size)
    crop = tf.io.decode_and_crop_jpeg(data, tf.stack([top, left, height, width]), channels=3)
    return tf.image.random_flip_left_right(tf.cast(tf.image.resize(crop, (side, side)), tf.uint8))

options = tf.data.Options()
options.threading.private_threadpool_size = 1
data = tf.data.Dataset.from_tensor_slices(files).shuffle(len(files)).repeat().map(view).batch(batch).prefetch(1)
stream = iter(data.with_options(options))
next(stream)
for line in sys.stdin:
    began = time.process_time()
    for _ in range(int(line)):
        next(stream).numpy()
    print(time.process_time() - began, flush=True)
"""


def photographs(options: argparse.Namespace) -> list[Image.Image]:
    """Large photographs to crop images from."""
    if options.photos:
        return [Image.open(path).convert("RGB") for path in sorted(Path(options.photos).iterdir())]
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(array) for array in load_sample_images().images]


def cut(photos: list[Image.Image], folder: Path, size: tuple[int, int], count: int) -> Path:
    """Writes JPEGs of one size, each a different crop of a photograph, enlarged at most about twice."""
    rng = np.random.default_rng(0)
    for i in range(count):
        photo = photos[i % len(photos)]
        largest = min(photo.width / size[0], photo.height / size[1])
        scale = largest * rng.uniform(0.5, 1)
        width, height = size[0] * scale, size[1] * scale
        left, top = rng.uniform(0, photo.width - width), rng.uniform(0, photo.height - height)
        path = folder / f"class{i % 4}" / f"{i:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = photo.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
        image.save(path, quality=90)
    return folder


def ours(folder: Path, way: str, decoder: str) -> Callable[[int], float]:
    """Seconds for a number of batches of funmatch, in the process's own thread."""
    split = open_cache(str(folder), cache_options=CacheOptions(way=way, decoder=decoder)).splits["train"]
    loader = Loader(split, ViewSpec(seed=0, batch=BATCH, side=SIDE))
    steps = iter(range(10**9))

    def turn(batches: int) -> float:
        began = time.thread_time()
        for _ in range(batches):
            # As bytes, like the others; MixUp needs one row more than the batch, so BATCH + 1 views count as BATCH.
            (loader.batch_at(next(steps)).crops * 255).round_().to(torch.uint8)
        return time.thread_time() - began

    return turn


def of_timm(folder: Path) -> Callable[[int], float]:
    """The same for timm's loader: its own reader, transforms and collation, with bytes as output."""
    data = create_dataset("", root=str(folder), is_training=True)
    loader = create_loader(
        data, input_size=(3, SIDE, SIDE), batch_size=BATCH, is_training=True, use_prefetcher=True, num_workers=0,
        scale=(0.05, 1.0), hflip=0.5, color_jitter=0.0, interpolation="bilinear", device=torch.device("cpu"),
        pin_memory=False, persistent_workers=False,
    )  # fmt: skip

    inner: Any = getattr(loader, "loader")  # noqa: B009 - without its prefetcher, which would normalise too

    def endless() -> Iterator:
        while True:
            yield from inner

    batches_of_timm = endless()

    def turn(batches: int) -> float:
        began = time.thread_time()
        for _ in range(batches):
            next(batches_of_timm)
        return time.thread_time() - began

    return turn


def of_tensorflow(folder: Path, python: str, core: int) -> Callable[[int], float]:
    """The same for a tf.data pipeline in a process of its own on the same core."""
    command = [python, "-c", TENSORFLOW, str(folder), "", str(core)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )

    def turn(batches: int) -> float:
        assert process.stdin
        assert process.stdout
        process.stdin.write(f"{batches}\n")
        process.stdin.flush()
        return float(process.stdout.readline())

    return turn


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} … {max(values):.2f})"


def compare(options: argparse.Namespace, folder: Path) -> None:
    core = min(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    photos = photographs(options)
    decoders = ["pillow"] + ["torchcodec"] * (pick_decoder("auto") == "torchcodec")
    print(f"Ratios to timm {timm.__version__} in views a second: median of {options.turns} turns (lowest … highest)\n")
    print("| contender | " + " | ".join(f"{w} × {h}" for w, h in SIZES) + " |")
    print("|---|" + "---|" * len(SIZES))
    table: dict[str, list[str]] = {}
    for size in SIZES:
        root = cut(photos, folder / f"{size[0]}x{size[1]}", size, options.images)
        contenders = {"timm": of_timm(root), "resident": ours(root, "resident", decoders[-1])}
        contenders |= {f"streaming, {decoder}": ours(root, "streaming", decoder) for decoder in decoders}
        if options.tensorflow:
            contenders["tf.data"] = of_tensorflow(root, options.tensorflow, core)
        for turn in contenders.values():
            turn(2)
        seconds = {name: [] for name in contenders}
        with keep_freed_memory(torch.device("cpu")):
            for _ in range(options.turns):
                for name, turn in contenders.items():
                    seconds[name].append(turn(options.batches))
        for name, each in seconds.items():
            ratios = [base / mine for base, mine in zip(seconds["timm"], each, strict=True)]
            rate = options.batches * BATCH / statistics.median(each)
            table.setdefault(name, []).append(f"{spread(ratios)}, {rate:,.0f}/s")
    for name, cells in table.items():
        print(f"| {name} | " + " | ".join(cells) + " |")


def many(options: argparse.Namespace, folder: Path) -> None:
    """Start-up and memory of a process with few images and with many, each in a process of its own."""
    photos = photographs(options)
    print("| images | way | start-up, s | MB after start-up | MB after 300 batches of 64 | MB at most |")
    print("|---|---|---|---|---|---|")
    for count in (1000, options.many_images):
        root = cut(photos, folder / str(count), (96, 72), count)
        for way in ("resident", "streaming"):
            open_cache(str(root), cache_options=CacheOptions(way=way))
            command = [sys.executable, __file__, "--measure", str(root), way]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            cells = [f"{found['start']:.2f}", *(f"{found[name]:,.0f}" for name in ("opened", "after", "peak"))]
            print(f"| {count:,} | {way} | " + " | ".join(cells) + " |", flush=True)


def measure(folder: str, way: str) -> None:
    began = time.perf_counter()
    split = open_cache(folder, cache_options=CacheOptions(way=way)).splits["train"]
    loader = Loader(split, ViewSpec(seed=0, batch=BATCH, side=32))
    loader.batch_at(0)
    start = time.perf_counter() - began
    opened = resident_memory()
    for step in range(300):
        loader.batch_at(step)
    # Not `ru_maxrss`, which begins with what the parent had when it forked.
    peak = int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0]) * 1024 / 1e6
    print(json.dumps({"start": start, "opened": opened, "after": resident_memory(), "peak": peak}))


def resident_memory() -> float:
    """Resident memory of the process, including shared and mapped pages, MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", help="folder of large photographs")
    parser.add_argument("--images", "--pictures", type=int, default=256, help="JPEGs of each size")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--batches", type=int, default=8, help="batches of 64 views in a round")
    parser.add_argument("--tensorflow", metavar="PYTHON", help="interpreter that has TensorFlow")
    parser.add_argument("--many", action="store_true")
    parser.add_argument("--many-images", "--many-pictures", type=int, default=100_000)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return measure(*options.measure)
    versions = f"torch {torch.__version__}, Pillow {Image.__version__}, Python {platform.python_version()}"
    print(f"{' '.join(['python', *sys.argv])}\n{platform.processor() or platform.machine()}, {versions}\n")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FUNMATCH_CACHE"] = f"{folder}/cache"
        (many if options.many else compare)(options, Path(folder))
    return None


if __name__ == "__main__":
    main()
