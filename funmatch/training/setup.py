"""A run made ready: every default closed, data, student and teacher in place."""

import copy
import platform
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import timm
import torch
from torch import Tensor

from funmatch.config import Distill, Train, recipes
from funmatch.config.choices import STRATEGIES
from funmatch.data.cache.device_store import DeviceStore
from funmatch.data.cache.open_cache import Cache
from funmatch.data.loader import Loader
from funmatch.errors import InputError
from funmatch.models.classifier import Classifier, check_side, fingerprint
from funmatch.models.ensemble import TeacherEnsemble
from funmatch.models.load import brings_weights, load
from funmatch.models.sync_batchnorm import sync_batchnorm
from funmatch.models.timm_models import checkpoint_activations, freeze_until, parse_options, with_zero_head
from funmatch.ops.optim import factory, schedules
from funmatch.ops.sampling import MixupOptions
from funmatch.runtime import devices, distributed, env
from funmatch.runtime.chunks import even_chunks
from funmatch.runtime.log import info, info_notes
from funmatch.runtime.prefetch import SharedCache
from funmatch.training import acceleration, datasets, scoring
from funmatch.training.defaults import LR, resolve_defaults
from funmatch.training.loop import LoopOptions
from funmatch.training.run import extend
from funmatch.training.run import folder as run_folder
from funmatch.training.teachers.loading import Modules
from funmatch.version import __version__


@dataclass(frozen=True)
class Trial:
    """What a search asks of a run: to leave the test images alone, and to say how it goes.

    Attributes:
        told: called with the step and the score of each evaluation; what it raises ends the run.
    """

    report: Callable[[int, float], None]


@dataclass(frozen=True)
class TrainSetup:
    """A run that is ready to begin, but for its loss.

    Attributes:
        verb: of the command.
        config: resolved, with no length in epochs and no default left open.
        cache: the images.
        student: on its device, with its first weights.
        view: how evaluation looks at images.
        course: how the student is taught.
        teachers: on the device, or None.
        asked: names of the classes that are asked of teachers with others, or None.
        facts: what is recorded: `teacher` (the teachers' digest), `teacher_forms`, and who cuts the `views`.
        beginning: digest of the student's first weights, where they are not drawn from the seed; else None.
        teacher_sides: of the crops that teachers are shown in training, pixels, each once.
        known: the fixed teachers' answers to the training images, (images, classes), or None.
        told: what a tape holds of the teachers' answers; see `Loader.told`.
        trial: what a search asks of this run, or None.
        latest: where batches are kept for other students that are taught beside this one.
    """

    verb: str
    config: Train
    cache: Cache
    student: Classifier
    view: scoring.EvalView
    loop: LoopOptions
    teachers: TeacherEnsemble | None = None
    class_names: tuple[str, ...] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    init_digest: str | None = None
    teacher_sides: tuple[int, ...] = ()
    known: Tensor | None = None
    told: Callable[[int, int, int], Tensor | None] | None = None
    trial: Trial | None = None
    latest: SharedCache | None = None

    @property
    def loader(self) -> Loader:
        """Of this process's share of the training batches."""
        share = env.rank(), env.world_size()
        loader = build_loader(self.config, self.cache, self.teacher_sides, share)
        native = self.provenance.get("views") == acceleration.NATIVE
        return replace(loader, known=self.known, told=self.told, latest=self.latest, native=native)


def count_workers(lesson: TrainSetup) -> int:
    """Threads that make views ahead; one drives a device that cuts them itself."""
    cut_there = isinstance(lesson.cache.splits["train"].store, DeviceStore)
    return lesson.config.workers or (1 if cut_there else devices.spare_threads())


def build_loader(
    config: Train, cache: Cache, teacher_sides: tuple[int, ...] = (), share: tuple[int, int] = (0, 1)
) -> Loader:
    """The training batches of a resolved configuration.

    Args:
        teacher_sides: at which teachers are shown crops, pixels.
        share: which of how many equal slices of each batch.
    """
    return Loader(
        cache.splits["train"],
        config.seed,
        config.batch,
        config.side or 0,
        config.crop_min_area,
        *share,
        crop=config.cropped,
        resize=config.resize or 0,
        mixing=MixupOptions(config.mixup or 0.0, config.mixup_mode == "image", config.mixup_max, config.mixup_lam),
        cutmix=config.cutmix,
        randaugment=config.randaugment,
        teacher_sides=teacher_sides,
        own_teacher_view=isinstance(config, Distill) and STRATEGIES[config.strategy].teacher == "own",
    )


