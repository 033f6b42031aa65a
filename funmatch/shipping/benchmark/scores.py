"""Measures top-1 and agreement of each format on evaluation images, so that a broken export shows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from funmatch.config import Evaluate
from funmatch.config.finished.benchmark import NO_TEACHER, Benchmark
from funmatch.data.cache.open_cache import Cache
from funmatch.data.cache.stores import CachedSplit
from funmatch.errors import InputError
from funmatch.models.class_map import ClassMap, map_classes
from funmatch.models.ensemble import TeacherEnsemble, select_classes
from funmatch.ops.tasks.task import task_of
from funmatch.runtime import devices
from funmatch.shipping.benchmark.candidates import Candidate
from funmatch.shipping.benchmark.formats import CALIBRATION_IMAGES, Machine
from funmatch.training import datasets
from funmatch.training.evaluation import class_order, scoring, subject
from funmatch.training.student.build import Modules
from funmatch.training.student.trained_model import TrainedModel
from funmatch.training.teachers import loading

AT_ONCE = 128
"""Images that are resized and held at a time."""


@dataclass(frozen=True)
class EvaluationImages:
    """The images that formats are evaluated on, and the teachers that they are compared with.

    Attributes:
        cache: the data set, for its classes.
        split: the images.
        available: how many images the whole split has.
        training: training images, evenly spread, by which INT8 chooses its ranges.
        class_maps: of each model, its outputs for each class of the images; None for its own.
        teachers: the teachers, or None.
        teacher_logits: their combined logits, (images, classes), or None.
    """

    cache: Cache
    split: CachedSplit
    available: int
    training: CachedSplit
    class_maps: tuple[ClassMap | None, ...]
    teachers: TeacherEnsemble | None = None
    teacher_logits: Tensor | None = None


def open_images(
    options: Benchmark, models: Sequence[TrainedModel], machine: Machine, given: Modules
) -> EvaluationImages | None:
    """Opens the images: as given, else those of the first run; and the teachers, whose outputs are computed.

    Returns:
        None where there are neither images nor a run.

    Raises:
        InputError: they cannot be opened, or a model or a teacher has other classes.
    """
    first = next((each for each in models if each.run), models[0] if models else None)
    if not options.data and (first is None or first.run is None):
        return None
    knobs, verb = (dict(first.knobs), first.run.config["verb"]) if first and first.run else ({}, "")
    name = first.name if first else options.models[0]
    options = subject.with_own_task(options, first) if first else options
    config = _as_evaluation(options, name)
    cache, _, _ = datasets.open_evaluation_data(options, name, verb, knobs)
    with_teacher = options.teacher != (NO_TEACHER,) and bool(options.teacher or knobs.get("teacher"))
    split = subject.pick_split(cache, options.split, with_teacher=with_teacher)
    some = split.subset(scoring.evenly_spread(len(split), options.images))
    # Before anything is timed. Other classes would give an accuracy near chance, and no error.
    maps = tuple(_class_map(each, cache, config) for each in models)
    # Not those that the loss is measured on, where there are others.
    training = cache.splits.get("train", split)
    training = training.subset(scoring.evenly_spread(len(training), CALIBRATION_IMAGES))
    images = EvaluationImages(cache, some, len(split), training, maps)
    if first is None or options.teacher == (NO_TEACHER,):
        return images
    view = scoring.eval_view_of(first.preprocessing, options.batch, machine.device, machine.precision)
    teachers = subject.open_teachers(config, knobs, cache, view, given)
    if teachers is None or not isinstance(teachers.network, TeacherEnsemble):
        return images
    outputs = first.classifier.num_classes if images.class_maps[0] is None else len(images.class_maps[0])
    logits = teachers.predict(some)
    if logits.shape[-1] != outputs:
        raise InputError(
            f"teacher {teachers.name} has {logits.shape[-1]} outputs, but {first.name} has {outputs}; pass --classes "
            "to map them"
        )
    return replace(images, teachers=teachers.network, teacher_logits=logits)


def _as_evaluation(options: Benchmark, name: str) -> Evaluate:
    """Returns the options of `evaluate` for a model and the images and teachers of a benchmark."""
    shared = (set(Evaluate.model_fields) & set(Benchmark.model_fields)) - {"config"}
    values: dict[str, Any] = {each: getattr(options, each) for each in shared} | {"model": name}
    if options.teacher == (NO_TEACHER,):
        values["teacher"] = ()
    return Evaluate.model_validate(values)


def _class_map(model: TrainedModel, cache: Cache, config: Evaluate) -> ClassMap | None:
    """Returns a model's outputs for each class of the images, as `--classes` says; None for its own."""
    class_order.with_task(model.classifier, cache.task, "model")
    wanted = loading.wanted_classes(config, cache)
    if wanted and config.classes:
        return map_classes(model.classifier, wanted, config.classes)
    class_order.check_classes(model.classifier, cache, trust_order=config.trust_class_order)
    return None


def score(candidates: Sequence[Candidate], images: EvaluationImages, after: Callable[[int], object]) -> None:
    """Fills in the scores of the formats of one model: `top1`, `agreement`, and `agreement_eager`.

    Each is None where it is unknown: without labels, without a teacher, without the format PyTorch.

    Args:
        candidates: ready to compute, of one model, PyTorch first.
        images: to evaluate on.
        after: called with the number of images that are done.
    """
    how = candidates[0].subject.preprocessing
    found: dict[int, list[np.ndarray]] = {number: [] for number in range(len(candidates))}
    batches = scoring.central_batches(images.split, how, AT_ONCE, workers=devices.spare_threads())
    done = 0
    for views, _ in batches:
        array = np.ascontiguousarray(views.numpy())
        for number, each in enumerate(candidates):
            try:
                if each.prepared:
                    found[number].append(_predict(each, array))
            except Exception as error:  # what computes one image may fail for others, as runtimes do
                each.fail(error)
        done += len(array)
        after(done)
    eager = None
    for number, each in enumerate(candidates):
        if not each.prepared:
            continue
        try:
            logits = select_classes(torch.from_numpy(np.concatenate(found[number])), each.subject.class_map)
            each.scores = _scores(logits, images)
        except InputError as error:
            each.fail(error)
            continue
        eager = logits if each.format == "eager" else eager
        if eager is not None:
            task = task_of(images.split.task)
            each.scores["agreement_eager"] = (task.decisions(logits) == task.decisions(eager)).double().mean().item()


def _scores(logits: Tensor, images: EvaluationImages) -> dict[str, float | None]:
    classes = len(images.cache.classes)
    if classes and logits.shape[-1] < classes:
        raise InputError(f"it has {logits.shape[-1]} outputs, but {images.cache.name} has {classes} classes")
    teacher = images.teacher_logits
    if teacher is not None and teacher.shape != logits.shape:
        raise InputError(f"it has {logits.shape[-1]} outputs, but the teacher has {teacher.shape[-1]}")
    found = scoring.score(logits, images.split, teacher)
    return {"top1": found["top1"], "agreement": found["agreement"]}


def _predict(candidate: Candidate, views: np.ndarray) -> np.ndarray:
    """Computes the logits of any number of views in batches of the size that the format is ready for."""
    assert candidate.prepared
    assert candidate.probe
    size, parts = candidate.probe.images, []
    for start in range(0, len(views), size):
        part = views[start : start + size]
        # The last one is filled up: `torch.compile` would compile another size anew.
        filled = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
        parts.append(candidate.prepared.predict(candidate.prepared.as_input(filled))[: len(part)])
    return np.concatenate(parts)
