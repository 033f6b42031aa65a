"""Evaluates a model or a run: accuracy, calibration, and agreement with its teachers."""

from typing import Any

from torch import Tensor

from funmatch.config import Changes, Evaluate
from funmatch.data.cache.open_cache import Cache
from funmatch.data.cache.stores import CachedSplit
from funmatch.data.readers.split_names import SPLIT_NAMES
from funmatch.errors import InputError, unknown
from funmatch.models.class_map import map_classes
from funmatch.models.classifier import check_side
from funmatch.models.ensemble import EnsembleMember, TeacherEnsemble
from funmatch.models.inference.frozen import Frozen
from funmatch.runtime import devices
from funmatch.runtime.log import info
from funmatch.training import datasets, scoring
from funmatch.training.run import folder as run_folder
from funmatch.training.student.trained_model import TrainedModel, info_side, open_trained_model
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
    trained = _open_model(config, given)
    knobs, model = dict(trained.knobs), trained.classifier.to(device)
    verb = trained.run.config["verb"] if trained.run else ""
    cache, training_data, evaluation_data = datasets.open_evaluation_data(config, config.model, verb, knobs)
    parameters, classes = model.count_parameters(), loading.wanted_classes(config, cache)
    class_map = map_classes(model, classes, config.classes) if classes and config.classes else None
    if class_map is None:
        scoring.check_classes(model, cache, trust_order=config.trust_class_order)
    split = _pick_split(cache, config.split)
    precision = devices.resolve_precision(config.precision, device)
    view = scoring.eval_view_of(trained.preprocessing, config.batch, device, precision)
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
        "step": trained.step,
        "run": str(trained.run.folder) if trained.run else None,
        "model": config.model,
        "data": list(training_data if split.name == "train" else evaluation_data),
        "teacher": teachers.name if teachers else None,
        "teacher_top1": None if teacher_logits is None else scoring.score(teacher_logits, split)["top1"],
    }


def _open_model(config: Evaluate, given: loading.Modules) -> TrainedModel:
    trained = open_trained_model(
        config.model, weights=config.weights, model_kwargs=config.model_kwargs, side=config.side,
        eval_resize=config.eval_resize, eval_resample=config.eval_resample, given=given,
    )  # fmt: skip
    if not (config.side or trained.knobs.get("side")):
        words = ["--weights", str(config.weights)] if config.weights else []
        info_side(trained.classifier, [config.model, *words, *(["--data", *config.data] if config.data else [])])
    return trained


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
