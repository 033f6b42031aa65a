"""Predicts what teachers say of a split's images, and remembers it for runs with the same teachers and images."""

import hashlib
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from funmatch.config import Distill
from funmatch.data.cache.stores import CachedSplit
from funmatch.models.classifier import libraries_of
from funmatch.models.ensemble import EnsembleMember, TeacherEnsemble
from funmatch.ops.native import library
from funmatch.runtime import devices
from funmatch.runtime.disk.files import cache_home
from funmatch.runtime.disk.parts import read_checked, write_checked
from funmatch.training.evaluation import scoring
from funmatch.training.setup import TrainSetup
from funmatch.training.teachers.loading import LoadedTeacher

FOLDER = "predictions"
LEAST_SECONDS = 0.05
"""Seconds from which it pays off to remember predictions."""
MOST_NUMBERS = 1 << 24
"""Numbers of remembered predictions, at most: 64 MiB."""


class MemberAnswers(nn.Module):
    """A teacher as a module that gives the logits of the mapped classes, or some of the numbers of its answers.

    Args:
        member: the teacher.
        which: of the numbers of its answers.
    """

    def __init__(self, member: EnsembleMember, which: slice = slice(None)) -> None:
        super().__init__()
        # `frozen` is registered as a submodule, so that `.to()` and `.eval()` reach it through the dataclass.
        self.member, self.frozen, self.which = member, member.frozen, which

    def forward(self, views: Tensor) -> Tensor:
        return self.member.answers(views)[:, self.which]


def member_view(member: EnsembleMember, view: scoring.EvalView) -> scoring.EvalView:
    """Returns the preprocessing of evaluation for a teacher: the student's, at the teacher's own image size."""
    if member.side == view.side:
        return view
    # The student's resize belongs to its own image size: at another one the crop would have other proportions.
    return replace(
        view, side=member.side, short_side=scoring.default_eval_resize(member.side, member.frozen.classifier.card)
    )


def predict(
    teachers: TeacherEnsemble, split: CachedSplit, view: scoring.EvalView, known_by: Sequence[str] = ()
) -> tuple[Tensor, list[Tensor]]:
    """Predicts a split's images, or reads what was predicted before.

    Args:
        view: the student's; each teacher sees the images at its own size.
        known_by: of each teacher everything that decides its logits, as `identities` returns it; empty to compute.

    Returns:
        the combined logits and those of each teacher, (n, classes) float32 on the CPU; where features are matched,
            [logits | pooled features].
    """
    layout, count = teachers.layout, len(teachers.members)
    # Without tokens, which are too many for whole splits.
    most = [None] * count if layout is None else [layout.classes + dimensions for dimensions in layout.pooled]
    keys = known_by if known_by and layout is None else [""] * count
    # One teacher after the other: each keeps its own image size, and the combination needs only logits.
    each = [
        _predict_once(MemberAnswers(member, slice(kept)), split, member_view(member, view), key)
        for member, kept, key in zip(teachers.members, most, keys, strict=True)
    ]
    return teachers.combine_answers(each), each


def _predict_once(teacher: MemberAnswers, split: CachedSplit, view: scoring.EvalView, key: str) -> Tensor:
    """Predicts a split's images by one teacher, or reads what was predicted before, if there is a key."""
    if not key:
        return scoring.predict(teacher, split, view)
    key = repr((key, split.content, view))
    path = cache_home() / FOLDER / hashlib.blake2b(key.encode(), digest_size=12).hexdigest() / "logits.npy"
    classes, class_map = teacher.frozen.classifier.num_classes, teacher.member.class_map
    shape = (len(split), classes if class_map is None else len(class_map))
    with suppress(OSError):  # a cache that cannot be read, or written below, costs time alone
        if (found := read_checked(path, shape)) is not None:
            return torch.from_numpy(np.array(found))
    began = time.perf_counter()
    logits = scoring.predict(teacher, split, view)
    took = time.perf_counter() - began
    # Where some are not finite, a fault of the machine may be the reason, which is not to be kept.
    sound = logits.shape == shape and bool(logits.isfinite().all())
    if sound and took >= LEAST_SECONDS and logits.numel() <= MOST_NUMBERS:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_checked(path, logits.numpy())
    return logits


def identities(setup: TrainSetup[Distill], loaded: Sequence[LoadedTeacher]) -> list[str]:
    """Returns of each frozen teacher of a run everything that decides its logits, as text; empty where it is unknown.

    Args:
        setup: the run, which records the teachers' inference modes.
        loaded: the teachers before they were frozen, since folding replaces modules.
    """
    machine = devices.machine_signature(setup.loop.device)
    found = []
    for teacher, record in zip(loaded, setup.provenance["teacher_forms"], strict=True):
        libraries, mode = libraries_of(teacher.classifier), record["form"]
        kernels = library.identity() if mode.get("native") else ""
        facts = (teacher.digest, teacher.function, teacher.classifier.card.task, mode, libraries, kernels, machine)
        # What a compiler makes depends on more than is known here.
        found.append(repr(facts) if libraries and not mode.get("compiled") else "")
    return found
