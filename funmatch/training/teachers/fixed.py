"""Computes the logits of fixed teachers once per training image, and caches them under a digest of what they depend on.

A part of the images at a time, so that processes share the work; see `runtime.disk.parts`.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from funmatch.config import Distill
from funmatch.config.choices import CROP_RATIO, RESAMPLED_BEFORE, STRATEGIES, Resample
from funmatch.data.cache.stores import CachedSplit
from funmatch.data.prefetch import prefetch_map
from funmatch.errors import InputError
from funmatch.models.ensemble import TeacherEnsemble
from funmatch.ops.crops import central_view, crop_resize_flip
from funmatch.ops.sampling import ENSEMBLE_STREAM, sample_inception_boxes, sample_whole_boxes, step_generator
from funmatch.ops.tasks.task import MULTICLASS
from funmatch.runtime import devices
from funmatch.runtime.disk.files import cache_home
from funmatch.runtime.disk.parts import compute_in_parts, read_whole
from funmatch.runtime.log import info
from funmatch.training.setup import TrainSetup
from funmatch.training.teachers.freezing import COMPARED_IMAGES

PART = 1024
"""Approximate number of views that are predicted between two writes to the disk."""


@dataclass(frozen=True)
class FixedViews:
    """The views of images that a fixed teacher sees.

    Attributes:
        split: the images.
        kind: whole, central or ensemble; see `Strategy.teacher`.
        crops: views per image.
        side: image size of the student, pixels.
        resize: short side before the student's mild crops, pixels; the central view has the same proportions.
        squash: whether mild crops are cut from the whole image resized to a square.
        min_area, ratio: of the ensemble's Inception crops, as of `sampling.sample_inception_boxes`.
        resample: how images are resized.
    """

    split: CachedSplit
    kind: str
    crops: int
    side: int
    resize: int
    squash: bool
    min_area: float
    ratio: tuple[float, float] = CROP_RATIO
    resample: Resample = "tf"

    def views(self, image: int, which: slice, sides: Sequence[int]) -> dict[int, Tensor]:
        """Crops some of the views of an image; half of an ensemble's are mirrored, as training views are.

        Args:
            image: its number in the split.
            which: of its `crops` views.
            sides: sizes at which each view is returned, pixels.

        Returns:
            (n, 3, side, side) float32 in [0, 1], by side.
        """
        pixels = self.split.image(image)
        if self.kind == "central":
            shapes = {side: round(self.resize * side / self.side) for side in sides}
            how = {"squash": self.squash, "method": self.resample}
            return {side: central_view(pixels, short, side, **how)[None] for side, short in shapes.items()}
        size = np.full(self.crops, pixels.shape[0]), np.full(self.crops, pixels.shape[1])
        # Seeded by the image alone, not by the run, so that all students share one cache entry.
        rng = step_generator(0, image, ENSEMBLE_STREAM)
        if self.kind == "whole":
            boxes, flips = sample_whole_boxes(rng, *size), np.zeros(self.crops, bool)
        else:
            flips = rng.random(self.crops) < 0.5
            boxes = sample_inception_boxes(rng, *size, min_area=self.min_area, ratio=self.ratio)
        # All boxes are drawn before some are chosen, so that a view does not depend on the batch size.
        boxes, flips = boxes[which], flips[which]
        patches = [pixels[top : top + height, left : left + width] for top, left, height, width in boxes.tolist()]
        # The patch begins at its own corner.
        boxes[:, :2] = 0
        return {side: crop_resize_flip(patches, boxes, flips, side, method=self.resample) for side in sides}


def fixed_views(setup: TrainSetup[Distill]) -> FixedViews:
    """Returns the views that the teachers of a resolved configuration see."""
    config = setup.config
    kind = STRATEGIES[config.strategy].teacher
    crops = config.teacher_crops if kind == "ensemble" else 1
    split = setup.loader.split
    return FixedViews(
        split,
        kind,
        crops,
        setup.evaluation.view.side,
        config.resize or 0,
        config.crop == "squash",
        config.crop_min_area,
        config.crop_ratio,
        config.resampled,
    )


def images_at_once(setup: TrainSetup[Distill]) -> int:
    """Returns the number of images whose views are made at once to compare inference modes."""
    return min(COMPARED_IMAGES, setup.evaluation.view.batch, len(setup.loader.split))


def some_views(setup: TrainSetup[Distill], sides: Sequence[int], number: int) -> dict[int, Tensor]:
    """Returns one view of each of some training images, by side: of the first `images_at_once` for number 0, and so on.

    Inference modes are compared on them.
    """
    source, size = fixed_views(setup), images_at_once(setup)
    images = range(number * size, min((number + 1) * size, len(source.split)))
    each = [source.views(image, slice(1), sorted({*sides})) for image in images]
    return {side: torch.cat([views[side] for views in each]) for side in sides}


def compute_fixed_logits(setup: TrainSetup[Distill], teachers: TeacherEnsemble) -> tuple[str, Tensor]:
    """Reads the teachers' logits of all training images from the cache, or computes and caches them.

    Returns:
        the digest under which they are cached, and the combined logits, (images, classes).

    Raises:
        InputError: what was just written cannot be read, or logits are not finite.
    """
    source = fixed_views(setup)
    sides = sorted({member.side for member in teachers.members})
    # The order and the names of these keys are part of the digest: another spelling would compute everything again.
    key = {
        "data": setup.cache.key,
        "pictures": source.split.content,
        "teacher": setup.provenance["teacher"],
        "forms": [record["form"] for record in setup.provenance["teacher_forms"]],
        "sides": [member.side for member in teachers.members],
        "look": source.kind,
        "crops": source.crops,
        "function": setup.provenance["teacher_function"],
        "central": [source.resize / source.side, source.squash] if source.kind == "central" else None,
        "min_area": source.min_area if source.kind == "ensemble" else None,
    }
    # Views from before there was a choice keep their digest.
    key |= {"resample": source.resample} if source.resample != RESAMPLED_BEFORE else {}
    key |= {"ratio": source.ratio} if source.kind == "ensemble" and source.ratio != CROP_RATIO else {}
    # Of several classes an image, the mean of views is another one.
    key |= {"task": teachers.task.name} if source.kind == "ensemble" and teachers.task is not MULTICLASS else {}
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=12).hexdigest()
    folder = cache_home() / "answers" / digest
    path = folder / "answers.npy"
    shape = (len(source.split), len(teachers.members), setup.student.classifier.num_classes)
    table = read_whole(path, shape)
    if table is None:
        views = len(source.split) * source.crops * len(teachers.members)
        info(f"fixed teacher: predicting {views:,} views once; logits are cached in {folder}")
        # Parts are equal in views, not in images, so that a killed process loses the same time.
        size = max(1, PART // source.crops)
        table = compute_in_parts(
            path, shape, size, lambda images: _predict_part(source, teachers, images, sides, setup), "teacher", key
        )
    # Each teacher's logits are cached, not the combination: temperature, weights and --combine may change.
    each = torch.from_numpy(table).unbind(1)
    try:
        _check_finite(each, teachers)
    except InputError:
        path.unlink(missing_ok=True)  # a fault of the machine may be the reason, which is not to be kept
        raise
    return digest, teachers.combine_answers(each, setup.config.temperature)


def _check_finite(each: Sequence[Tensor], teachers: TeacherEnsemble) -> None:
    for member, logits in zip(teachers.members, each, strict=True):
        if bad := int((~logits.isfinite().all(-1)).sum()):
            raise InputError(
                f"teacher {member.name} has outputs that are not finite for {bad:,} of {len(logits):,} training "
                "images; its weights are damaged, or its precision is too coarse (--teacher-precision fp32)"
            )


@torch.inference_mode()
def _predict_part(
    source: FixedViews, teachers: TeacherEnsemble, images: range, sides: list[int], setup: TrainSetup[Distill]
) -> np.ndarray:
    """Predicts each teacher's logits of some images.

    Returns:
        (images, teachers, classes) float32: of one view its logits; of several those whose
        probabilities are the mean of the views'.
    """
    batch = setup.evaluation.view.batch
    chunks = [(image, start) for image in images for start in range(0, source.crops, batch)]
    # Views of one image fill a batch by themselves where there are many, else those of several do.
    chunks_per_batch = max(1, batch // source.crops)

    def load_batch(number: int) -> dict[int, Tensor]:
        some = chunks[number * chunks_per_batch : (number + 1) * chunks_per_batch]
        views = [source.views(image, slice(start, start + batch), sides) for image, start in some]
        return {side: torch.cat([each[side] for each in views]) for side in sides}

    device, outputs = setup.loop.device, []
    for host in prefetch_map(load_batch, 0, -(-len(chunks) // chunks_per_batch), devices.spare_threads()):
        views = {side: view.to(device) for side, view in host.items()}
        each = [member.answers(views[member.side]).float().cpu() for member in teachers.members]
        outputs.append(torch.stack(each, 1))
    logits = torch.cat(outputs).view(len(images), source.crops, len(teachers.members), -1)
    if source.crops == 1:
        return logits[:, 0].numpy()
    # In double precision, so that rounding does not add up over many crops.
    return teachers.task.mean_over_views(logits).float().numpy()
