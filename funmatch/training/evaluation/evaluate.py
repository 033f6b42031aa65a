"""Evaluates a model or a run, or several on the same images: accuracy, calibration, agreement with a teacher."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from funmatch.config import Evaluate
from funmatch.errors import InputError
from funmatch.models.inference.features import is_headless
from funmatch.training import datasets
from funmatch.training.evaluation import class_order, embedding, figures, label_sets, robustness
from funmatch.training.evaluation.figures import Scores
from funmatch.training.evaluation.scaling import scale_temperature
from funmatch.training.evaluation.subject import Opened, Subject, check_same_classes, open_all
from funmatch.training.run import folder as run_folder
from funmatch.training.teachers.loading import Modules

NO_CLASSES: dict[str, Any] = dict.fromkeys(
    ("top1", "top5", "agreement", "agreement5", "kl", "ece", "teacher", "teacher_top1")
)
"""Metrics of a model without classes, which has features alone."""
OF_TEACHER_SETS = ("map", "f1_micro", "f1_macro", "nll", "brier", "intervals")
"""Metrics of a teacher that gives an image any number of classes."""
SHOWN_IMAGES = 24
"""Images on which model and teacher differ most that a result lists."""


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        opened: the models, images and teachers.
        metrics: what `--json` prints.
        scores: of the first model; None where it has no classes.
        names: of the classes.
        others: scores of the models that it is compared with.
        answers: of all models, where images have any number of classes.
    """

    opened: Opened
    metrics: dict[str, Any]
    scores: Scores | None = None
    names: tuple[str, ...] = ()
    others: list[Scores] = field(default_factory=list)
    answers: list[label_sets.Answers] = field(default_factory=list)


def run(config: Evaluate, given: Modules | None = None) -> dict[str, Any]:
    """Evaluates a model or a run on a split of a data set; returns the metrics of `evaluate`."""
    return evaluate(config, given).metrics


def evaluate(config: Evaluate, given: Modules | None = None) -> Evaluation:
    """Evaluates a model or a run on a split of a data set.

    Args:
        given: modules from Python, by the names that stand for them.

    Returns:
        metrics with `top1`, `top5`, `agreement`, `kl`, `ece`, `teacher_top1` (None where unknown), `split`, `pictures`,
        `parameters`, `step` and `run` (None for a model that is not a run), `model`, `data`, `teacher`, and those that
        docs/evaluation.md lists.

    Raises:
        InputError: the model, its images or its teachers cannot be loaded, or do not fit each other.
    """
    config.check()
    opened = open_all(config, given or {})
    first, *others = opened.subjects
    headless = [each.name for each in opened.subjects if _has_no_classes(each)]
    # Before anything is predicted, which may take minutes.
    if headless and config.per_image:
        raise InputError(f"{headless[0]} has no classes, so there is nothing to write with --per-image")
    embedded = {}
    if config.embedding or headless:
        embedded = {
            each.name: embedding.measure(each, opened.cache, opened.split, config.seed) for each in opened.subjects
        }
    if headless:
        metrics, *rest = (
            _about(each, opened) | NO_CLASSES | {"embedding": embedded[each.name]} for each in opened.subjects
        )
        return Evaluation(opened, run_folder.finite(metrics | ({"others": rest} if rest else {})))
    if opened.cache.task == "multilabel":
        return _evaluate_sets(opened, config, embedded)
    labels = opened.split.labels(slice(None)) if opened.split.labelled else None
    teacher_logits = opened.teachers.predict(opened.split) if opened.teachers else None
    scores = [_score(each, opened, labels, teacher_logits, config) for each in opened.subjects]
    names = class_names(opened, scores[0].classes)
    found = [_figures(*each, opened, names) for each in zip(opened.subjects, scores, strict=True)]
    for each, metrics in zip(opened.subjects, found, strict=True):
        metrics |= {"embedding": embedded[each.name]} if embedded else {}
    for each, own, metrics in zip(others, scores[1:], found[1:], strict=True):
        check_same_classes(first, each, (scores[0].classes, own.classes))
        metrics["difference"] = figures.compare(scores[0], own, config.seed)
    metrics = found[0] | _beside_teacher(opened, scores[0], teacher_logits, config.seed)
    metrics |= {"corruptions": robustness.measure(opened, config)} if config.corruptions else {}
    metrics |= {"others": found[1:]} if others else {}
    return Evaluation(opened, run_folder.finite(metrics), scores[0], names, scores[1:])


