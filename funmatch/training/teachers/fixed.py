"""What fixed teachers say of each training image: computed once, kept under a fingerprint, looked up ever after.

Processes that want the same answers share the work, a part of the images at a time; killed ones leave their finished
parts behind.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from funmatch.config import Distill
from funmatch.config.choices import STRATEGIES
from funmatch.data.cache.stores import CachedSplit
from funmatch.errors import InputError
from funmatch.models.ensemble import TeacherEnsemble
from funmatch.ops.boxes import sample_inception_boxes, sample_whole_boxes
from funmatch.ops.crops import central_view, crop_resize_flip
from funmatch.ops.sampling import ENSEMBLE_STREAM, step_generator
from funmatch.runtime import devices
from funmatch.runtime.files import cache_home, try_lock_file, write_array
from funmatch.runtime.log import ProgressBar, info
from funmatch.runtime.prefetch import prefetch_map
from funmatch.training.setup import TrainSetup
from funmatch.training.teachers.loading import CHECKED, LoadedTeacher

PART = 1024
"""Views that are answered between two writes to the disk, about."""


@dataclass(frozen=True)
class FixedViews:
    """How a fixed teacher looks at images.

    Attributes:
        split: of the images.
        look: whole, central or ensemble; see `Strategy.teacher`.
        crops: of each image.
        side, resize: of the student's mild crops, pixels: the central view has their proportions.
        squash: whether mild crops are cut out of the whole image resized to a square.
        min_area: of the ensemble's Inception crops.
    """

    split: CachedSplit
    look: str
    crops: int
    side: int
    resize: int
    squash: bool
    min_area: float

    def views(self, image: int, which: slice, sides: Sequence[int]) -> dict[int, Tensor]:
        """Some of the views of an image, (n, 3, side, side) float32 in [0, 1], by their side.

        The crops of an ensemble depend on the image's number alone, so they are the same for each student; half of
        them are mirrored, as training views are.
        """
        pixels = self.split.image(image)
        if self.look == "central":
            shapes = {side: round(self.resize * side / self.side) for side in sides}
            return {side: central_view(pixels, short, side, squash=self.squash)[None] for side, short in shapes.items()}
        size = np.full(self.crops, pixels.shape[0]), np.full(self.crops, pixels.shape[1])
        rng = step_generator(0, image, ENSEMBLE_STREAM)
        if self.look == "whole":
            boxes, flips = sample_whole_boxes(rng, *size), np.zeros(self.crops, bool)
        else:
            flips = rng.random(self.crops) < 0.5
            boxes = sample_inception_boxes(rng, *size, min_area=self.min_area)
        boxes, flips = boxes[which], flips[which]
        taken = [pixels[top : top + height, left : left + width] for top, left, height, width in boxes.tolist()]
        boxes[:, :2] = 0
        return {side: crop_resize_flip(taken, boxes, flips, side) for side in sides}


def fixed_views(setup: TrainSetup[Distill]) -> FixedViews:
    """How the teachers of a resolved configuration look at images."""
    config = setup.config
    look = STRATEGIES[config.strategy].teacher
    crops = config.teacher_crops if look == "ensemble" else 1
    split = setup.loader.split
    return FixedViews(
        split,
        look,
        crops,
        setup.evaluation.view.side,
        config.resize or 0,
        config.crop == "squash",
        config.crop_min_area,
    )


def first_views(setup: TrainSetup[Distill], called: Sequence[LoadedTeacher]) -> dict[int, Tensor]:
    """Views of the first training images by side, to hold a teacher's fast forms against the plain one."""
    looks, sides = fixed_views(setup), {one.side for one in called}
    images = range(min(CHECKED, setup.evaluation.view.batch, len(looks.split)))
    each = [looks.views(image, slice(1), sorted(sides)) for image in images]
    return {side: torch.cat([views[side] for views in each]) for side in sides}


