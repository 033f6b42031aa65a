"""Parts of gpu.py: each measures one thing and reports it line by line."""

import collections
import copy
import itertools
import os
import statistics
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import funmatch
from funmatch.config import Distill
from funmatch.data.cache.device_store import fastest_crop_kernel
from funmatch.data.loader import Batch
from funmatch.data.prefetch import prefetch
from funmatch.models.flops import gflop
from funmatch.models.inference.frozen import Frozen, try_mode
from funmatch.models.inference.modes import InferenceMode
from funmatch.models.inference.reference import Reference
from funmatch.models.load import load
from funmatch.ops import grids, resample
from funmatch.ops.sampling import box_sampler
from funmatch.runtime import devices
from funmatch.training import distill, profiling
from funmatch.training.loop import fit
from funmatch.training.student.compilation import compile_student

CLASSES, ROUNDS = 10, 3
Report = Callable[..., None]
SHARED_OPTIONS = (
    "side", "batch", "device", "unlabelled", "val", "allow_weak_teacher", "temperature", "clip_norm", "optimizer", "lr",
    "precision", "teacher_precision",
)  # fmt: skip
"""Options of the pairs' runs that those which resume have, too."""


@dataclass(frozen=True)
class Pair:
    """A teacher and a student, the side of their images and the batch."""

    teacher: str
    student: str
    side: int
    batch: int

    def __str__(self) -> str:
        return f"{self.teacher} > {self.student}"

    def networks(self) -> dict[str, Any]:
        return {"t": network(self.teacher, 0), "s": network(self.student, 1)}


def network(name: str, seed: int) -> Any:
    """A network with random weights, including a head that is not zero."""
    torch.manual_seed(seed)
    net: Any = timm.create_model(name, num_classes=CLASSES)
    torch.nn.init.normal_(net.get_classifier().weight, std=0.01)
    return net


def make_images(folder: Path, count: int) -> None:
    """JPEGs of about 384 pixels, of several shapes, with the detail of photographs: smooth noise of several scales."""

    def make(i: int) -> None:
        rng, size = np.random.default_rng(i), [(384, 384), (500, 375), (375, 500), (448, 336)][i % 4]
        noise = [Image.fromarray(rng.integers(0, 256, (s, s, 3), dtype=np.uint8)) for s in (6, 24, 96)]
        pixels = np.mean([np.asarray(each.resize(size)) for each in noise], axis=0).astype(np.uint8)
        path = folder / "train" / f"{i % CLASSES}" / f"{i:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=92)

    with ThreadPoolExecutor() as pool:
        list(pool.map(make, range(count)))


@contextmanager
def tf32(allowed: bool) -> Generator[None]:
    """Lets products and convolutions in fp32 round to TF32, or not; PyTorch's default is convolutions alone."""
    switches: Any = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [each.allow_tf32 for each in switches]
    for each in switches:
        each.allow_tf32 = allowed
    try:
        yield
    finally:
        for each, value in zip(switches, before, strict=True):
            each.allow_tf32 = value


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values), "n": len(values)}


@contextmanager
def prepared(config: Distill, networks: dict[str, nn.Module]) -> Generator[distill.Distillation]:
    """A distillation that is ready to train."""
    cache, config, loaded = distill.open_inputs(config, networks)
    with distill.prepare(distill.build_distill_setup(config, cache, loaded, networks), loaded) as distillation:
        yield distillation


def updates(distillation: distill.Distillation, batches: Iterator[Batch]) -> Iterator[torch.Tensor]:
    """Takes steps as a run does; yields their losses, on the device."""
    loop, trained = distillation.setup.loop, distillation.setup.student
    scaler = devices.loss_scaler(loop.device, loop.precision)
    for _, losses in fit(loop, trained.classifier, trained.optimizer, scaler, batches, distillation.loss):
        yield losses["loss"]


