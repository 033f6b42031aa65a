"""A run made ready: every default closed, data, student and teacher in place."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch

from funmatch import devices
from funmatch.config import Train
from funmatch.data.cache import Cache
from funmatch.data.decode import pick_decoder
from funmatch.errors import InputError
from funmatch.fit import Course
from funmatch.logs import say
from funmatch.models.classifier import Classifier, check_side
from funmatch.models.frozen import Frozen
from funmatch.models.load import NAMED, load
from funmatch.runs import check_place
from funmatch.tasks import evaluate, pictures


@dataclass(frozen=True)
class Lesson:
    """A run that is ready to begin, but for its loss.

    Attributes:
        verb: of the command.
        config: resolved, with no length in epochs and no default left open.
        cache: the pictures.
        student: on its device, with its first weights.
        view: how evaluation looks at pictures.
        course: how the student is taught.
        teacher: on its device, or None.
    """

    verb: str
    config: Train
    cache: Cache
    student: Classifier
    view: evaluate.View
    course: Course
    teacher: Frozen | None = None


def in_full(config: Train) -> dict[str, Any]:
    """The paths in a configuration from the root, so that the record of a run can be used from anywhere."""
    found = pictures.in_full(config)
    for field in ("student", "teacher"):
        name = getattr(config, field, None) or ""
        path = Path(name.removeprefix("local-dir:")).expanduser()
        if name and path.exists() and not (name in NAMED or timm.is_model(name.partition(".")[0])):
            found[field] = str(path.resolve())
    if weights := getattr(config, "teacher_weights", None):
        found["teacher_weights"] = weights.expanduser().resolve()
    return found


def open_data(config: Train) -> Cache:
    """The decoded pictures that a run asks for, a training split among them."""
    check_place(config.out)
    cache = pictures.of_run(config)
    counts = ", ".join(f"{len(split):,} {name}" for name, split in cache.splits.items())
    say(f"{cache.name}: {counts}; {cache.way} in {cache.folder}")
    if "train" not in cache.splits:
        raise InputError(f"{cache.name} has no split train to learn from; it has: {', '.join(cache.splits)}")
    return cache


def prepare(verb: str, config: Train, cache: Cache, *, classes: int, teacher: Frozen | None = None) -> Lesson:
    """Builds the student and closes every default that was left open."""
    device = devices.pick(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    devices.seed_networks(config.seed, 0, torch.device("cpu"))
    student = load(config.student, options=config.student_kwargs, classes=classes, side=config.side)
    if student.num_classes != classes:
        raise InputError(f"student {config.student} answers {student.num_classes} classes, wanted {classes}")
    side = config.side or student.card.side
    resize = config.eval_resize or evaluate.short_side(side, student.card)
    if resize < side:
        raise InputError(f"eval_resize ({resize}) must be at least side ({side})")
    check_side(student, side, batch=config.batch)
    if teacher:
        check_side(teacher.classifier, side)
    steps = config.steps or max(1, round((config.epochs or 0) * len(cache.splits["train"]) / config.batch))
    warmup = min(1500, steps // 10) if config.warmup_steps is None else config.warmup_steps
    precision = devices.resolve_precision(config.precision, device)
    resolved = {
        **in_full(config),
        "steps": steps,
        "epochs": None,
        "side": side,
        "eval_resize": resize,
        "warmup_steps": warmup,
        "device": str(device),
        "precision": precision,
        "decoder": pick_decoder(config.decoder),
    }
    view = evaluate.View(side, resize, config.batch, device, precision)
    course = Course(steps, config.lr, warmup, config.clip_norm, config.seed, device, precision)
    if teacher:
        teacher.to(device)
    return Lesson(verb, config.model_copy(update=resolved), cache, student.to(device), view, course, teacher)
