"""Judging a classifier: accuracy, calibration, and how close it is to a teacher."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from funmatch import devices, metrics, runs
from funmatch.config import Evaluate
from funmatch.data.cache import Cache
from funmatch.data.loader import central_batches
from funmatch.data.pixels import CachedSplit
from funmatch.data.sources import SPLIT_NAMES
from funmatch.errors import InputError, unknown
from funmatch.logs import say
from funmatch.models.classifier import Card, Classifier, check_side
from funmatch.models.load import load
from funmatch.tasks import pictures

WATCHED_WITHOUT_VALIDATION = 1000


@dataclass(frozen=True)
class View:
    """How evaluation looks at pictures, and where it computes.

    Attributes:
        side: of the views, pixels.
        short_side: to which pictures are resized before the central cut, pixels.
        batch: pictures at a time.
        device, precision: of the networks.
    """

    side: int
    short_side: int
    batch: int
    device: torch.device
    precision: str


@torch.inference_mode()
def answers(model: nn.Module, split: CachedSplit, view: View) -> Tensor:
    """Logits of every picture of a split, (n, classes) float32 on the CPU."""
    model.eval()
    logits = []
    workers = devices.spare_threads()
    for views, _ in central_batches(split, view.side, view.short_side, view.batch, workers=workers):
        with devices.autocast(view.device, view.precision):
            logits.append(model(views.to(view.device)).float().cpu())
    return torch.cat(logits)


def judge(logits: Tensor, split: CachedSplit, teacher_logits: Tensor | None = None) -> dict[str, float | None]:
    """`metrics.summary` of a split's logits, (n, classes)."""
    labels = split.labels(np.arange(len(split))) if split.labelled else None
    return metrics.summary(metrics.per_picture(logits, labels, teacher_logits))


def watched(cache: Cache) -> CachedSplit:
    """The split that a run is judged on while it goes on: validation, else test, else some of the training pictures."""
    for name in ("val", "test"):
        if name in cache.splits:
            return cache.splits[name]
    train = cache.splits["train"]
    some = np.linspace(0, len(train) - 1, min(len(train), WATCHED_WITHOUT_VALIDATION)).astype(int)
    return train.picked(some)


def final(cache: Cache) -> CachedSplit:
    """The split that a finished run is judged on: test, else the watched one."""
    return cache.splits.get("test") or watched(cache)


def short_side(side: int, card: Card) -> int:
    """The short side for evaluation views where nobody said: as the card says at its own side, else as published.

    The paper's views are 128 of 160 and 224 of 256 pixels: 32 more. Small views get at most a quarter more.
    """
    return round(side / card.crop_fraction) if side == card.side else min(side + 32, side * 5 // 4)


def check_classes(model: Classifier, cache: Cache, *, trust_order: bool) -> None:
    """Raises `InputError` unless the classes of a classifier are those of the data, in the same order."""
    if not cache.classes:
        return
    name, classes = model.card.name, cache.classes
    if cache.unnamed and model.num_classes >= len(classes):
        return
    if model.num_classes != len(classes):
        raise InputError(
            f"{name} answers {model.num_classes} classes, {cache.name} has {len(classes)} ({_few(classes)}); "
            "wanted a model with these classes. To learn from pictures of other things, say --unlabelled, or give "
            "pictures of the teacher's classes by --eval-data"
        )
    named = model.card.classes or ()
    if len(named) == len(classes) and named != classes and not trust_order:
        pairs = [f"{a} ≠ {b}" for a, b in zip(named, classes, strict=True) if a != b]
        raise InputError(
            f"the classes of {name} are not those of {cache.name}, in order: {_few(pairs)}; rename the folders, or "
            "say --trust-class-order if only the names differ"
        )


def _few(names) -> str:
    return ", ".join(map(str, names[:5])) + (", …" if len(names) > 5 else "")


def run(config: Evaluate) -> dict[str, Any]:
    """Judges a model or a run on a split of a data set.

    Returns:
        `top1`, `top5`, `agreement`, `kl`, `ece` (None where unknown), `split`, `pictures`, `parameters`, `step` and
        `run` (None for a model that is not a run), `model`, `data`, `teacher`.
    """
    config.check()
    device = devices.pick(config.device)
    taught = _run_of(config.model)
    knobs: dict[str, Any] = taught.config["knobs"] if taught else {}
    model = load(
        config.model, weights=config.weights, options=config.model_kwargs, pretrained=True, side=config.side
    ).to(device)
    cache, learnt, judged = pictures.of_evaluation(config, taught.config["verb"] if taught else "", knobs)
    check_classes(model, cache, trust_order=config.trust_class_order)
    split = _split(cache, config.split)
    side = config.side or knobs.get("side") or model.card.side
    same_side = side == knobs.get("side")
    resize = config.eval_resize or (knobs["eval_resize"] if same_side else short_side(side, model.card))
    if resize < side:
        raise InputError(f"eval_resize ({resize}) must be at least side ({side})")
    view = View(side, resize, config.batch, device, devices.resolve_precision(config.precision, device))
    check_side(model, side)
    teacher = _teacher(config, knobs, device)
    teacher_logits = None
    if teacher:
        check_side(teacher, side)
        if teacher.num_classes != model.num_classes:
            raise InputError(
                f"teacher {teacher.card.name} answers {teacher.num_classes} classes, {config.model} {model.num_classes}"
            )
        teacher_logits = answers(teacher, split, view)
    figures = judge(answers(model, split, view), split, teacher_logits)
    figures.pop("balanced")
    result = (taught.result or {}) if taught else {}
    return runs.finite(figures) | {
        "split": split.name,
        "pictures": len(split),
        "parameters": model.count(),
        "step": result.get("step"),
        "run": str(taught.folder) if taught else None,
        "model": config.model,
        "data": list(learnt if split.name == "train" else judged),
        "teacher": teacher.card.name if teacher else None,
    }


def _run_of(name: str) -> runs.Run | None:
    path = Path(name).expanduser()
    return runs.find(path) if (path / "checkpoints").is_dir() or (path / "metrics.jsonl").is_file() else None


def _split(cache: Cache, name: str) -> CachedSplit:
    if name == "auto":
        return cache.splits.get("test") or cache.splits.get("val") or cache.splits["train"]
    name = SPLIT_NAMES.get(name, name)
    if name not in cache.splits:
        raise unknown("split", name, cache.splits)
    return cache.splits[name]


def _teacher(config: Evaluate, knobs: dict[str, Any], device: torch.device) -> Classifier | None:
    if config.teacher:
        name, weights, options = config.teacher, config.teacher_weights, config.teacher_kwargs
        return load(name, weights=weights, options=options, pretrained=True, side=config.side).to(device)
    if not knobs.get("teacher"):
        return None
    weights = knobs["teacher_weights"] and Path(knobs["teacher_weights"])
    options = tuple(knobs["teacher_kwargs"])
    try:
        return load(knobs["teacher"], weights=weights, options=options, pretrained=True, side=config.side).to(device)
    except InputError as error:
        say(f"judged without the run's teacher: {error}")
        return None