def open_data(config: Train, trial: Trial | None = None) -> Cache:
    """The decoded images that a run asks for, a training split among them; without a test split for a trial."""
    factory.check_optimizer_name(config.optimizer)
    parse_options(config.optimizer_kwargs)
    run_folder.check_place(config.out)
    cache = distributed.main_process_first(lambda: datasets.open_run_data(config))
    counts = ", ".join(f"{len(split):,} {name}" for name, split in cache.splits.items())
    info(f"{cache.name}: {counts}; {cache.way} in {cache.folder}")
    if "train" not in cache.splits:
        raise InputError(f"{cache.name} has no split train to learn from; it has: {', '.join(cache.splits)}")
    if trial:
        return replace(cache, splits={name: split for name, split in cache.splits.items() if name != "test"})
    return cache


def build_setup(
    verb: str,
    config: Train,
    cache: Cache,
    *,
    classes: int,
    given: Modules | None = None,
    asked: Train | None = None,
    trial: Trial | None = None,
) -> TrainSetup:
    """Builds the student and closes every default that was left open.

    Args:
        classes: that the student answers.
        given: modules from Python, by the names that stand for them.
        asked: the configuration as a person gave it, if `config` is no longer that.
        trial: what a search asks of the run, if it is part of one.
    """
    device, world = devices.pick_device(config.device), env.world_size()
    if config.batch % world:
        raise InputError(f"batch ({config.batch}) is shared by {world} processes, so it must be a multiple of {world}")
    if config.patience and "val" not in cache.splits:
        raise InputError(f"patience needs images for validation, and {cache.name} has none; say --val 10%")
    if config.threads:
        torch.set_num_threads(config.threads)
    student = build_student(verb, config, cache, classes, given or {})
    drawn = config.student not in (given or {}) and not config.student_weights and not brings_weights(config.student)
    if drawn and verb == "finetune":
        info(f"WARNING: {config.student} begins with random weights; name them by a tag or --weights")
    beginning = None if drawn else fingerprint(student.net)
    facts = recipes.facts(asked or config) | acceleration.crop_kernel(config, cache.splits["train"])
    if config.schedule == "wsd" and (asked or config).warmup_steps is None:
        warmup = distributed.broadcast_from_main(lambda: extend.warmup_of(config.out))
        config = config if warmup is None else config.model_copy(update={"warmup_steps": warmup})
    config = resolve_defaults(config, cache, student, device)
    cache = datasets.move_data_to_device(cache, device, config.device_gb or 0)
    warn_of_late_steps(config)
    assert config.side
    assert config.eval_resize
    squash = config.crop == "squash"
    view = scoring.EvalView(config.side, config.eval_resize, config.batch // world, device, config.precision, squash)
    student = sync_across_processes(student.to(device), device)
    course = loop_options(config, device)
    lesson = TrainSetup(
        verb, config, cache, student, view, course, provenance=facts, init_digest=beginning, trial=trial
    )
    build_optimizer(lesson)  # what is wrong with its options is told before there is a folder
    return lesson


def warn_of_late_steps(config: Train) -> None:
    """Warns of a schedule that the run is too short for: nearly always a run that was shortened to be tried."""
    steps, warmup = config.steps or 1, config.warmup_steps or 0
    late = [step for step in config.decay_steps if step >= steps]
    if warmup >= steps > 1:
        info(f"WARNING: the warm-up of {warmup:,} steps is not over at the run's end, {steps:,}; see --warmup-steps")
    if late:
        info(f"WARNING: the learning rate would fall at {', '.join(map(str, late))}, but the run ends at {steps:,}")
    if config.cooldown_steps and config.cooldown_steps > steps - warmup:
        info(f"WARNING: the cool-down of {config.cooldown_steps:,} steps begins before the learning rate is at its top")


def build_student(verb: str, config: Train, cache: Cache, classes: int, given: Modules) -> Classifier:
    """The network to teach, with its first weights, ready for views of the side that is asked for."""
    devices.seed_networks(config.seed, 0, torch.device("cpu"))
    student = load(
        copy.deepcopy(given.get(config.student, config.student)),
        weights=config.student_weights,
        options=_options(config),
        classes=classes,
        side=config.side,
    )
    info_notes(config.student, student.notes)
    if student.num_classes != classes:
        raise InputError(f"student {config.student} answers {student.num_classes} classes, wanted {classes}")
    if verb == "finetune" and student.card.classes != cache.classes:
        with_zero_head(student.net, classes)
    least = min(
        stop - start for start, stop in pairwise(even_chunks(config.batch // env.world_size(), config.micro_batch))
    )
    check_side(student, config.side or student.card.side, batch=least)
    if config.grad_checkpointing:
        checkpoint_activations(student)
    if config.freeze_until is not None:
        freeze_until(student, config.freeze_until)
    return student


def loop_options(config: Train, device: torch.device) -> LoopOptions:
    """How a resolved configuration says that the student is taught."""
    steps, warmup = config.steps or 1, config.warmup_steps or 0

    def factor(step: int) -> float:
        falls, cooldown = (config.decay_steps, config.decay_factors), (config.cooldown_steps, config.cooldown_shape)
        return schedules.factor(config.schedule, step, steps, warmup, *falls, *cooldown)

    return LoopOptions(
        steps, config.lr or LR, factor, config.clip_norm, config.seed, device, config.precision, config.micro_batch
    )


def sync_across_processes(student: Classifier, device: torch.device) -> Classifier:
    """The student made ready for several processes: the same weights in each, and batch statistics of all."""
    distributed.broadcast_(list(student.state_dict().values()))
    student.net = sync_batchnorm(student.net, device)
    return student


def _options(config: Train) -> tuple[str, ...]:
    """What the student's constructor is given."""
    rates = {"drop_rate": config.drop_rate, "drop_path_rate": config.drop_path}
    return (*config.student_kwargs, *(f"{name}={rate}" for name, rate in rates.items() if rate is not None))


def build_optimizer(lesson: TrainSetup) -> torch.optim.Optimizer:
    """What turns the student's gradients into updates."""
    config = lesson.config
    return factory.create_optimizer(
        config.optimizer, lesson.student.net, lesson.loop.lr, config.weight_decay,
        momentum=config.momentum, momentum_dtype=config.momentum_dtype,
        options=parse_options(config.optimizer_kwargs), share=distributed.sharded_map,
    )  # fmt: skip


def run_record(lesson: TrainSetup) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is asked of a run, and the facts beside: the parts of its `config.json`."""
    facts = {
        "data": lesson.cache.key,
        "teacher": None,
        "student": lesson.init_digest,
        **lesson.provenance,
        "pictures": {name: len(split) for name, split in lesson.cache.splits.items()},
        "classes": list(lesson.class_names or lesson.cache.classes),
        "parameters": lesson.student.count_parameters(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {lesson.loop.device}",
        "versions": {"funmatch": __version__, "torch": torch.__version__, "timm": timm.__version__},
    }
    return lesson.config.model_dump(mode="json"), facts


def extend_run(lesson: TrainSetup) -> None:
    """Makes the run of a lesson longer where that is what is asked; see `ends.prolong`."""
    distributed.main_process_first(
        lambda: env.is_main_process() and extend.extend(lesson.config.out, lesson.verb, *run_record(lesson))
    )


def finished_result(lesson: TrainSetup) -> dict[str, Any] | None:
    """The figures of the run, if it is over and was asked the same."""
    extend_run(lesson)
    if result := distributed.broadcast_from_main(
        lambda: run_folder.result_if_same(lesson.config.out, lesson.verb, *run_record(lesson))
    ):
        info(f"{lesson.config.out} is finished at step {result['step']}; nothing to do")
    return result


def recorded_modes(lesson: TrainSetup) -> list[dict[str, Any]] | None:
    """The forms in which the teachers of a run that is resumed are computed."""
    known = distributed.broadcast_from_main(
        lambda: run_folder.provenance_if_same(lesson.config.out, lesson.verb, *run_record(lesson))
    )
    return known.get("teacher_forms")