def _evaluate_sets(opened: Opened, config: Evaluate, embedded: dict[str, Any]) -> Evaluation:
    """Evaluates models that give an image any number of classes.

    Args:
        embedded: by the models' names what their features give; empty where they are not measured.
    """
    first, *others = opened.subjects
    labels = opened.split.labels(slice(None)) if opened.split.labelled else None
    teacher_logits = opened.teachers.predict(opened.split) if opened.teachers else None
    logits = [each.predict(opened.split) for each in opened.subjects]
    compared = [*zip(others, logits[1:], strict=True)]
    if opened.teachers and teacher_logits is not None:
        compared.append((opened.teachers, teacher_logits))
    for other, own in compared:
        check_same_classes(first, other, (logits[0].shape[-1], own.shape[-1]))
    names = class_names(opened, logits[0].shape[-1])
    answers = [label_sets.Answers(own, labels, teacher_logits) for own in logits]
    found = [
        NO_CLASSES | label_sets.figures(own, labels, teacher_logits, names, config.seed) | _about(each, opened)
        for each, own in zip(opened.subjects, logits, strict=True)
    ]
    for each, own in zip(opened.subjects, found, strict=True):
        own |= {"embedding": embedded[each.name]} if embedded else {}
    metrics = found[0] | {"teacher": None, "teacher_map": None}
    if opened.teachers and teacher_logits is not None:
        own = label_sets.figures(teacher_logits, labels, None, names, config.seed)
        metrics |= {"teacher": opened.teachers.name, "teacher_map": own["map"]}
        metrics["of_teacher"] = {name: own[name] for name in OF_TEACHER_SETS}
    metrics |= {"corruptions": robustness.measure(opened, config)} if config.corruptions else {}
    metrics |= {"others": found[1:]} if others else {}
    return Evaluation(opened, run_folder.finite(metrics), None, names, answers=answers)


def _has_no_classes(subject: Subject) -> bool:
    return subject.trained is not None and is_headless(subject.trained.classifier)


def _score(
    subject: Subject, opened: Opened, labels: Tensor | None, teacher_logits: Tensor | None, config: Evaluate
) -> Scores:
    """Predicts a model's logits and computes their columns."""
    logits = subject.predict(opened.split)
    assert subject.trained
    if not subject.mapped:
        card, classes = subject.trained.classifier.card, opened.cache.classes
        class_order.check_number_order(card, classes, logits, opened.split, trust_order=config.trust_class_order)
    if opened.teachers and teacher_logits is not None:
        check_same_classes(subject, opened.teachers, (logits.shape[-1], teacher_logits.shape[-1]))
    return figures.score(logits, labels, teacher_logits)


def class_names(opened: Opened, count: int) -> tuple[str, ...]:
    """Returns a name for each output: the data's classes, else the model's, else numbers."""
    cache, trained = opened.cache, opened.subjects[0].trained
    own = trained.classifier.card.classes if trained else None
    # Numbers as names would be worse than the model's real ones.
    known = [cache.classes if not cache.unnamed else None, own, cache.classes]
    return next((each for each in known if each and len(each) == count), tuple(map(str, range(count))))


def _about(subject: Subject, opened: Opened) -> dict[str, Any]:
    """Returns what a result says of a model and its images."""
    trained = subject.trained
    assert trained
    return {
        **datasets.about_images(opened.split, opened.cache, opened.val),
        "parameters": subject.parameters,
        "step": trained.step,
        "run": str(trained.run.folder) if trained.run else None,
        "model": subject.name,
        "data": list(opened.data),
    }


def _figures(subject: Subject, scores: Scores, opened: Opened, names: tuple[str, ...]) -> dict[str, Any]:
    """Returns all metrics of one model."""
    rows = figures.class_rows(scores, names)
    worst = figures.differing_images(scores, SHOWN_IMAGES)
    found = figures.figures(scores) | scale_temperature(subject, scores, opened)
    found |= {"classes": rows, "confusions": figures.confusions(scores, names)}
    if "kl" in scores.columns:
        found["differing"] = {
            "classes": figures.differing_classes(rows or []),
            "images": [image_row(scores, names, number) for number in worst],
        }
    return found | _about(subject, opened)


def image_row(scores: Scores, names: tuple[str, ...], number: int) -> dict[str, Any]:
    """Returns what the model, and its teacher, say of one image, by its `number` in the split."""
    columns = scores.columns
    row: dict[str, Any] = {"number": number}
    if scores.labels is not None:
        row["label"] = names[int(scores.labels[number])]
    row |= {"predicted": names[int(columns["predicted"][number])], "confidence": float(columns["confidence"][number])}
    if "teacher" in columns:
        row["teacher"] = names[int(columns["teacher"][number])]
        row["teacher_confidence"] = float(columns["teacher_confidence"][number])
        row["kl"] = float(columns["kl"][number])
    return row


def _beside_teacher(opened: Opened, scores: Scores, teacher_logits: Tensor | None, seed: int) -> dict[str, Any]:
    """Returns the teacher's own metrics, and the model's difference from it."""
    if opened.teachers is None or teacher_logits is None:
        return {"teacher": None, "teacher_top1": None}
    own = figures.score(teacher_logits, scores.labels)
    found = figures.figures(own)
    keys = ("top1", "top5", "ece", "nll", "brier", "entropy", "aurc", "class_balanced", "intervals")
    return {
        "teacher": opened.teachers.name,
        "teacher_top1": found["top1"],
        "of_teacher": {key: found[key] for key in keys},
        "teacher_difference": figures.compare(own, scores, seed),
    }