def streamed(distillation: distill.Distillation) -> Iterator[Batch]:
    """Batches as a run gets them: made ahead in threads, from JPEGs that were decoded once."""
    setup = distillation.setup
    pin = partial(Batch.pin_memory, device=setup.loop.device)
    with closing(prefetch(setup.loader, 0, setup.loop.steps, workers=setup.workers, finish=pin)) as batches:
        yield from batches


class Bench:
    """What all parts share: where results go, the device, the images and the pairs."""

    def __init__(self, report: Report, device: torch.device, folder: Path, pairs: list[Pair], *, quick: bool) -> None:
        self.report, self.device, self.folder, self.pairs, self.quick = report, device, folder, pairs, quick
        os.environ["FUNMATCH_CACHE"] = str(folder / "cache")
        make_images(folder / "images", 40 if quick else 2048)
        # timm's loader begins anew with each epoch, so it gets the same files under many names.
        for path in (folder / "images" / "train").rglob("*.jpg"):
            for number in range(1 if quick else 32):
                link = folder / "many" / "train" / path.parent.name / f"{path.stem}-{number}.jpg"
                link.parent.mkdir(parents=True, exist_ok=True)
                os.link(path, link)
        self.gflop: dict[str, float] = {}
        self.rates: dict[tuple[str, str, str], dict[str, float]] = {}

    def config(self, pair: Pair, **more: Any) -> Distill:
        options: dict[str, Any] = {
            "data": (str(self.folder / "images"),), "teacher": ("t",), "student": "s", "side": pair.side,
            "batch": pair.batch, "steps": 10_000, "device": str(self.device), "unlabelled": True, "val": "none",
            "allow_weak_teacher": True, "temperature": 2.0, "clip_norm": 1.0, "optimizer": "adamw", "lr": 1e-3,
            "compile": "off", "out": self.folder / "run",
        }  # fmt: skip
        if self.device.type != "cpu":
            options |= {"precision": "bf16", "teacher_precision": "bf16"}
        return Distill.checked(**options | more)

    def timed(self, step: Callable[[], object], *, warm: int = 5) -> list[float]:
        """Seconds a step of several rounds of about a second."""
        warm, least, most = (1, 1, 2) if self.quick else (warm, 3, 40)

        def seconds(steps: int) -> float:
            devices.synchronize(self.device)
            began = time.perf_counter()
            for _ in range(steps):
                step()
            devices.synchronize(self.device)
            return (time.perf_counter() - began) / steps

        seconds(warm)
        steps = min(most, max(least, round(1 / seconds(least))))
        return [seconds(steps) for _ in range(ROUNDS)]

    def kernel(self) -> None:
        """Crops of images of several sizes: the accelerator's kernel and indexing beside the CPU."""
        rng, side, batch = np.random.default_rng(0), 128, 8 if self.quick else 512
        shape = rng.integers(300, 640, (batch, 2))
        lengths = 3 * shape.prod(1)
        starts = np.cumsum(lengths) - lengths
        flat = torch.from_numpy(rng.integers(0, 256, int(lengths.sum()), dtype=np.uint8))
        boxes, flips = box_sampler("inception")(rng, *shape.T), rng.random(batch) < 0.5
        grid = grids.crop_then_resize(starts, shape.T, boxes, side).flipped(flips, side)
        on_device = flat.to(self.device)
        sample, note = fastest_crop_kernel(on_device)
        for method in resample.FILTERS:
            away = (
                sample(on_device, grid, side, method).cpu() - resample.sample_by_torch(flat, grid, side, method)
            ).abs()
            ms = spread([1e3 * each for each in self.timed(partial(sample, on_device, grid, side, method))])
            self.report(
                "kernel", method=method, batch=batch, side=side, greatest_difference_of_255=float(away.max() * 255),
                values_over_half_a_level=float((away > 0.5 / 255).float().mean()), ms=ms, note=note,
            )  # fmt: skip

    def precision(self) -> None:
        """Teachers, losses and short runs in each precision beside fp32 that never rounds to TF32."""
        pair = self.pairs[-1]
        small, more = replace(pair, batch=min(32, pair.batch)), {"precision": "fp32", "teacher_precision": "fp32"}
        with tf32(False):
            found = {"fp32 without TF32": self.losses(small, **more)}
        found |= {each: self.losses(small, **more | {"precision": each}) for each in ("fp32", "bf16")}
        found["fp32 on the CPU"] = self.losses(small, device="cpu", **more)
        for name, losses in found.items():
            self.report("precision: losses of steps", pair=str(pair), precision=name, losses=losses)
        steps: Any = {"steps": 4 if self.quick else 100, "eval_every": 1000, "save_every": 1000}
        ways = dict.fromkeys([(str(self.device), "bf16"), (str(self.device), "fp32"), ("cpu", "fp32")])
        for device, precision in ways if not self.quick else [("cpu", "fp32")]:
            run = funmatch.distill(
                "fashion-mini", "fashion-mini-teacher", "fashion-mini-student", self.folder / f"{device}-{precision}",
                **steps | {"device": device, "precision": precision},
            )  # fmt: skip
            figures = {name: run.metrics[name] for name in ("kl", "agreement", "top1")}
            self.report("precision: runs on embedded images", device=device, precision=precision, **steps, **figures)
        for pair in self.pairs:
            net = network(pair.teacher, 0)
            views = nn.functional.interpolate(torch.rand(8 if self.quick else 64, 3, 16, 16), pair.side).to(self.device)
            make = partial(lambda net, side: load(copy.deepcopy(net), side=side), net, pair.side)
            reference = Reference(views)
            with tf32(False):
                reference.extend(lambda make=make: Frozen(make().to(self.device)), len(views))
            for precision in ("fp32", "bf16") if self.quick else ("fp32", "bf16", "fp16"):
                _, check = try_mode(make, InferenceMode(precision=precision), reference)
                figures = {"kl": check.kl, "agreement": check.agreement, "passes": check.good, "failed": check.failed}
                self.report("precision: teachers", teacher=pair.teacher, precision=precision, **figures)

    def losses(self, pair: Pair, **more: Any) -> list[float]:
        with prepared(self.config(pair, **more), pair.networks()) as distillation:
            batches = map(distillation.setup.loader.batch_at, range(4))
            return [float(loss) for loss in updates(distillation, batches)]

    def rate(self, pair: Pair, whose: str, feed: str, seconds: list[float], **more: Any) -> None:
        """Reports images/s, and keeps the step's time for `peak`."""
        self.rates[str(pair), whose, feed] = spread(seconds)
        rates = spread([pair.batch / each for each in seconds])
        memory = devices.peak_memory(self.device) / 1e9
        self.report(
            "pairs", pair=str(pair), side=pair.side, batch=pair.batch, whose=whose, fed_from=feed,
            images_per_second=rates, memory_gb=memory, **more,
        )  # fmt: skip

    def ours(self, pair: Pair) -> None:
        devices.empty_cache(self.device)
        began, device_gb = time.perf_counter(), 1.0 if self.device.type == "cpu" else None
        with prepared(self.config(pair, device_gb=device_gb), pair.networks()) as distillation:
            setup, trained = distillation.setup, distillation.setup.student.classifier
            nets = [member.frozen.classifier.net for member in distillation.teachers.members]
            teacher, student = gflop(nets[0], pair.side), gflop(trained.net, pair.side)
            self.gflop[str(pair)] = pair.batch * ((teacher or np.nan) + 3 * (student or np.nan))
            facts = {"set_up_s": time.perf_counter() - began, "precision": setup.loop.precision}
            fixed = setup.loader.batch_at(0).to(self.device)

            def measure(whose: str, **facts: Any) -> None:
                for feed, batches in (("tensors", itertools.repeat(fixed)), ("JPEGs", streamed(distillation))):
                    steps = updates(distillation, batches)
                    self.rate(pair, whose, feed, self.timed(lambda steps=steps: next(steps), warm=10), **facts)
                    steps.close()  # pyrefly: ignore

            measure("ours", **facts)
            if self.quick:
                return
            began = time.perf_counter()
            for member in distillation.teachers.members:
                member.frozen.mode = replace(member.frozen.mode, compiled=True)
            compile_student(trained, setup.loop, setup.config.model_copy(update={"compile": "on"}), pair.side)
            next(updates(distillation, itertools.repeat(fixed)))
            if trained.compiled_net is None:
                raise RuntimeError("the student could not be compiled")
            measure("ours, compiled", set_up_s=time.perf_counter() - began)

    def timm(self, pair: Pair) -> None:
        from timm.optim import create_optimizer_v2
        from timm.task import LogitDistillationTask
        from timm.utils import dispatch_clip_grad

        devices.empty_cache(self.device)
        last = torch.channels_last
        teacher, student = (net.to(self.device, memory_format=last) for net in pair.networks().values())
        task = LogitDistillationTask(
            student, teacher, nn.CrossEntropyLoss(), task_loss_weight=0.0, distill_loss_weight=1.0, temperature=2.0,
            device=self.device, verbose=False,
        )  # fmt: skip
        task.train()
        optimizer = create_optimizer_v2(student, opt="adamw", lr=1e-3, weight_decay=1e-4)
        images = torch.randn(pair.batch, 3, pair.side, pair.side, device=self.device).contiguous(memory_format=last)
        tensors = itertools.repeat((images, torch.zeros(pair.batch, dtype=torch.long, device=self.device)))

        def step(batches: Iterator[Any]) -> None:
            images, target = next(batches)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type != "cpu"):
                loss = task(images.contiguous(memory_format=last), target)["loss"]
            optimizer.zero_grad()
            loss.backward()
            dispatch_clip_grad(student.parameters(), 1.0, mode="norm")
            optimizer.step()

        self.rate(pair, "timm", "tensors", self.timed(partial(step, tensors)))
        whose, began = "timm", time.perf_counter()
        if not self.quick:
            whose = "timm, compiled"
            task.compile()
            step(tensors)
            facts = {"set_up_s": time.perf_counter() - began}
            self.rate(pair, whose, "tensors", self.timed(partial(step, tensors)), **facts)
        # The loader starts with batches that were ready; they are used up before the time counts.
        self.rate(pair, whose, "JPEGs", self.timed(partial(step, self.timm_batches(pair)), warm=50))

    def timm_batches(self, pair: Pair) -> Iterator[Any]:
        """Batches of timm's loader, as its train.py builds it, without end."""
        from timm.data import FastCollateMixup, create_dataset, create_loader

        unchanged: Any = None
        loader = create_loader(
            create_dataset("", root=str(self.folder / "many"), split="train", is_training=True, batch_size=pair.batch),
            (3, pair.side, pair.side), pair.batch, is_training=True, use_prefetcher=True, scale=(0.05, 1.0),
            ratio=(3 / 4, 4 / 3), hflip=0.5, color_jitter=unchanged, interpolation="bilinear", device=self.device,
            num_workers=2 if self.quick else min(16, os.cpu_count() or 1), persistent_workers=True,
            collate_fn=FastCollateMixup(mixup_alpha=1.0, num_classes=CLASSES),
        )  # fmt: skip
        return itertools.chain.from_iterable(itertools.repeat(loader))

    def peak(self) -> None:
        """Matrix products of this device, and what share of bf16's each pair's steps reach."""
        on_cpu, peaks = self.device.type == "cpu", {}
        for name, precision, rounded in (("bf16", "bf16", False), ("TF32", "fp32", True), ("fp32", "fp32", False)):
            if not (on_cpu and name == "TF32"):
                with tf32(rounded):
                    peaks[name] = profiling.peak(self.device, precision) / 1e3
        self.report("peak", **{f"{name} TFLOP/s": value for name, value in peaks.items()})
        for (pair, whose, feed), seconds in self.rates.items():
            tflop, other = (
                self.gflop.get(pair, np.nan) / 1e3,
                self.rates.get((pair, whose.replace("ours", "timm"), feed)),
            )
            self.report(
                "shares", pair=pair, whose=whose, fed_from=feed, step_ms=1e3 * seconds["median"], tflop_a_step=tflop,
                of_bf16_peak=tflop / seconds["median"] / peaks["bf16"],
                times_timm=other["median"] / seconds["median"] if other and whose.startswith("ours") else None,
            )  # fmt: skip

    def resume(self) -> None:
        """A run beside the same run that is stopped halfway: the same bits, or how far apart."""
        for compile_ in ("off",) if self.quick else ("off", "on"):
            for deterministic in (False, True):
                torch.backends.cudnn.deterministic = deterministic
                try:
                    different = self.differences(compile_, f"{compile_}-{deterministic}")
                finally:
                    torch.backends.cudnn.deterministic = False
                self.report(
                    "resume", compile=compile_, cudnn_deterministic=deterministic, bitwise_equal=not different,
                    different_tensors=len(different), greatest_difference=max(different.values(), default=0.0),
                )  # fmt: skip
                if not different:  # cuDNN's deterministic kernels are tried only where they are needed
                    break

    def differences(self, compile_: str, name: str) -> dict[str, float]:
        """Returns the greatest difference of each tensor that is not the same to the bit."""
        pair, steps = self.pairs[-1], 4 if self.quick else 20
        config, networks = self.config(pair), pair.networks()
        options: Any = {name: getattr(config, name) for name in SHARED_OPTIONS}
        options |= {"steps": steps, "log_every": 1, "eval_every": steps, "save_every": steps, "compile": compile_}

        def run(folder: str, stop: int | None) -> dict[str, torch.Tensor]:
            def on_event(event: str, step: int, _values: dict[str, Any]) -> None:
                if event == "step" and step == stop:
                    raise InterruptedError

            done = funmatch.distill(
                str(self.folder / "images"), networks["t"], networks["s"], self.folder / name / folder,
                on_event=on_event, **options,
            )  # fmt: skip
            return load_file(done.folder / "student" / "model.safetensors")

        whole = run("whole", None)
        try:
            run("parts", steps // 2)
            raise AssertionError("the run was not stopped")
        except InterruptedError:
            parts = run("parts", None)
        pairs = {key: (whole[key].double(), parts[key].double()) for key in whole}
        return {key: float((a - b).abs().max()) for key, (a, b) in pairs.items() if not torch.equal(a, b)}

    def waits(self) -> None:
        """Where steps make the CPU wait, as CUDA reports it."""
        if self.device.type != "cuda":
            self.report("waits", note="only CUDA reports them")
            return
        pair = self.pairs[-1]
        with (
            prepared(self.config(pair), pair.networks()) as distillation,
            warnings.catch_warnings(record=True) as found,
        ):
            warnings.simplefilter("always")
            for number, _ in enumerate(itertools.islice(updates(distillation, streamed(distillation)), 30)):
                torch.cuda.set_sync_debug_mode("warn" if 9 <= number < 28 else "default")
        where = collections.Counter(
            f"{Path(each.filename).name}:{each.lineno}" for each in found if "synchroniz" in str(each.message)
        )
        self.report("waits", steps=19, waits=sum(where.values()), where=dict(where))

    def predict(self) -> None:
        paths = sorted((self.folder / "images").rglob("*.jpg"))
        for pair in self.pairs:
            began = time.perf_counter()
            funmatch.predict(network(pair.student, 1), paths, batch=pair.batch, device=str(self.device), side=pair.side)
            self.report("predict", student=pair.student, jpegs_per_second=len(paths) / (time.perf_counter() - began))
