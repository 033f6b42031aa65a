"""Measures a step on an accelerator: views, whole runs, timm's components, and what waits for what.

    python benchmarks/gpu.py [--only crops numbers pairs timm waits students] [--out results.jsonl]

Six parts, each a few minutes on a large GPU:

crops    views of a batch by the kernel, by indexing and (images of one size) by two matrix products, compared with
         those of the CPU: the greatest difference, and milliseconds.
numbers  losses of some steps on the accelerator in its own precision, compared with the same steps on the CPU in fp32.
pairs    images/s of distillation as in a run (JPEGs decoded into the cache, images resident or streamed, compiled or
         not), its step compared with one on a fixed batch, and the share of views and of the matrix peak.
timm     timm's components on the same pairs: its task with AMP and compile on prepared tensors, and end to end with
         its loader from JPEGs.
waits    how often a run's steps make the CPU wait for the accelerator, and where.
students latency and throughput of the students, compiled or not, and JPEGs that `predict` classifies in a second.

All results are also written as lines of JSON. `--device cpu --quick` runs everything in a minute on small networks, as
a check.
"""

import argparse
import collections
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import nn

import funmatch
from funmatch.config import Distill
from funmatch.data.cache.device_store import fastest_crop_kernel
from funmatch.data.loader import Batch
from funmatch.data.prefetch import prefetch
from funmatch.ops import grids, resample
from funmatch.ops.sampling import box_sampler
from funmatch.runtime import devices
from funmatch.training import distill, profiling
from funmatch.training.loop import fit
from funmatch.training.student.acceleration import compile_student

CLASSES = 10
PAIRS = [
    ("resnetv2_101x3_bit", "resnetv2_50x1_bit"),
    ("resnetv2_152x2_bit", "resnetv2_50x1_bit"),
    ("resnetv2_50x1_bit", "mobilenetv3_large_100"),
]
QUICK = [("resnet10t", "resnet10t")]
ROUNDS = 5


def make_images(folder: Path, count: int) -> None:
    """JPEGs of about 384 pixels, of several shapes, with the detail of photographs: smooth noise of several scales."""
    rng = np.random.default_rng(0)
    for i in range(count):
        size = [(384, 384), (500, 375), (375, 500), (448, 336)][i % 4]
        layers = [
            np.asarray(Image.fromarray(rng.integers(0, 256, (s, s, 3), dtype=np.uint8)).resize(size))
            for s in (6, 24, 96)
        ]
        path = folder / "train" / f"{i % CLASSES}" / f"{i:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.mean(layers, axis=0).astype(np.uint8)).save(path, quality=92)


def network(name: str, seed: int) -> nn.Module:
    """A network with random weights, including a head that is not zero."""
    torch.manual_seed(seed)
    net: Any = timm.create_model(name, num_classes=CLASSES)
    torch.nn.init.normal_(net.get_classifier().weight, std=0.01)
    return net


def seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Mean seconds of a call, after some warm-up calls."""
    for _ in range(3):
        work()
    devices.synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    devices.synchronize(device)
    return (time.perf_counter() - start) / repeats


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values), "n": len(values)}


@contextmanager
def prepared(config: Distill, networks: dict[str, torch.nn.Module]) -> Generator[distill.Distillation]:
    """A distillation that is ready to train."""
    cache, config, loaded = distill.open_inputs(config, networks)
    with distill.prepare(distill.build_distill_setup(config, cache, loaded, networks), loaded) as distillation:
        yield distillation


class Bench:
    """Options, data and output that all parts share."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.device = devices.pick_device(options.device)
        self.pairs = QUICK if options.quick else PAIRS
        self.side, self.batch = (32, 8) if options.quick else (options.side, options.batch)
        self.steps = 4 if options.quick else options.steps
        os.environ["FUNMATCH_CACHE"] = str(folder / "cache")
        make_images(folder / "images", 40 if options.quick else options.images)

    def say(self, part: str, **figures: object) -> None:
        line = json.dumps({"part": part, **figures})
        print(line, flush=True)
        if self.options.out:
            with open(self.options.out, "a") as file:
                file.write(line + "\n")

    def config(self, **more: Any) -> Distill:
        options: dict[str, Any] = {
            "data": (str(self.folder / "images"),), "teacher": ("t",), "student": "s", "side": self.side,
            "batch": self.batch, "steps": 10_000, "device": self.options.device, "unlabelled": True, "mixup": 1.0,
            "allow_weak_teacher": True, "temperature": 2.0, "clip_norm": 1.0, "out": self.folder / "run",
        }  # fmt: skip
        return Distill.checked(**options | more)

    def crops(self) -> None:
        rng = np.random.default_rng(0)
        for sizes in ("several", "one"):
            count = 2 * self.batch
            shape = rng.integers(300, 640, (count, 2)) if sizes == "several" else np.full((count, 2), 448)
            lengths = 3 * shape.prod(1)
            starts = np.cumsum(lengths) - lengths
            flat = torch.from_numpy(rng.integers(0, 256, int(lengths.sum()), dtype=np.uint8))
            boxes = box_sampler("inception")(rng, *shape[: self.batch].T)
            flips = rng.random(self.batch) < 0.5
            grid = grids.crop_then_resize(starts[: self.batch], shape[: self.batch].T, boxes, self.side)
            grid = grid.flipped(flips, self.side)
            on_device = flat.to(self.device)
            sample, note = fastest_crop_kernel(on_device)
            works = {
                f"{name}, {method}": partial(kernel, on_device, grid, self.side, method)
                for name, kernel in (("kernel", sample), ("torch", resample.sample_by_torch))
                for method in resample.FILTERS
            }
            found = sample(on_device, grid, self.side, "tf").cpu()
            expected = resample.sample_by_torch(flat, grid, self.side, "tf")
            times = {
                name: [1e3 * seconds(work, self.device, 20) for _ in range(ROUNDS)] for name, work in works.items()
            }
            if sizes == "one":
                axes = torch.from_numpy(grid.axes).to(self.device)
                times["matrices"] = [1e3 * self.by_matrices(on_device, axes, boxes) for _ in range(ROUNDS)]
            bytes_written = found.numel() * found.element_size()
            self.say(
                "crops", sizes=sizes, batch=self.batch, side=self.side, note=note, written_mb=bytes_written / 1e6,
                difference_of_255=float((found - expected).abs().max() * 255),
                ms={name: spread(each) for name, each in times.items()},
            )  # fmt: skip

    def by_matrices(self, flat: torch.Tensor, axes: torch.Tensor, boxes: np.ndarray) -> float:
        """Seconds for the same by two matrix products an image; this needs images of one size."""
        images = flat.view(-1, 448, 448, 3)[: self.batch].permute(0, 3, 1, 2)
        corner = torch.from_numpy(np.asarray(boxes, np.float32)[:, :2]).to(flat.device)
        position = torch.arange(448, device=flat.device)
        step = torch.arange(self.side, device=flat.device)

        def work() -> torch.Tensor:
            at = (axes[..., :1] + step * axes[..., 1:2]).clamp(axes[..., 2:3], axes[..., 3:]) + corner[..., None]
            weights = (1 - (at[..., None] - position).abs()).clamp_(min=0)
            planes = images.float().div_(255)
            views = weights[:, None, 0] @ planes @ weights[:, None, 1].mT
            return views.contiguous(memory_format=torch.channels_last)

        return seconds(work, flat.device, 5)

    def losses(self, teacher: str, student: str, steps: int, **more: Any) -> list[float]:
        networks = {"t": network(teacher, 0), "s": network(student, 1)}
        found = []
        config = self.config(batch=min(self.batch, 32), compile="off", **more)
        with prepared(config, networks) as distillation:
            setup, trained = distillation.setup, distillation.setup.student
            scaler = devices.loss_scaler(setup.loop.device, setup.loop.precision)
            batches = (setup.loader.batch_at(step) for step in range(steps))
            for _, losses in fit(setup.loop, trained.classifier, trained.optimizer, scaler, batches, distillation.loss):
                found.append(losses["loss"].item())
        return found

    def numbers(self) -> None:
        teacher, student = self.pairs[-1]
        here = self.losses(teacher, student, 4)
        cpu = self.losses(teacher, student, 4, device="cpu", precision="fp32", teacher_precision="fp32")
        self.say("numbers", pair=f"{teacher} > {student}", accelerator=here, cpu_fp32=cpu)

    def pair(self, teacher: str, student: str, **more: Any) -> dict[str, Any]:
        """Seconds a step of a run, of the same on one batch, of its views alone; and its arithmetic."""
        networks = {"t": network(teacher, 0), "s": network(student, 1)}
        with prepared(self.config(**more), networks) as distillation:
            setup, config, trained = distillation.setup, distillation.setup.config, distillation.setup.student
            loop = setup.loop
            compile_student(trained.classifier, loop, config, config.side or 0)
            scaler = devices.loss_scaler(loop.device, loop.precision)

            def timed(batches: Iterable[Batch]) -> float:
                start = 0.0
                for number, _ in fit(loop, trained.classifier, trained.optimizer, scaler, batches, distillation.loss):
                    if number in (5, 5 + self.steps):
                        devices.synchronize(loop.device)
                        start = time.perf_counter() - start
                return start / self.steps

            def streamed() -> Iterator[Batch]:
                pin = distillation.objective.ahead or partial(Batch.pin_memory, device=loop.device)
                with closing(prefetch(setup.loader, 0, 5 + self.steps, workers=setup.workers, finish=pin)) as batches:
                    yield from batches

            fixed = setup.loader.batch_at(0).to(loop.device)
            rounds = range(2 if self.options.quick else ROUNDS)
            turns = [(timed(streamed()), timed(itertools.repeat(fixed, 5 + self.steps))) for _ in rounds]
            views = seconds(lambda: setup.loader.batch_at(3).to(loop.device), loop.device, 10)
            used = profiling.arithmetic(setup, distillation.teachers)
        in_run, alone = zip(*turns, strict=True)
        step = statistics.median(in_run)
        gflop = sum(used["gflop"].values())
        return {
            "precision": loop.precision, "compile": config.compile,
            "teacher_form": setup.provenance["teacher_forms"][0]["form"],
            "images_per_second": spread([self.batch / each for each in in_run]),
            "against_fixed_batch": spread([a / b for a, b in turns]),
            "step_ms": 1e3 * step, "fixed_ms": 1e3 * statistics.median(alone), "views_ms": 1e3 * views,
            "views_share": views / step, "gflop_a_step": gflop, "of_matrix_peak": gflop / step / used["peak_gflops"],
            "peak_tflops": used["peak_gflops"] / 1e3, "memory_gb": devices.peak_memory(loop.device) / 1e9,
        }  # fmt: skip

    def runs_of_pairs(self) -> None:
        device_gb = 1.0 if self.device.type == "cpu" else None
        for teacher, student in self.pairs:
            for name, more in (
                ("as it is", {"compile": "off" if self.options.quick else "on", "device_gb": device_gb}),
                ("not compiled", {"compile": "off", "device_gb": device_gb}),
                ("streamed", {"compile": "off" if self.options.quick else "on", "device_gb": 0.0}),
                ("with graphs", {"compile": "off" if self.options.quick else "max", "device_gb": device_gb}),
            ):
                devices.empty_cache(self.device)
                try:
                    figures = self.pair(teacher, student, **more)
                except Exception as error:  # one variant may fail on this device; the others are still measured
                    figures = {"failed": f"{type(error).__name__}: {error}"[:300]}
                self.say("pairs", pair=f"{teacher} > {student}", way=name, batch=self.batch, side=self.side, **figures)

    def timm(self) -> None:
        for teacher, student in self.pairs:
            for compiled in (True, False):
                if self.options.quick and compiled:
                    continue
                devices.empty_cache(self.device)
                step = self.timm_step(teacher, student, compiled)
                self.say("timm", pair=f"{teacher} > {student}", compiled=compiled, images_per_second=spread(step))
            devices.empty_cache(self.device)
            rates = self.timm_step(teacher, student, not self.options.quick, self.jpegs())
            self.say("timm", pair=f"{teacher} > {student}", end_to_end=True, images_per_second=spread(rates))

    def jpegs(self) -> Any:
        """timm's loader, repeated endlessly."""
        from timm.data import FastCollateMixup, create_dataset, create_loader

        root = str(self.folder / "images")
        dataset = create_dataset("", root=root, split="train", is_training=True, batch_size=self.batch)
        unchanged: Any = None
        loader = create_loader(
            dataset, (3, self.side, self.side), self.batch, is_training=True, use_prefetcher=True, scale=(0.05, 1.0),
            ratio=(3 / 4, 4 / 3), hflip=0.5, color_jitter=unchanged, interpolation="bilinear",
            num_workers=2 if self.options.quick else 16, device=self.device, persistent_workers=True,
            collate_fn=FastCollateMixup(mixup_alpha=1.0, num_classes=CLASSES),
        )  # fmt: skip
        return itertools.chain.from_iterable(itertools.repeat(loader))

    def timm_step(self, teacher: str, student: str, compiled: bool, batches: Any = None) -> list[float]:
        """Images/s of timm's task under AMP, on one prepared batch or on these batches."""
        from timm.optim import create_optimizer_v2
        from timm.task import LogitDistillationTask
        from timm.utils import dispatch_clip_grad

        last = torch.channels_last
        nets: list[Any] = [network(name, seed).to(self.device) for seed, name in enumerate((teacher, student))]
        nets = [net.to(memory_format=last) for net in nets]
        task = LogitDistillationTask(
            nets[1], nets[0], nn.CrossEntropyLoss(), task_loss_weight=0.0, distill_loss_weight=1.0, temperature=2.0,
            device=self.device, verbose=False,
        )  # fmt: skip
        task.train()
        if compiled:
            task.compile()
        optimizer = create_optimizer_v2(nets[1], opt="adamw", lr=1e-3, weight_decay=1e-4)
        images = torch.randn(self.batch, 3, self.side, self.side, device=self.device).contiguous(memory_format=last)
        fixed = itertools.repeat((images, torch.zeros(self.batch, dtype=torch.long, device=self.device)))
        stream = iter(batches or fixed)

        def step() -> None:
            images, target = next(stream)
            with torch.autocast(self.device.type, torch.bfloat16):
                loss = task(images.contiguous(memory_format=last), target)["loss"]
            optimizer.zero_grad()
            loss.backward()
            dispatch_clip_grad(nets[1].parameters(), 1.0, mode="norm")
            optimizer.step()

        rounds, repeats = (1, 2) if self.options.quick else (ROUNDS, 10)
        return [self.batch / seconds(step, self.device, repeats) for _ in range(rounds)]

    def waits(self) -> None:
        if not torch.cuda.is_available() or self.device.type != "cuda":
            self.say("waits", skipped="only CUDA counts them")
            return
        teacher, student = self.pairs[-1]
        networks = {"t": network(teacher, 0), "s": network(student, 1)}
        config = self.config(compile="off")
        with prepared(config, networks) as distillation, warnings.catch_warnings(record=True) as recorded:
            warnings.simplefilter("always")
            setup, trained = distillation.setup, distillation.setup.student
            scaler = devices.loss_scaler(setup.loop.device, setup.loop.precision)
            pin = partial(Batch.pin_memory, device=setup.loop.device)
            with closing(prefetch(setup.loader, 0, 30, workers=setup.workers, finish=pin)) as batches:
                for number, _ in fit(
                    setup.loop, trained.classifier, trained.optimizer, scaler, batches, distillation.loss
                ):
                    torch.cuda.set_sync_debug_mode("warn" if 10 <= number < 29 else "default")
        found = collections.Counter(
            f"{Path(each.filename).name}:{each.lineno}" for each in recorded if "synchroniz" in str(each.message)
        )
        self.say("waits", steps=19, waits=sum(found.values()), where=dict(found))

    def students(self) -> None:
        images = str(self.folder / "images")
        for name in dict.fromkeys(student for _, student in self.pairs):
            model, common = network(name, 1).eval(), {"device": self.options.device, "side": self.side}
            quick: dict[str, Any] = {"spread": "90%", "max_seconds": 2.0} if self.options.quick else {}
            found = funmatch.benchmark(
                model, data=images, formats=["eager", "compiled"], batches=[1, self.batch], images=64, memory=False,
                **common, **quick,
            )  # fmt: skip
            for each in found["results"]:
                kept = ("format", "status", "ms", "ms_p99", "images_per_second", "batch")
                self.say("students", student=name, **{key: each[key] for key in kept})
            paths = sorted((self.folder / "images").rglob("*.jpg"))
            began = time.perf_counter()
            funmatch.predict(model, paths, batch=self.batch, **common)
            self.say("students", student=name, predict=len(paths) / (time.perf_counter() - began), of="JPEGs a second")


def main() -> None:
    parts = ("crops", "numbers", "pairs", "timm", "waits", "students")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=parts, choices=parts)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--steps", type=int, default=40, help="timed steps of a round")
    parser.add_argument("--images", "--pictures", type=int, default=2048)
    parser.add_argument("--pair", nargs="+", type=int, help="indices of the pairs to run, from 0")
    parser.add_argument("--quick", action="store_true", help="small networks and a few steps, as a check")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        bench.pairs = [bench.pairs[i] for i in options.pair] if options.pair else bench.pairs
        versions = {"torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version()}
        name = platform.processor() if bench.device.type == "cpu" else devices.machine_signature(bench.device)[0]
        bench.say("machine", device=name, cores=os.cpu_count(), command=" ".join(sys.argv), **versions)
        for part in options.only:
            getattr(bench, "runs_of_pairs" if part == "pairs" else part)()


if __name__ == "__main__":
    main()
