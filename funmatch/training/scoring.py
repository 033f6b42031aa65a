"""Evaluates classifiers: predicts the images of a split, and scores the predictions."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from funmatch.config import Train
from funmatch.data.batch import Batch
from funmatch.data.cache.open_cache import Cache
from funmatch.data.cache.stores import CachedSplit
from funmatch.data.loader import Batches, central_batches
from funmatch.errors import InputError
from funmatch.models.classifier import Card, Classifier
from funmatch.ops import metrics
from funmatch.runtime import devices, env, transfers

WATCHED_WITHOUT_VALIDATION = 1000
VIEWS = 256
"""Training views on which a student is judged, about."""


@dataclass(frozen=True)
class EvalView:
    """How evaluation looks at images, and where it computes.

    Attributes:
        side: of the views, pixels.
        short_side: to which images are resized before the central cut, pixels.
        batch: images at a time.
        device, precision: of the networks.
        squash: whether both sides are resized to `short_side`.
    """

    side: int
    short_side: int
    batch: int
    device: torch.device
    precision: str
    squash: bool = False


@dataclass(frozen=True)
class Evaluation:
    """What a run's student is evaluated on.

    Attributes:
        validation: the split for evaluations during the run.
        test: the split for the finished student.
        view: how it is shown images.
    """

    validation: CachedSplit
    test: CachedSplit
    view: EvalView


def eval_view(config: Train, device: torch.device) -> EvalView:
    """How a resolved configuration evaluates."""
    assert config.side
    assert config.eval_resize
    batch = config.batch // env.world_size()
    return EvalView(config.side, config.eval_resize, batch, device, config.precision, config.crop == "squash")


@torch.inference_mode()
def predict(model: nn.Module, split: CachedSplit, view: EvalView) -> Tensor:
    """Logits of every image of a split, (n, classes) float32 on the CPU."""
    model.eval()
    logits = []
    shape = view.side, view.short_side, view.batch
    for views, _ in central_batches(split, *shape, squash=view.squash, workers=devices.spare_threads()):
        with devices.autocast(view.device, view.precision):
            logits.append(transfers.copy_to_host(model(transfers.to_device(views, view.device)).float()))
    return torch.cat([each.wait()[0] for each in logits])


@torch.inference_mode()
def score_training_views(
    logits_of: Callable[[Batch], tuple[Tensor, Tensor]],
    student: nn.Module,
    batches: Batches,
    step: int,
    view: EvalView,
) -> dict[str, float | None]:
    """Scores the student against its teachers on the *training* views of the next steps, in evaluation mode.

    Agreement that rises here and falls on unseen images means memorising, not function matching.

    Args:
        logits_of: a batch to the student's and the teachers' logits, (n, classes) each.
        batches: the training batches.
        step: whose views are the first; as many steps as give `VIEWS` views.

    Returns:
        `metrics.summarize`, and `teacher_top1`; the right class of a mixed view is that of the image with more weight.
    """
    student.eval()
    batches = batches.unsharded()  # the same views with any number of processes
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for number in range(step, step - (-VIEWS // batches.size)):
        batch = batches.batch_at(number).to(view.device)
        with devices.autocast(view.device, view.precision):
            logits, teacher_logits = logits_of(batch)
        own = torch.as_tensor(batch.own_weight, device=view.device)
        labels = torch.where(own >= 0.5, batch.labels[1:], batch.labels[:-1])
        found.append((logits.float().cpu(), teacher_logits.float().cpu(), labels.cpu()))
    logits, teacher_logits, labels = map(torch.cat, zip(*found, strict=True))
    known = labels if bool((labels >= 0).all()) else None
    scores = metrics.summarize(metrics.per_image(logits, known, teacher_logits))
    right = None if known is None else (teacher_logits.argmax(-1) == known).double().mean().item()
    return scores | {"teacher_top1": right, "views": len(logits)}


def score(logits: Tensor, split: CachedSplit, teacher_logits: Tensor | None = None) -> dict[str, float | None]:
    """`metrics.summarize` of a split's logits, (n, classes)."""
    labels = split.labels(np.arange(len(split))) if split.labelled else None
    return metrics.summarize(metrics.per_image(logits, labels, teacher_logits))


def validation_split(cache: Cache) -> CachedSplit:
    """The split that a run is judged on while it goes on: validation, else test, else some of the training images."""
    for name in ("val", "test"):
        if name in cache.splits:
            return cache.splits[name]
    train = cache.splits["train"]
    some = np.linspace(0, len(train) - 1, min(len(train), WATCHED_WITHOUT_VALIDATION)).astype(int)
    return train.subset(some)


def test_split(cache: Cache) -> CachedSplit:
    """The split that a finished run is judged on: test, else the watched one."""
    return cache.splits.get("test") or validation_split(cache)


def default_eval_resize(side: int, card: Card) -> int:
    """The short side for evaluation views where nobody said: as the card says at its own side, else as published."""
    return round(side / card.crop_fraction) if side == card.side else enlarged_side(side)


def enlarged_side(side: int) -> int:
    """The short side of which views are cut, both in pixels: 128 of 160 and 224 of 256 in the paper, so 32 more.

    Small views get at most a quarter more.
    """
    return min(side + 32, side * 5 // 4)


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
            "wanted a model with these classes. If it knows them among others, say --classes same-names or --classes "
            "map.json. To learn from images of other things, say --unlabelled, or give images of the teacher's "
            "classes by --eval-data"
        )
    named = model.card.classes or ()
    if len(named) == len(classes) and named != classes and not trust_order:
        pairs = [f"{a} ≠ {b}" for a, b in zip(named, classes, strict=True) if a != b]
        raise InputError(
            f"the classes of {name} are not those of {cache.name}, in order: {_few(pairs)}; say --classes "
            "same-names or --classes map.json if it knows them in another order or by other names, or "
            "--trust-class-order if only the names differ"
        )


def _few(names) -> str:
    return ", ".join(map(str, names[:5])) + (", …" if len(names) > 5 else "")
