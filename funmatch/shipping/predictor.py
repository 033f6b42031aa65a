"""Opens a model, and perhaps a teacher beside it, and predicts the classes of images in batches."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from funmatch.config import ImageOptions, PredictionOptions
from funmatch.errors import InputError
from funmatch.models.class_map import ClassMap, map_classes
from funmatch.models.clip.class_texts import class_texts_of
from funmatch.models.clip.names import is_clip
from funmatch.models.ensemble import select_classes
from funmatch.models.inference.features import is_headless
from funmatch.ops.tasks.task import task_of
from funmatch.runtime import devices
from funmatch.shipping.inference import Answers, Image, Network, answer, decoding_of, ready
from funmatch.training.student.trained_model import TrainedModel, info_side, open_described_model, open_trained_model


@dataclass(frozen=True)
class PredictedBatch:
    """What models predict for a batch of images.

    Attributes:
        answers: the images, and what was computed.
        probabilities: (readable, classes) float32.
        teacher: probabilities of the teacher, likewise, or None.
        columns: for each readable image `agreement` and `kl`, (readable,); empty without a teacher.
    """

    answers: Answers
    probabilities: Tensor
    teacher: Tensor | None = None
    columns: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Predictor:
    """A model, and perhaps a teacher beside it, that predict images.

    Attributes:
        trained: the model.
        networks: the model's, and the teacher's.
        classes: a name for each class.
        class_map: the teacher's classes for the model's, or None where they are the same.
        config: options.
        device: where the networks are.
    """

    trained: TrainedModel
    networks: Sequence[Network]
    classes: Sequence[str]
    class_map: ClassMap | None
    config: PredictionOptions
    device: torch.device

    def predict(self, images: Iterable[Image]) -> Iterator[PredictedBatch]:
        """Yields the predictions of images, in batches and in order."""
        how = decoding_of(self.config, self.trained)
        for each in answer(self.networks, images, how, self.config.batch, self.device):
            # Without an image that can be read there are no outputs.
            if not each.outputs:
                yield PredictedBatch(each, torch.empty(0, len(self.classes)))
                continue
            logits, *others = each.outputs
            task = task_of(self.trained.classifier.card.task)
            if not others:
                yield PredictedBatch(each, task.probabilities(logits))
                continue
            teacher = select_classes(others[0], self.class_map, task)
            compared = task.compare(logits, teacher)
            yield PredictedBatch(each, task.probabilities(logits), task.probabilities(teacher), compared)


def open_predictor(config: PredictionOptions, given: Mapping[str, Any] | None = None) -> Predictor:
    """Opens the model of a configuration, and its teacher.

    Args:
        given: modules from Python, by the names that stand for them.

    Raises:
        InputError: one cannot be loaded, or their classes differ.
    """
    # Before loading, so that a wrong --device does not cost a download.
    device = devices.pick_device(config.device)
    precision = devices.resolve_precision(config.precision, device)
    trained = open_model(config, given)
    _check_has_classes(trained)
    networks, class_map = [], None
    if config.teacher is not None:
        teacher = open_trained_model(
            config.teacher, weights=config.teacher_weights, side=config.teacher_side, given=given,
            texts=class_texts_of(config, [config.teacher]),
        )  # fmt: skip
        _check_has_classes(teacher)
        class_map = _map_teacher(trained, teacher, config)
        networks = [ready(teacher, device, precision)]
    networks = [ready(trained, device, precision), *networks]
    return Predictor(trained, networks, trained.class_names, class_map, config, device)


def open_model(config: ImageOptions, given: Mapping[str, Any] | None = None) -> TrainedModel:
    """Opens the model of a configuration."""
    trained = open_described_model(config, config.model, given)
    if not (config.side or trained.knobs.get("side")):
        info_side(trained.classifier, [config.model])
    return trained


def _check_has_classes(trained: TrainedModel) -> None:
    """Raises `InputError` for a network without classes, which has nothing to predict."""
    if is_headless(trained.classifier):
        name = "name them with --classes-from, or use" if is_clip(trained.name) else "use"
        raise InputError(f"{trained.name} has no classes to predict, only features; {name} `funmatch embed`")


def _map_teacher(trained: TrainedModel, teacher: TrainedModel, config: PredictionOptions) -> ClassMap | None:
    """Returns the teacher's classes for each of the model's; None where they are the same in the same order.

    Raises:
        InputError: they differ, and no option says how they correspond.
    """
    own, other = (task_of(each.classifier.card.task) for each in (trained, teacher))
    if own is not other and teacher.classifier.card.task:
        raise InputError(
            f"teacher {teacher.name} gives {other.of_model}, but {trained.name} gives {own.of_model}; their "
            "probabilities cannot be compared"
        )
    names, others = trained.classifier.card.classes, teacher.classifier.card.classes
    if config.classes is not None:
        return map_classes(teacher.classifier, trained.class_names, config.classes)
    advice = "pass --classes same-names or --classes map.json"
    if trained.classifier.num_classes != teacher.classifier.num_classes:
        raise InputError(
            f"teacher {teacher.name} has {teacher.classifier.num_classes} classes, but {trained.name} has "
            f"{trained.classifier.num_classes}; {advice} to map them"
        )
    if names and others and names != others and not config.trust_class_order:
        one, other = next((a, b) for a, b in zip(names, others, strict=True) if a != b)
        raise InputError(
            f"{trained.name} and its teacher {teacher.name} list different classes ({one} ≠ {other}, …); {advice} if "
            "the order or the names differ, or --trust-class-order if only the names do"
        )
    return None
