"""Judging a model or a run: accuracy, calibration, and closeness to a teacher."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from funmatch.config import Changes, Evaluate
from funmatch.data.cache.open_cache import Cache
from funmatch.data.cache.stores import CachedSplit
from funmatch.data.dataset import SPLIT_NAMES
from funmatch.errors import InputError, unknown
from funmatch.models.class_map import map_classes
from funmatch.models.classifier import Classifier, check_side
from funmatch.models.ensemble import EnsembleMember, TeacherEnsemble
from funmatch.models.inference.frozen import Frozen
from funmatch.models.load import load
from funmatch.runtime import devices
from funmatch.runtime.log import info, info_notes
from funmatch.training import datasets, scoring
from funmatch.training.run import folder as run_folder
from funmatch.training.teachers import loading


def run(config: Evaluate, given: loading.Modules | None = None) -> dict[str, Any]:
    """Judges a model or a run on a split of a data set.

    Args:
        given: modules from Python, by the names that stand for them.

    Returns:
        `top1`, `top5`, `agreement`, `kl`, `ece` (None where unknown), `split`, `pictures`, `parameters`, `step` and
        `run` (None for a model that is not a run), `model`, `data`, `teacher`.
    """
    config.check()
    given = given or {}
    device = devices.pick_device(config.device)
    taught = _run_of(config.model)
    knobs: dict[str, Any] = taught.config["knobs"] if taught else {}
    model = load(
        copy.deepcopy(given.get(config.model, config.model)),
        weights=config.weights,
        options=config.model_kwargs,
        pretrained=True,
        side=config.side,
    ).to(device)
    info_notes(config.model, model.notes)
    cache, learnt, judged = datasets.open_evaluation_data(config, taught.config["verb"] if taught else "", knobs)
    parameters, asked = model.count_parameters(), loading.wanted_classes(config, cache)
    picks = map_classes(model, asked, config.classes) if asked and config.classes else None
    if picks is None:
        scoring.check_classes(model, cache, trust_order=config.trust_class_order)
    split = _split(cache, config.split)
    view = _view(config, knobs, model, device)
    check_side(model, view.side)
    taught_by = _teachers(config, knobs, cache, view.side, given)
    asked_of = loading.Picked(EnsembleMember(Frozen(model), view.side, class_map=picks)) if picks else model
    answers = scoring.predict(asked_of, split, view)
    together = _answers(taught_by, split, view, answers.shape[-1], config.model) if taught_by else None
    figures = scoring.score(answers, split, together)
    figures.pop("balanced")
    result = (taught.result or {}) if taught else {}
    return run_folder.finite(figures) | {
        "split": split.name,
        "pictures": len(split),
        "parameters": parameters,
        "step": result.get("step"),
        "run": str(taught.folder) if taught else None,
        "model": config.model,
        "data": list(learnt if split.name == "train" else judged),
        "teacher": taught_by.name if taught_by else None,
    }


def _run_of(name: str) -> run_folder.Run | None:
    path = Path(name.removeprefix("local-dir:")).expanduser()
    return run_folder.find_run(path) if (path / "checkpoints").is_dir() or (path / "metrics.jsonl").is_file() else None


def _view(config: Evaluate, knobs: dict[str, Any], model: Classifier, device: torch.device) -> scoring.EvalView:
    """How the images are looked at: as said, else as the run did, else as the model wants."""
    side = config.side or knobs.get("side") or model.card.side
    same_side = side == knobs.get("side")
    resize = config.eval_resize or (
        knobs["eval_resize"] if same_side else scoring.default_eval_resize(side, model.card)
    )
    if resize < side:
        raise InputError(f"eval_resize ({resize}) must be at least side ({side})")
    squash = knobs["crop"] == "squash" if "crop" in knobs else model.card.squash
    precision = devices.resolve_precision(config.precision, device)
    return scoring.EvalView(side, resize, config.batch, device, precision, squash)


def _split(cache: Cache, name: str) -> CachedSplit:
    if name == "auto":
        return cache.splits.get("test") or cache.splits.get("val") or cache.splits["train"]
    name = SPLIT_NAMES.get(name, name)
    if name not in cache.splits:
        raise unknown("split", name, cache.splits)
    return cache.splits[name]


def _teachers(
    config: Evaluate, knobs: dict[str, Any], cache: Cache, side: int, given: loading.Modules
) -> TeacherEnsemble | None:
    """The teachers to compare with: as said, or those of the run; None where there are none, or no longer."""
    if config.teacher:
        return loading.ensemble_fp32(loading.load_teachers(config, cache, side, given), config.combine)
    if not knobs.get("teacher"):
        return None
    of_teachers = Evaluate.where(lambda opt: opt.changes == Changes.TEACHER)
    of_run = Evaluate(model=config.model, **{name: knobs[name] for name in of_teachers if name in knobs})
    try:
        return loading.ensemble_fp32(loading.load_teachers(of_run, cache, side, given), of_run.combine)
    except InputError as error:
        info(f"judged without the run's teacher: {error}")
        return None


def _answers(
    taught_by: TeacherEnsemble, split: CachedSplit, view: scoring.EvalView, classes: int, model: str
) -> Tensor:
    for member in taught_by.members:
        check_side(member.frozen.classifier, member.side)
    together, _ = loading.predict(taught_by.to(view.device), split, view)
    if together.shape[-1] != classes:
        raise InputError(f"teacher {taught_by.name} answers {together.shape[-1]} classes, {model} {classes}")
    return together
