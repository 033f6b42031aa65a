"""No step makes the CPU wait for an accelerator, proven without one.

The tensors of a step are on the device "meta", which holds no numbers. What would wait for an accelerator fails there:
reading a number (`item`, `tolist`, `bool`, `cpu`), and shapes that depend on numbers (`nonzero`, indexing by a mask).
Copies to "meta" do not fail, so `Watched` looks at each: the CPU waits for it unless it is `non_blocking` and from
pinned memory. What never leaves the CPU is free.
"""

import copy
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from make_images import FEW
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from funmatch.config import Distill
from funmatch.data.cache.device_store import DeviceStore, move_to_device
from funmatch.data.cache.open_cache import open_cache
from funmatch.data.cache.storing import CacheOptions
from funmatch.data.loader import Batch, Loader
from funmatch.models.ensemble import select_classes
from funmatch.ops.optim import factory
from funmatch.ops.optim.updates import EMA
from funmatch.ops.view_spec import ViewSpec
from funmatch.runtime.signals import Requests
from funmatch.training import distill
from funmatch.training.run import folder as run_folder
from funmatch.training.run.loss_log import LossLog, LossMeter
from funmatch.training.setup import run_record
from funmatch.training.teachers.source import DistillLoader, Live
from funmatch.training.trainer import Trainer

META = torch.device("meta")
ATEN = torch.ops.aten
STEPS = 3
PINNED: list[Tensor] = []
"""What `pin_memory` has returned; held, so that no other tensor gets its memory."""


class Waits(AssertionError):
    """The CPU would wait for the accelerator."""


class Watched(TorchDispatchMode):
    """Raises `Waits` for a copy to the device for which the CPU would wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        host = [each for each in tensors if each.device.type == "cpu"]
        to_device = func is ATEN._to_copy.default and kwargs.get("device") == META
        if host and (to_device or (func is ATEN.copy_.default and args[0].device == META)):
            non_blocking = kwargs.get("non_blocking") or args[2:] == (True,)
            pinned = any(host[0].data_ptr() == each.data_ptr() for each in PINNED)
            if not (non_blocking and pinned):
                raise Waits(f"a copy to the device of {tuple(host[0].shape)}, {non_blocking=}, {pinned=}")
        # Scalars of the CPU are passed as arguments of a kernel.
        elif len(host) < len(tensors) and any(each.ndim for each in host):
            raise Waits(f"{func} copies a tensor to the device")
        return func(*args, **kwargs)


class WatchedCalls(TorchFunctionMode):
    """Raises `Waits` where numbers of Python become a tensor of the device; on "meta" no operation shows that."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        creates = func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == META
        if creates or (func is Tensor.new_tensor and args[0].device == META):
            raise Waits(f"{func.__name__} copies numbers to the device")
        if func in (Tensor.__getitem__, Tensor.__setitem__) and args[0].device == META:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(each, list | np.ndarray) for each in index):
                raise Waits("an index of Python is copied to the device")
        return func(*args, **kwargs)


def watched(work: Callable[[], Any]) -> Any:
    """Runs `work` where nothing may wait."""
    with WatchedCalls(), Watched():
        return work()


@pytest.fixture(name="accelerator", autouse=True)
def without_cuda(monkeypatch):
    """Replaces what needs hardware: pinned memory; and autocast and fused optimizers, which "meta" does not have."""

    def pin_memory(tensor: Tensor) -> Tensor:
        PINNED.append(tensor.clone())
        return PINNED[-1]

    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.accelerator, "device_index", lambda _: nullcontext())
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(sys.modules["torch.optim.adam"], "_device_dtype_check_for_fused", lambda *_: None)
    yield
    PINNED.clear()


def on_meta(given: distill.Distillation) -> distill.Distillation:
    """Returns a distillation whose networks, optimizer and average are on "meta"."""
    setup, config = given.setup, given.setup.config
    classifier = setup.student.classifier.to(META)
    assert config.lr is not None
    optimizer = factory.create_optimizer(
        config.optimizer, classifier.net, config.lr, config.weight_decay, **config.optimizer_arguments
    )
    ema = EMA(classifier, config.ema) if config.ema else None
    memory = setup.student.memory.to(META) if setup.student.memory else None
    student = replace(setup.student, classifier=classifier, optimizer=optimizer, ema=ema, memory=memory)
    setup = replace(setup, student=student, loop=replace(setup.loop, device=META))
    source = Live(given.teachers.to(META), config.temperature)
    matching = replace(given.matching, memory=memory) if given.matching else None
    return replace(given, setup=setup, source=source, batches=DistillLoader(setup.loader, source), matching=matching)


