"""Judging a model or a run: accuracy, calibration, and closeness to a teacher."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from funmatch import devices, runs
from funmatch.config import Evaluate
from funmatch.data.cache import Cache
from funmatch.data.pixels import CachedSplit
from funmatch.data.sources import SPLIT_NAMES
from funmatch.errors import InputError, unknown
from funmatch.logs import say, say_notes
from funmatch.models.classes import match
from funmatch.models.classifier import Classifier, check_side
from funmatch.models.frozen import Frozen
from funmatch.models.load import load
from funmatch.models.teachers import Member, Teachers
from funmatch.tasks import judging, pictures, teachers

# What a run says of its teachers, and an evaluation may say otherwise.
OF_TEACHERS = (
    "teacher", "teacher_weights", "teacher_kwargs", "teacher_side", "teacher_share", "combine", "classes",
)  # fmt: skip


def run(config: Evaluate, given: teachers.Modules | None = None) -> dict[str, Any]:
    """Judges a model or a run on a split of a data set.

    Args:
        given: modules from Python, by the names that stand for them.

    Returns:
        `top1`, `top5`, `agreement`, `kl`, `ece` (None where unknown), `split`, `pictures`, `parameters`, `step` and
        `run` (None for a model that is not a run), `model`, `data`, `teacher`.
    """
    config.check()
    given = given or {}
    device = devices.pick(config.device)
    taught = _run_of(config.model)
    knobs: dict[str, Any] = taught.config["knobs"] if taught else {}
    model = load(
        copy.deepcopy(given.get(config.model, config.model)),
        weights=config.weights,
        options=config.model_kwargs,
        pretrained=True,
        side=config.side,
    ).to(device)
    say_notes(config.model, model.notes)
    cache, learnt, judged = pictures.of_evaluation(config, taught.config["verb"] if taught else "", knobs)
    parameters, asked = model.count(), teachers.asked(config, cache)
    picks = match(model, asked, config.classes) if asked and config.classes else None
    if picks is None:
        judging.check_classes(model, cache, trust_order=config.trust_class_order)
    split = _split(cache, config.split)
    view = _view(config, knobs, model, device)
    check_side(model, view.side)
    taught_by = _teachers(config, knobs, cache, view.side, given)
    asked_of = teachers.Picked(Member(Frozen(model), view.side, picks=picks)) if picks else model
    answers = judging.answers(asked_of, split, view)
    together = _answers(taught_by, split, view, answers.shape[-1], config.model) if taught_by else None
    figures = judging.judge(answers, split, together)
    figures.pop("balanced")
    result = (taught.result or {}) if taught else {}
    return runs.finite(figures) | {
        "split": split.name,
        "pictures": len(split),
        "parameters": parameters,
        "step": result.get("step"),
        "run": str(taught.folder) if taught else None,
        "model": config.model,
        "data": list(learnt if split.name == "train" else judged),
        "teacher": taught_by.name if taught_by else None,
    }


def _run_of(name: str) -> runs.Run | None:
    path = Path(name.removeprefix("local-dir:")).expanduser()
    return runs.find(path) if (path / "checkpoints").is_dir() or (path / "metrics.jsonl").is_file() else None


def _view(config: Evaluate, knobs: dict[str, Any], model: Classifier, device: torch.device) -> judging.View:
    """How the pictures are looked at: as said, else as the run did, else as the model wants."""
    side = config.side or knobs.get("side") or model.card.side
    same_side = side == knobs.get("side")
    resize = config.eval_resize or (knobs["eval_resize"] if same_side else judging.short_side(side, model.card))
    if resize < side:
        raise InputError(f"eval_resize ({resize}) must be at least side ({side})")
    squash = knobs["crop"] == "squash" if "crop" in knobs else model.card.squash
    precision = devices.resolve_precision(config.precision, device)
    return judging.View(side, resize, config.batch, device, precision, squash)


def _split(cache: Cache, name: str) -> CachedSplit:
    if name == "auto":
        return cache.splits.get("test") or cache.splits.get("val") or cache.splits["train"]
    name = SPLIT_NAMES.get(name, name)
    if name not in cache.splits:
        raise unknown("split", name, cache.splits)
    return cache.splits[name]


def _teachers(
    config: Evaluate, knobs: dict[str, Any], cache: Cache, side: int, given: teachers.Modules
) -> Teachers | None:
    """The teachers to compare with: as said, or those of the run; None where there are none, or no longer."""
    if config.teacher:
        return teachers.plainly(teachers.call(config, cache, side, given), config.combine)
    if not knobs.get("teacher"):
        return None
    of_run = Evaluate(model=config.model, **{name: knobs[name] for name in OF_TEACHERS if name in knobs})
    try:
        return teachers.plainly(teachers.call(of_run, cache, side, given), of_run.combine)
    except InputError as error:
        say(f"judged without the run's teacher: {error}")
        return None


def _answers(taught_by: Teachers, split: CachedSplit, view: judging.View, classes: int, model: str) -> Tensor:
    for member in taught_by.members:
        check_side(member.frozen.classifier, member.side)
    together, _ = teachers.answers(taught_by.to(view.device), split, view)
    if together.shape[-1] != classes:
        raise InputError(f"teacher {taught_by.name} answers {together.shape[-1]} classes, {model} {classes}")
    return together