def compute_fixed_logits(setup: TrainSetup[Distill], teachers: TeacherEnsemble) -> tuple[str, Tensor]:
    """The name under which they are kept, and the teachers' combined logits of each training image, (images, classes).

    Raises:
        InputError: what was just written cannot be read.
    """
    looks = fixed_views(setup)
    sides = sorted({member.side for member in teachers.members})
    asked = {
        "data": setup.cache.key,
        "pictures": hashlib.blake2b(looks.split.digests.tobytes(), digest_size=16).hexdigest(),
        "teacher": setup.provenance["teacher"],
        "forms": [record["form"] for record in setup.provenance["teacher_forms"]],
        "sides": [member.side for member in teachers.members],
        "look": looks.look,
        "crops": looks.crops,
        "function": setup.provenance["teacher_function"],
        "central": [looks.resize / looks.side, looks.squash] if looks.look == "central" else None,
        "min_area": looks.min_area if looks.look == "ensemble" else None,
    }
    name = hashlib.blake2b(json.dumps(asked).encode(), digest_size=12).hexdigest()
    folder = cache_home() / "answers" / name
    shape = (len(looks.split), len(teachers.members), setup.student.classifier.num_classes)
    if _read(folder / "answers.npy", shape) is None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "about.json").write_text(json.dumps(asked, indent=1))
        views = len(looks.split) * looks.crops * len(teachers.members)
        info(f"the teacher is fixed: it answers {views:,} views once, kept in {folder}")
        _compute(folder, looks, teachers, sides, setup, shape)
    whole = _read(folder / "answers.npy", shape)
    if whole is None:
        raise InputError(f"{folder / 'answers.npy'} was damaged while it was read; start the same command again")
    each = torch.from_numpy(whole).unbind(1)
    return name, teachers.combine_logits(each, setup.config.temperature)


def _read(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """An array that was written before; None where it is not there, or damaged, and then it is removed."""
    try:
        array = np.load(path, mmap_mode="c")
        if array.shape == shape:
            return array
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError):
        pass
    info(f"{path} is damaged and is made again")
    path.unlink(missing_ok=True)
    return None


def _compute(
    folder: Path,
    looks: FixedViews,
    teachers: TeacherEnsemble,
    sides: list[int],
    setup: TrainSetup[Distill],
    shape: tuple[int, ...],
) -> None:
    """Answers part after part, leaving out those that other processes are at, until all are there."""
    count = len(looks.split)
    size = max(1, PART // looks.crops)
    parts = {folder / f"part-{start:09}.npy": range(start, min(start + size, count)) for start in range(0, count, size)}
    whole = folder / "answers.npy"
    with ProgressBar("teacher", count) as bar:
        while not whole.is_file():
            missing = {path: images for path, images in parts.items() if not path.is_file()}
            bar.update(count - sum(map(len, missing.values())))
            if not missing:
                _join(whole, parts, shape)
                continue
            claimed = next(
                ((path, lock) for path in missing if (lock := try_lock_file(path.with_suffix(".lock")))), None
            )
            if claimed is None:
                time.sleep(0.2)  # all that is missing is being made by others
                continue
            path, lock = claimed
            with lock:
                if not path.is_file() and not whole.is_file():
                    write_array(path, _answered(looks, teachers, parts[path], sides, setup))
    for left in folder.glob("part-*"):
        left.unlink(missing_ok=True)


def _join(whole: Path, parts: dict[Path, range], shape: tuple[int, ...]) -> None:
    """Puts the parts together, unless another process has done so meanwhile."""
    lock = try_lock_file(whole.with_suffix(".lock"))
    if lock is None:
        time.sleep(0.2)
        return
    with lock:
        if whole.is_file():
            return
        read = [_read(path, (len(images), *shape[1:])) for path, images in parts.items()]
        sound = [part for part in read if part is not None]
        if len(sound) == len(parts):  # else what was damaged, or taken away by who was faster, is looked for again
            write_array(whole, np.concatenate(sound))


@torch.inference_mode()
def _answered(
    looks: FixedViews, teachers: TeacherEnsemble, images: range, sides: list[int], setup: TrainSetup[Distill]
) -> np.ndarray:
    """What each teacher says of some images, (images, teachers, classes) float32.

    Of one view these are its logits; of several log Σ softmax(logits) / n, whose softmax are the mean probabilities.
    """
    batch = setup.evaluation.view.batch
    each = [(image, start) for image in images for start in range(0, looks.crops, batch)]
    # Views of one image fill a batch by themselves where there are many, else those of several do.
    together = max(1, batch // looks.crops)

    def make(number: int) -> dict[int, Tensor]:
        some = each[number * together : (number + 1) * together]
        made = [looks.views(image, slice(start, start + batch), sides) for image, start in some]
        return {side: torch.cat([views[side] for views in made]) for side in sides}

    device, told = setup.loop.device, []
    for views in prefetch_map(make, 0, -(-len(each) // together), devices.spare_threads()):
        shown = {side: view.to(device) for side, view in views.items()}
        told.append(torch.stack([member.logits(shown[member.side]).float().cpu() for member in teachers.members], 1))
    answers = torch.cat(told).view(len(images), looks.crops, len(teachers.members), -1)
    if looks.crops == 1:
        return answers[:, 0].numpy()
    summed = answers.double().log_softmax(-1).logsumexp(1)
    return (summed - np.log(looks.crops)).float().numpy()
