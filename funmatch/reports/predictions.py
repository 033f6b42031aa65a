"""Defines what `funmatch.predict` returns: a prediction for each image, with class names and probabilities."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import numpy as np
from torch import Tensor

from funmatch.config import PredictionOptions
from funmatch.reports.display import html_table
from funmatch.runtime.text import percent
from funmatch.shipping.predictor import PredictedBatch, open_predictor
from funmatch.shipping.sources.given import read_given

SHOWN = 10
"""Predictions that a `repr` lists."""


@dataclass(frozen=True, repr=False, eq=False)
class Prediction:
    """What a model predicts for an image.

    Attributes:
        path: of the file; empty for an image that was given as an object.
        top: class names and probabilities, the most probable first: as many as `topk`, of at least `threshold`.
        probabilities: of all classes, (classes,) float32; NaN for an image that cannot be read.
        classes: a name for each of them.
        error: why the image cannot be read, or None.
        teacher: what the teacher predicts, or None without one.
        agreement: whether the teacher's first class is the model's; None without a teacher.
        kl: KL(teacher ‖ model) in nats, or None without a teacher.
    """

    path: str
    top: tuple[tuple[str, float], ...]
    probabilities: np.ndarray
    classes: tuple[str, ...]
    error: str | None = None
    teacher: "Prediction | None" = None
    agreement: bool | None = None
    kl: float | None = None

    @property
    def label(self) -> str | None:
        """The most probable class; None where no class reaches the threshold, or the image cannot be read."""
        return self.top[0][0] if self.top else None

    @property
    def score(self) -> float | None:
        """The probability of `label`."""
        return self.top[0][1] if self.top else None

    @property
    def labels(self) -> list[str]:
        """The class names of `top`."""
        return [name for name, _ in self.top]

    @property
    def scores(self) -> np.ndarray:
        """The probabilities of `top`, float32."""
        return np.array([score for _, score in self.top], np.float32)

    def __repr__(self) -> str:
        shown = self.error or ", ".join(f"{name} {percent(score)}" for name, score in self.top) or "no class"
        return f"Prediction({f'{self.path!r}: ' if self.path else ''}{shown})"

    def _repr_html_(self) -> str:
        return html_table(["class", "probability"], [[name, percent(score)] for name, score in self.top])


class Predictions(Sequence[Prediction]):
    """What a model predicts for several images, in their order.

    Args:
        each: a prediction for each image.
        classes: a name for each class.
    """

    def __init__(self, each: Sequence[Prediction], classes: Sequence[str]) -> None:
        self.each, self.classes = tuple(each), tuple(classes)

    @property
    def labels(self) -> list[str | None]:
        """The most probable class of each image."""
        return [one.label for one in self.each]

    @property
    def scores(self) -> np.ndarray:
        """The probability of each image's most probable class, (n,) float32; NaN where there is none."""
        return np.array([np.nan if one.score is None else one.score for one in self.each], np.float32)

    @property
    def probabilities(self) -> np.ndarray:
        """The probabilities of all classes, (n, classes) float32."""
        rows = [one.probabilities for one in self.each]
        return np.stack(rows) if rows else np.empty((0, len(self.classes)), np.float32)

    @property
    def top(self) -> list[tuple[tuple[str, float], ...]]:
        """The class names and probabilities of each image's most probable classes."""
        return [one.top for one in self.each]

    def __len__(self) -> int:
        return len(self.each)

    @overload
    def __getitem__(self, index: int) -> Prediction: ...
    @overload
    def __getitem__(self, index: slice) -> "Predictions": ...
    def __getitem__(self, index: int | slice) -> "Prediction | Predictions":
        return Predictions(self.each[index], self.classes) if isinstance(index, slice) else self.each[index]

    def __iter__(self) -> Iterator[Prediction]:
        return iter(self.each)

    def __repr__(self) -> str:
        lines = [f"  {one!r}," for one in self.each[:SHOWN]]
        more = [f"  … {len(self) - SHOWN:,} more"] if len(self) > SHOWN else []
        return "\n".join(["Predictions([", *lines, *more, "])"]) if self.each else "Predictions([])"

    def _repr_html_(self) -> str:
        rows = [
            [one.path or f"image {number}", one.label or one.error or "–", percent(one.score)]
            for number, one in enumerate(self.each[:SHOWN])
        ]
        rows += [[f"… {len(self) - SHOWN:,} more", "", ""]] if len(self) > SHOWN else []
        return html_table(["image", "class", "probability"], rows)


def collect(config: PredictionOptions, images: Any, given: Mapping[str, Any]) -> Predictions:
    """Predicts images that are given in Python.

    Args:
        images: as `sources.given.read_given` takes them.
        given: modules, by the names that stand for them.

    Raises:
        InputError: a model cannot be loaded, or something given is not an image.
    """
    predictor = open_predictor(config, given)
    classes = tuple(predictor.classes)
    batches = predictor.predict(read_given(images, config))
    return Predictions([one for batch in batches for one in _each(batch, config, classes)], classes)


def _each(batch: PredictedBatch, config: PredictionOptions, classes: tuple[str, ...]) -> Iterator[Prediction]:
    """Yields the prediction of each image of a batch."""
    row = 0
    for path, reason in zip(batch.answers.paths, batch.answers.reasons, strict=True):
        if reason is not None:
            yield Prediction(path, (), np.full(len(classes), np.nan, np.float32), classes, reason)
            continue
        own = _one(path, batch.probabilities[row], config, classes)
        if batch.teacher is not None:
            own = replace(
                own,
                teacher=_one(path, batch.teacher[row], config, classes),
                agreement=bool(batch.columns["agreement"][row]),
                kl=batch.columns["kl"][row].item(),
            )
        yield own
        row += 1


def _one(path: str, probabilities: Tensor, config: PredictionOptions, classes: tuple[str, ...]) -> Prediction:
    best = probabilities.topk(min(config.topk, len(classes)))
    found = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    top = tuple((classes[index], value) for index, value in found if value >= config.threshold)
    return Prediction(path, top, probabilities.numpy(), classes)
