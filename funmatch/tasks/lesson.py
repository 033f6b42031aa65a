"""A run made ready: every default closed, data, student and teacher in place."""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch

from funmatch import devices, launch
from funmatch.config import Distill, Train
from funmatch.data.cache import Cache
from funmatch.data.decode import pick_decoder
from funmatch.data.loader import Loader
from funmatch.errors import InputError
from funmatch.fit import Course
from funmatch.logs import say
from funmatch.models.classes import SAME_NAMES
from funmatch.models.classifier import Classifier, check_side, fingerprint
from funmatch.models.load import NAMED, brings_weights, load
from funmatch.models.teachers import Teachers
from funmatch.runs import check_place
from funmatch.synchronised import synchronised
from funmatch.tasks import judging, pictures
from funmatch.tasks.teachers import Modules


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
        teachers: on the device, or None.
        asked: names of the classes that are asked of teachers with others, or None.
        facts: what is recorded of the teachers: `teacher` (their digest) and `teacher_forms`.
        beginning: digest of the student's first weights, where they are not drawn from the seed; else None.
        other_sides: of the views that teachers see beside the student's, pixels.
    """

    verb: str
    config: Train
    cache: Cache
    student: Classifier
    view: judging.View
    course: Course
    teachers: Teachers | None = None
    asked: tuple[str, ...] | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    beginning: str | None = None
    other_sides: tuple[int, ...] = ()

    @property
    def loader(self) -> Loader:
        """Of this process's share of the training batches."""
        config, split = self.config, self.cache.splits["train"]
        sides = self.view.side, self.other_sides
        share = launch.rank(), launch.world()
        return Loader(split, config.seed, config.batch, sides[0], config.crop_min_area, *share, sides[1])


def in_full(config: Train) -> dict[str, Any]:
    """The paths in a configuration from the root, so that the record of a run can be used from anywhere."""
    found = pictures.in_full(config)
    found["student"] = _named_in_full(config.student)
    if config.student_weights:
        found["student_weights"] = config.student_weights.expanduser().resolve()
    if isinstance(config, Distill):
        found["teacher"] = tuple(map(_named_in_full, config.teacher))
        found["teacher_weights"] = tuple(
            file if file.lower() == "none" else str(Path(file).expanduser().resolve())
            for file in config.teacher_weights
        )
        if config.classes and config.classes != SAME_NAMES:
            found["classes"] = str(Path(config.classes).expanduser().resolve())
    return found


def _named_in_full(name: str) -> str:
    """The name of a model, with its path from the root if it is one."""
    prefix = next((prefix for prefix in ("savedmodel:", "local-dir:") if name.startswith(prefix)), "")
    path = Path(name.removeprefix(prefix)).expanduser()
    if name in NAMED or timm.is_model(name.partition(".")[0]) or not path.exists():
        return name
    return f"{prefix.replace('local-dir:', '')}{path.resolve()}"


def open_data(config: Train) -> Cache:
    """The decoded pictures that a run asks for, a training split among them."""
    check_place(config.out)
    cache = devices.in_turn(lambda: pictures.of_run(config))
    counts = ", ".join(f"{len(split):,} {name}" for name, split in cache.splits.items())
    say(f"{cache.name}: {counts}; {cache.way} in {cache.folder}")
    if "train" not in cache.splits:
        raise InputError(f"{cache.name} has no split train to learn from; it has: {', '.join(cache.splits)}")
    return cache


def prepare(verb: str, config: Train, cache: Cache, *, classes: int, given: Modules | None = None) -> Lesson:
    """Builds the student and closes every default that was left open."""
    device, world = devices.pick(config.device), launch.world()
    if config.batch % world:
        raise InputError(f"batch ({config.batch}) is shared by {world} processes, so it must be a multiple of {world}")
    if config.threads:
        torch.set_num_threads(config.threads)
    devices.seed_networks(config.seed, 0, torch.device("cpu"))
    student = load(
        copy.deepcopy((given or {}).get(config.student, config.student)),
        weights=config.student_weights,
        options=_options(config),
        classes=classes,
        side=config.side,
    )
    if student.num_classes != classes:
        raise InputError(f"student {config.student} answers {student.num_classes} classes, wanted {classes}")
    side = config.side or student.card.side
    resize = config.eval_resize or judging.short_side(side, student.card)
    if resize < side:
        raise InputError(f"eval_resize ({resize}) must be at least side ({side})")
    check_side(student, side, batch=config.batch)
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
        "device": str(device) if world == 1 else device.type,  # the number is each process's own
        "precision": precision,
        "decoder": pick_decoder(config.decoder),
    }
    view = judging.View(side, resize, config.batch // world, device, precision)
    course = Course(steps, config.lr, warmup, config.clip_norm, config.seed, device, precision)
    drawn = config.student not in (given or {}) and not config.student_weights and not brings_weights(config.student)
    beginning = None if drawn else fingerprint(student.net)
    config = config.model_copy(update=resolved)
    return Lesson(verb, config, cache, _alike(student.to(device), device), view, course, beginning=beginning)


def _alike(student: Classifier, device: torch.device) -> Classifier:
    """The student made ready for several processes: the same weights in each, and batch statistics of all."""
    devices.share_(list(student.state_dict().values()))
    student.net = synchronised(student.net, device)
    return student


def _options(config: Train) -> tuple[str, ...]:
    """What the student's constructor is given."""
    rates = {"drop_rate": config.drop_rate, "drop_path_rate": config.drop_path}
    return (*config.student_kwargs, *(f"{name}={rate}" for name, rate in rates.items() if rate is not None))
