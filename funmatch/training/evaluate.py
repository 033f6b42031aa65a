"""Evaluates a model or a run: accuracy, calibration, and agreement with its teachers."""

import copy
import shlex
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from funmatch.config import Changes, Evaluate
from funmatch.config.choices import RESAMPLED_BEFORE
from funmatch.data.cache.open_cache import Cache
from funmatch.data.cache.stores import CachedSplit
from funmatch.data.readers.split_names import SPLIT_NAMES
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
from funmatch.training.teachers import checks, loading


def run(config: Evaluate, given: loading.Modules | None = None) -> dict[str, Any]:
    """Evaluates a model or a run on a split of a data set.

    Args:
        given: modules from Python, by the names that stand for them.

    Returns:
        `top1`, `top5`, `agreement`, `kl`, `ece`, `teacher_top1` (None where unknown), `split`, `pictures`,
        `parameters`, `step` and `run` (None for a model that is not a run), `model`, `data`, `teacher`.

    Raises:
        InputError: the model, its images or its teachers cannot be loaded, or do not fit each other.
    """
    config.check()
    given = given or {}
    # Before loading, so that a wrong --device does not cost a download.
    device = devices.pick_device(config.device)
    trained = _find_run(config.model)
    # A folder of a run says how its student sees images; other models have only their card.
    knobs: dict[str, Any] = trained.config["knobs"] if trained else {}
    model = _load_model(config, given).to(device)
    verb = trained.config["verb"] if trained else ""
    cache, training_data, evaluation_data = datasets.open_evaluation_data(config, verb, knobs)
    parameters, classes = model.count_parameters(), loading.wanted_classes(config, cache)
    class_map = map_classes(model, classes, config.classes) if classes and config.classes else None
    if class_map is None:
        scoring.check_classes(model, cache, trust_order=config.trust_class_order)
    split = _pick_split(cache, config.split)
    view = _eval_view(config, knobs, model, device)
    check_side(model, view.side)
    teachers = _load_teachers(config, knobs, cache, view.side, given)
    # Mapped classes are evaluated alone, as a teacher's would be.
    member = EnsembleMember(Frozen(model), view.side, class_map=class_map) if class_map else None
    logits = scoring.predict(checks.MemberLogits(member) if member else model, split, view)
    if class_map is None:
        scoring.check_number_order(model.card, cache.classes, logits, split, trust_order=config.trust_class_order)
    teacher_logits = _predict_teachers(teachers, split, view, logits.shape[-1], config.model) if teachers else None
    metrics = scoring.score(logits, split, teacher_logits)
    metrics.pop("balanced")  # only the check of teachers needs it; the result's keys are public
    return run_folder.finite(metrics) | {
        **datasets.about_images(split, cache, config.val or (None if config.data else knobs.get("val"))),
        "parameters": parameters,
        "step": (trained.result or {}).get("step") if trained else None,
        "run": str(trained.folder) if trained else None,
        "model": config.model,
        "data": list(training_data if split.name == "train" else evaluation_data),
        "teacher": teachers.name if teachers else None,
        "teacher_top1": None if teacher_logits is None else scoring.score(teacher_logits, split)["top1"],
    }


def _load_model(config: Evaluate, given: loading.Modules) -> Classifier:
    # A copy: loading may change the module's head or side, and the caller still owns it.
    model = load(
        copy.deepcopy(given.get(config.model, config.model)),
        weights=config.weights,
        options=config.model_kwargs,
        pretrained=True,
        side=config.side,
    )
    info_notes(config.model, model.notes)
    return model


def _find_run(name: str) -> run_folder.Run | None:
    """Returns the run that a model's name is the folder of, if it is one."""
    path = Path(name.removeprefix("local-dir:")).expanduser()
    return run_folder.find_run(path) if run_folder.looks_like_run(path) else None


def _eval_view(config: Evaluate, knobs: dict[str, Any], model: Classifier, device: torch.device) -> scoring.EvalView:
    """Returns the preprocessing: as given, else as in the run, else as the model's card says."""
    side = config.side or knobs.get("side") or model.card.side
    if not (config.side or knobs.get("side")) and (notes := model.card.side_notes):
        words = [config.model, *(["--weights", str(config.weights)] if config.weights else [])]
        words += ["--data", *config.data] if config.data else []
        info_notes(config.model, notes)
        sizes = " ".join(map(str, sorted({128, 160, 224, side})))
        info(f"to compare sizes: for s in {sizes}; do funmatch evaluate {shlex.join(words)} --side $s; done")
    # The run's resize belongs to its image size: at another one, the proportions of the crop would change.
    same_side = side == knobs.get("side")
    recorded = knobs.get("eval_resize") if same_side else None
    resize = config.eval_resize or recorded or scoring.default_eval_resize(side, model.card)
    # The crop would be larger than the image.
    if resize < side:
        raise InputError(f"eval_resize ({resize}) must be at least side ({side})")
    # Without a run, the card says whether images are squashed.
    squash = knobs["crop"] == "squash" if "crop" in knobs else model.card.squash
    precision = devices.resolve_precision(config.precision, device)
    # Runs were evaluated without antialias before there was a choice.
    of_run = knobs.get("eval_resample") or (RESAMPLED_BEFORE if knobs else None)
    resample = config.eval_resample or of_run or model.card.resample
    return scoring.EvalView(side, resize, config.batch, device, precision, squash, resample)


def _pick_split(cache: Cache, name: str) -> CachedSplit:
    """Returns the named split; `auto` is test, else validation, else training.

    Raises:
        InputError: there is none of this name.
    """
    # Test first: the best weights may have been chosen on the validation images.
    if name == "auto":
        return cache.splits.get("test") or cache.splits.get("val") or cache.splits["train"]
    name = SPLIT_NAMES.get(name, name)
    if name not in cache.splits:
        raise unknown("split", name, cache.splits)
    return cache.splits[name]


def _load_teachers(
    config: Evaluate, knobs: dict[str, Any], cache: Cache, side: int, given: loading.Modules
) -> TeacherEnsemble | None:
    """Returns the teachers to compare with: as given, else the run's; None where there are none, or no longer."""
    if config.teacher:
        return loading.ensemble_fp32(loading.load_teachers(config, cache, side, given), config.combine)
    if not knobs.get("teacher"):
        return None
    # Those options of the run that say which function its teachers are.
    of_teachers = Evaluate.where(lambda opt: opt.changes == Changes.TEACHER)
    of_run = Evaluate(model=config.model, **{name: knobs[name] for name in of_teachers if name in knobs})
    try:
        return loading.ensemble_fp32(loading.load_teachers(of_run, cache, side, given), of_run.combine)
    except InputError as error:
        # A teacher may have been moved since; accuracy needs none.
        info(f"evaluating without the run's teacher: {error}")
        return None


def _predict_teachers(
    teachers: TeacherEnsemble, split: CachedSplit, view: scoring.EvalView, num_classes: int, model: str
) -> Tensor:
    """Predicts the teachers' combined logits of a split, (n, classes).

    Args:
        num_classes: outputs of the model that they are compared with.
        model: its name, for messages.
    """
    # Before predicting: a wrong image size is then an error by name, not one from inside a layer.
    for member in teachers.members:
        check_side(member.frozen.classifier, member.side)
    combined, _ = checks.predict(teachers.to(view.device), split, view)
    if combined.shape[-1] != num_classes:
        raise InputError(
            f"teacher {teachers.name} has {combined.shape[-1]} outputs, but {model} has {num_classes}; pass --classes "
            "to map them"
        )
    return combined
