"""Evaluates classifiers: predicts the images of a split, and scores the predictions."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from funmatch.config import Train
from funmatch.data.cache.device_store import DeviceStore
from funmatch.data.cache.open_cache import Cache
from funmatch.data.cache.stores import CachedSplit
from funmatch.data.loader import Batch, Batches
from funmatch.data.prefetch import prefetch_map
from funmatch.data.readers.split_names import TRAINING_IMAGES
from funmatch.models.classifier import Card
from funmatch.ops.corruptions import Damage
from funmatch.ops.crops import stack_views
from funmatch.ops.resizing import libraries
from funmatch.ops.tasks.task import Task, task_of
from funmatch.ops.view_spec import Preprocessing
from funmatch.runtime import devices, env, transfers

TRAIN_IMAGES_FOR_VALIDATION = 1000
"""Training images that stand in for a validation split, at most."""
VIEWS = 256
"""Training views that a student is scored on, rounded up to whole batches."""


@dataclass(frozen=True, kw_only=True)
class EvalView(Preprocessing):
    """The preprocessing of evaluation, and where it computes.

    Attributes:
        batch: images per forward pass.
        device: where the networks are.
        precision: arithmetic of autocast: fp32, bf16 or fp16.
        flip: whether logits are the mean of those of the view and of its mirror image.
        damage: how views are corrupted; None for the images as they are.
    """

    batch: int
    device: torch.device
    precision: str
    flip: bool = False
    damage: Damage | None = None


@dataclass(frozen=True)
class Evaluation:
    """Splits and preprocessing for the evaluations of a run.

    Attributes:
        validation: the split for evaluations during the run.
        test: the split for the finished student.
        view: the preprocessing of both.
    """

    validation: CachedSplit
    test: CachedSplit
    view: EvalView


def eval_view(config: Train, device: torch.device) -> EvalView:
    """Returns how a resolved configuration evaluates."""
    assert config.side
    assert config.eval_resize
    # Without gradients a whole batch usually fits even where training needs pieces.
    batch = config.batch // env.world_size()
    assert config.eval_resample
    return EvalView(
        side=config.side, short_side=config.eval_resize, squash=config.crop == "squash",
        resample=config.eval_resample, batch=batch, device=device, precision=config.precision,
    )  # fmt: skip


def eval_view_of(how: Preprocessing, batch: int, device: torch.device, precision: str) -> EvalView:
    """Returns how a preprocessing is evaluated, in batches on a device."""
    return EvalView(**vars(how), batch=batch, device=device, precision=precision)


def central_batches(
    split: CachedSplit, how: Preprocessing, batch: int, *, workers: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the images of a split once, in order, as evaluation sees them.

    Args:
        how: from an image to its view.
        batch: images at a time.
        workers: threads that decode ahead, where images have to be decoded.

    Yields:
        views (n, 3, side, side) float32 in [0, 1], and labels (n,) int64.
    """

    def make(number: int) -> tuple[Tensor, Tensor]:
        indices = np.arange(number * batch, min((number + 1) * batch, len(split)))
        # A library's own code needs the images on the host.
        if isinstance(split.store, DeviceStore) and how.resample in libraries.OWN:
            rows = split.index[indices]
            return split.store.central(rows, how.short_side, how.side, **how.shape), split.labels(indices)
        return stack_views([how.view(image) for image in split.images(indices)]), split.labels(indices)

    count = -(-len(split) // batch)
    return prefetch_map(make, 0, count, workers) if split.store.decodes else map(make, range(count))


@torch.inference_mode()
def predict(model: nn.Module, split: CachedSplit, view: EvalView) -> Tensor:
    """Predicts the logits of every image of a split.

    Returns:
        (n, classes) float32 on the CPU.
    """
    model.eval()
    # Copies to the host overlap with the next forward pass; only at the end are they waited for.
    logits = []
    batches = central_batches(split, view, view.batch, workers=devices.spare_threads())
    for number, (views, _) in enumerate(batches):
        shown = view.damage.apply(views, number * view.batch) if view.damage else views
        with devices.autocast(view.device, view.precision):
            found = model(on_device := transfers.to_device(shown, view.device)).float()
            if view.flip:
                found = (found + model(on_device.flip(-1)).float()) / 2
            logits.append(transfers.copy_to_host(found))
    return torch.cat([each.wait()[0] for each in logits])


@dataclass(frozen=True)
class ViewAnswers:
    """Answers to training views.

    Attributes:
        student, teacher: logits, (n, classes) each, or rows of answers.
        labels: as of `CachedSplit.labels`; the right ones of a mixed view are those of the image with more weight.
    """

    student: Tensor
    teacher: Tensor
    labels: Tensor

    def first(self, classes: int) -> "ViewAnswers":
        """Returns the logits, which stand in front in rows of answers."""
        return replace(self, student=self.student[:, :classes], teacher=self.teacher[:, :classes])


@torch.inference_mode()
def answer_training_views(
    logits_of: Callable[[Batch], tuple[Tensor, Tensor]],
    student: nn.Module,
    batches: Batches,
    step: int,
    view: EvalView,
) -> ViewAnswers:
    """Computes what student and teachers answer to *training* views of the next steps, in evaluation mode.

    Args:
        logits_of: maps a batch to the student's and the teachers' logits, (n, classes) each.
        batches: the training batches.
        step: the first step whose views are used; as many steps follow as give `VIEWS` views.
    """
    # The trainer switches back to training mode at the next step.
    student.eval()
    batches = batches.unsharded()  # the same views with any number of processes
    results: list[tuple[Tensor, Tensor, Tensor]] = []
    for number in range(step, step - (-VIEWS // batches.size)):
        batch = batches.batch_at(number).to(view.device)
        with devices.autocast(view.device, view.precision):
            logits, teacher_logits = logits_of(batch)
        # Row i is mixed with row i − 1, and the batch has one label more than rows.
        own = torch.as_tensor(batch.own_weight, device=view.device)
        # At equal weights the image itself counts. An image may have a row of labels.
        own = own.view(-1, *[1] * (batch.labels.ndim - 1))
        labels = torch.where(own >= 0.5, batch.labels[1:], batch.labels[:-1])
        results.append((logits.float().cpu(), teacher_logits.float().cpu(), labels.cpu()))
    return ViewAnswers(*map(torch.cat, zip(*results, strict=True)))


def score_views(answers: ViewAnswers, task: Task) -> dict[str, float | None]:
    """Scores the student against its teachers on training views.

    Agreement that rises here and falls on unseen images means memorising, not function matching.

    Returns:
        `Task.measure`, the teacher's `teacher_top1` (or `teacher_map`), and the number of `views`.
    """
    labels = answers.labels
    # One image without a label makes accuracies unknown, rather than those of a subset.
    true_labels = labels if bool((labels >= 0).all()) else None
    scores = task.measure(answers.student, true_labels, answers.teacher)
    of_teacher = None if true_labels is None else task.accuracy(answers.teacher, true_labels)
    return scores | {f"teacher_{task.score}": of_teacher, "views": len(answers.student)}


def score(logits: Tensor, split: CachedSplit, teacher_logits: Tensor | None = None) -> dict[str, float | None]:
    """Scores a split's logits.

    Args:
        logits: (n, classes).
        teacher_logits: (n, classes), or None.

    Returns:
        `Task.measure`; what needs labels or a teacher is None without them.
    """
    # Labels of unlabelled splits are −1, which must not count as a class.
    labels = split.labels(np.arange(len(split))) if split.labelled else None
    return task_of(split.task).measure(logits, labels, teacher_logits)


def validation_split(cache: Cache, val: str | None) -> CachedSplit:
    """Returns the split for evaluations during a run: validation, else some of the training images.

    Args:
        val: the resolved option. None without a validation split is a run of an earlier version, which is watched as it
            began: on the test images, where there are some.
    """
    # Nothing is chosen by test images, nor by training images: `Trainer.evaluate` finds no best student on them.
    for name in ("val", "test") if val is None else ("val",):
        if name in cache.splits:
            return cache.splits[name]
    train = cache.splits["train"]
    some = train.subset(evenly_spread(len(train), TRAIN_IMAGES_FOR_VALIDATION))
    return replace(some, name="train" if val is None else TRAINING_IMAGES)


def evenly_spread(count: int, most: int) -> np.ndarray:
    """Returns places of at most so many of a number of images: evenly spread, since those of a class lie together."""
    return np.linspace(0, count - 1, min(count, most)).astype(int)


def test_split(cache: Cache, val: str | None, *, with_teacher: bool) -> CachedSplit:
    """Returns the split for the finished student: test, else the validation split.

    Args:
        val: the resolved option.
        with_teacher: whether answers are compared with a teacher's, for which images need no labels.
    """
    test, validation = cache.splits.get("test"), validation_split(cache, val)
    # Test images without labels, as competitions publish them, measure nothing but agreement.
    return test if test and (test.labelled or with_teacher or not validation.labelled) else validation


def describe_unlabelled_test(cache: Cache, split: CachedSplit) -> str:
    """Returns a note where the test images have no labels but others have; empty otherwise.

    Args:
        split: that is evaluated on.
    """
    test, others = cache.splits.get("test"), [each.labelled for name, each in cache.splits.items() if name != "test"]
    if test is None or test.labelled or not any(others):
        return ""
    if split.name != test.name:
        return f"note: test has no labels, so the figures are of {split.name}; predict gives the answers for test"
    return "note: test has no labels, so only agreement is measured there; for accuracy, use evaluate --split val"


def default_eval_resize(side: int, card: Card) -> int:
    """Returns the default `eval_resize`, pixels: the card's at the card's own size, else as published."""
    # At another size the card's fraction does not apply: it was chosen for its own.
    return round(side / card.crop_fraction) if side == card.side else enlarged_side(side)


def enlarged_side(side: int) -> int:
    """Returns the short side before the crop, pixels: the paper crops 128 from 160 and 224 from 256, so 32 more.

    Small views get at most a quarter more.
    """
    return min(side + 32, side * 5 // 4)