def take_steps(options: dict[str, Any], out: Path) -> LossMeter:
    """Takes steps of a run between two records, where nothing may wait; returns the losses that it has collected."""
    config = Distill.checked(**{
        "data": (FEW,), "teacher": ("fashion-mini-teacher",), "student": "fashion-mini-student", "batch": 8,
        "steps": 100, "precision": "fp32", "clip_norm": 1.0, "ema": 0.9,
        "log_every": 100, "eval_every": 100, "save_every": 100, "out": out, **options,
    })  # fmt: skip
    cache, config, loaded = distill.open_inputs(config)
    setup = distill.build_distill_setup(config, cache, loaded)
    with (
        distill.prepare(setup, loaded) as prepared,
        run_folder.open_run(config.out, "distill", *run_record(prepared.setup)) as run,
    ):
        trainer = Trainer(prepared.setup, run, prepared.objective)
        ready = on_meta(prepared)
        finish = ready.objective.ahead or partial(Batch.pin_memory, device=META)
        # Watched by itself, since it runs in the threads that prepare batches.
        trainer.objective = replace(ready.objective, ahead=lambda batch: watched(partial(finish, batch)))
        trainer.setup, trainer.student = ready.setup, ready.setup.student
        trainer.losses = LossLog(trainer.state, trainer.records, ready.setup.loop, config.batch)
        watched(lambda: list(islice(trainer.steps(Requests()), STEPS)))
        return trainer.losses.meter


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"micro_batch": 3, "mixup_mode": "image"},
        {"cutmix": 1.0, "label_weight": 0.5, "label_smoothing": 0.1},
        {"teacher_ahead": True},
        {"momentum_dtype": "bf16", "distance": "dist"},
        {"optimizer": "sgd", "weight_decay": 1e-4, "distance": "js", "standardise": True},
        {"strategy": "ind/rc", "distance": "hard"},
        {"match": ("logits", "features"), "feature_loss": ("queue-kl", "cosine")},
    ],
    ids=lambda options: " ".join(options) or "defaults",
)
def test_no_step_waits_for_the_accelerator(tmp_path, options):
    meter = take_steps(options, tmp_path / "run")
    assert meter.count == STEPS
    assert all(each.device == META for losses in meter.new.values() for each in losses)


@pytest.mark.parametrize("class_map", [((3,), (0,)), ((3, 1), (0,))])
def test_mapped_classes_are_selected_without_waiting(class_map):
    logits = torch.ones(2, 4, device=META)
    select_classes(logits, class_map)  # the first step copies the map to the device
    assert watched(lambda: select_classes(logits, class_map)).shape == (2, 2)


@pytest.mark.parametrize("sides", [(24,), (24, 32)])
@pytest.mark.parametrize("crop", ["inception", "mild"])
def test_crops_of_resident_images_are_cut_without_waiting(tmp_path, sides, crop):
    cache = open_cache(FEW, cache_options=CacheOptions(home=tmp_path / "kept"))
    split, _ = move_to_device(cache.splits["train"], torch.device("cpu"))
    assert isinstance(split.store, DeviceStore)
    store = copy.copy(split.store)
    store.flat = store.flat.to(META)
    loader = Loader(replace(split, store=store), ViewSpec(3, 8, 24, crop=crop, cutmix=1.0), teacher_sides=sides)
    batch = watched(lambda: loader.batch_at(1).pin_memory(META).to(META))
    assert batch.crops.shape == (9, 3, 24, 24)


def waiting() -> dict[str, Callable[[Tensor], object]]:
    return {
        "item": lambda x: x.sum().item(),
        "tolist": lambda x: x.tolist(),
        "cpu": lambda x: x.cpu(),
        "truth": lambda x: bool(x.sum() > 0),
        "nonzero": lambda x: x.nonzero(),
        "mask": lambda x: x[x > 0],
        "list as index": lambda x: x[:, [0, 1]],
        "array as index": lambda x: x[np.array([0, 1])],
        "tensor of the CPU as index": lambda x: x[torch.tensor([0, 1])],
        "new tensor": lambda x: torch.tensor([1.0, 2.0], device=x.device),
        "blocking copy": lambda x: torch.ones(2).pin_memory().to(x.device),
        "pageable copy": lambda x: torch.ones(2).to(x.device, non_blocking=True),
        "assignment": lambda x: x[0].copy_(torch.ones(3)),
    }


@pytest.mark.parametrize("name", waiting())
def test_what_waits_is_found(name):
    work = partial(waiting()[name], torch.ones(2, 3, device=META))
    with pytest.raises((Waits, RuntimeError, NotImplementedError)):
        watched(work)


def test_what_does_not_wait_passes():
    x = torch.ones(2, 3, device=META)
    watched(lambda: x * torch.tensor(2.0) + torch.ones(3).pin_memory().to(META, non_blocking=True))
    watched(lambda: torch.where(x > 0, x, 0)[:, torch.arange(2, device=META)])
