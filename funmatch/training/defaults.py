"""Resolves every default of a run and makes its paths absolute, so that its record says all that decides it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from funmatch.config import Distill, Finetune, Train
from funmatch.config.choices import RESAMPLED_BEFORE, STRATEGIES, EvalResample
from funmatch.config.metadata import Refers
from funmatch.config.optim import FINETUNE_LR, LR, WARMUP_SHARE, WARMUP_STEPS
from funmatch.config.options import Options as AnyOptions
from funmatch.config.views import EVAL_RESAMPLE, RESAMPLE
from funmatch.data.cache.open_cache import Cache
from funmatch.data.cache.stores import CachedSplit
from funmatch.data.jpeg import pick_decoder
from funmatch.data.readers.open import resolve_spec
from funmatch.errors import InputError
from funmatch.models.class_map import RULES
from funmatch.models.classifier import Classifier
from funmatch.models.clip.class_texts import OF_DATA
from funmatch.models.clip.names import absolute, is_clip
from funmatch.models.clip.templates import NAMED as NAMED_TEMPLATES
from funmatch.models.names import LOCAL, NAMED, SAVEDMODEL, is_timm_name
from funmatch.ops.mixing import MixupOptions
from funmatch.ops.mixtures.shares import whole_shares
from funmatch.ops.optim import factory, hyperrule
from funmatch.ops.tasks.task import task_of
from funmatch.ops.view_spec import ViewSpec, complete_key
from funmatch.runtime import devices, distributed, env
from funmatch.runtime.addresses import is_address
from funmatch.runtime.functions import is_function_name
from funmatch.runtime.log import info
from funmatch.training.evaluation import scoring
from funmatch.training.run import folder as run_folder
from funmatch.training.run import intervals
from funmatch.training.student import acceleration
from funmatch.training.teachers import tape

Options = TypeVar("Options", bound=Train)
FINETUNE_EVAL_CAP = 100
"""Most steps between two evaluations of `finetune`, which chooses the best of its students by them."""
PIXEL_SHARE = 1 / 4
"""Share of an accelerator's memory that pixels may take."""


def resolve_defaults(config: Options, cache: Cache, student: Classifier, device: torch.device) -> Options:
    """Returns the configuration with every default resolved, and its length in steps.

    Args:
        student: the network, whose card gives the image size.

    Raises:
        InputError: images would be resized to less than the crop.
    """
    side = config.side or student.card.side
    # A --resize for training holds for evaluation, too: both then see objects at the same scale.
    resize = config.eval_resize or config.resize or scoring.default_eval_resize(side, student.card)
    if resize < side:
        raise InputError(f"eval_resize ({resize}) must be at least side ({side})")
    steps = config.steps or max(1, round((config.epochs or 0) * len(cache.splits["train"]) / config.batch))
    # Of the run that resumes, if there is one. Read by one process: others might see the folder before it changes.
    before = distributed.broadcast_from_main(lambda: run_folder.options_of(config.out))
    resolved = {
        **absolute_paths(config),
        "steps": steps,
        # Steps alone count from here on; a resumed run compares them.
        "epochs": None,
        "side": side,
        "crop": config.cropped,
        "resize": _train_resize(config, side, resize),
        "eval_resize": resize,
        **_resampling(config, before),
        "mixup": _default_mixup(config) if config.mixup is None else config.mixup,
        "lr": config.lr or LR,
        **_optimizer_options(config),
        "warmup_steps": min(WARMUP_STEPS, steps // WARMUP_SHARE)
        if config.warmup_steps is None
        else config.warmup_steps,
        "device": str(device) if env.world_size() == 1 else device.type,  # the index differs between processes
        "device_gb": _device_gb(config, device, before),
        **_intervals(config, steps, len(scoring.validation_split(cache, config.val)), before),
        **acceleration.resolve_auto(config, steps, side, student, device),
        "decoder": pick_decoder(config.decoder),
    }
    return config.model_copy(update=resolved)


def view_spec(config: Train, sources: tuple[tuple[int, int], ...] = (), *, native: bool = True) -> ViewSpec:
    """Returns everything that decides the training views of a resolved configuration.

    Args:
        sources: of the training images, as of `source_shares`.
        native: whether the native CPU kernel crops.
    """
    variants = [view_spec(each, sources, native=native) for each in config.variants()]
    shares = whole_shares(config.policy_share or [1] * len(variants))
    return ViewSpec(
        seed=config.seed,
        batch=config.batch,
        side=config.side or 0,
        min_area=config.crop_min_area,
        ratio=config.crop_ratio,
        crop=config.cropped,
        resize=config.resize or 0,
        resample=config.resampled,
        mixup=MixupOptions(config.mixup or 0.0, config.mixup_mode == "image", config.mixup_max, config.mixup_lam),
        cutmix=config.cutmix,
        randaugment=config.randaugment,
        sampling=config.sampling,
        augment=config.augment,
        own_teacher_view=isinstance(config, Distill) and STRATEGIES[config.strategy].teacher == "own",
        native=native,
        policies=tuple(zip(shares, variants, strict=True)),
        sources=sources,
    )


def source_shares(config: Train, train: CachedSplit) -> tuple[tuple[int, int], ...]:
    """Returns the share and the number of training images of each source; empty where their numbers decide.

    Raises:
        InputError: a source with a share has none.
    """
    if not config.share:
        return ()
    for name, count in zip(config.data, train.sources, strict=True):
        if not count:
            raise InputError(f"share gives images of {name} to every batch, but it has no training images")
    return tuple(zip(whole_shares(config.share), train.sources, strict=True))


def _intervals(config: Train, steps: int, images: int, before: dict[str, Any]) -> dict[str, int | None]:
    """Returns at which steps the run logs, evaluates and saves; those that are not given come from its length.

    Args:
        steps: the length of the run.
        images: number of images that an evaluation looks at.
        before: the options of the run that resumes; empty if it begins.
    """
    eval_cap = FINETUNE_EVAL_CAP if isinstance(config, Finetune) else intervals.EVAL_CAP
    usual: dict[str, int | None] = {**intervals.default_intervals(steps, config.batch, images, eval_cap)}
    # Whoever says how often a run is evaluated gets that and no more.
    if config.eval_every is not None:
        usual["eval_first"] = None
    # A run goes on as it began, also where it is extended, and where an earlier version had other intervals.
    if before:
        usual |= {"eval_first": None} | {name: before[name] for name in usual if name in before}
    given = {name: getattr(config, name) for name in usual}
    return {name: usual[name] if given[name] is None else given[name] for name in usual}


def _resampling(config: Train, before: dict[str, Any]) -> dict[str, EvalResample]:
    """Returns how training and evaluation views are resized.

    Args:
        before: the options of the run that resumes; empty if it begins.
    """
    usual, eval_usual = RESAMPLE, EVAL_RESAMPLE
    if before:
        # A run goes on as it began, which was without antialias before there was a choice.
        usual, eval_usual = (before.get(name) or RESAMPLED_BEFORE for name in ("resample", "eval_resample"))
    elif isinstance(config, Distill) and config.tape and (place := tape.record_folder(config.tape)).has_begun:
        usual = complete_key(place.read()["asked"])["resample"]
    return {"resample": config.resample or usual, "eval_resample": config.eval_resample or eval_usual}


def _device_gb(config: Train, device: torch.device, before: dict[str, Any]) -> float:
    """Returns the GB of pixels that may lie on the device."""
    # A resumed run keeps its value, even on another device: crops on the device round differently from the CPU's.
    chosen = before.get("device_gb") if config.device_gb is None else config.device_gb
    return round(PIXEL_SHARE * devices.device_memory(device) / 1e9, 1) if chosen is None else chosen


def _default_mixup(config: Train) -> float:
    """Returns the default a of MixUp's Beta(a, a): the strategy's, else 1, uniform, as in function matching."""
    return STRATEGIES[config.strategy].mixup if isinstance(config, Distill) else 1.0


def _train_resize(config: Train, side: int, eval_resize: int) -> int | None:
    """Returns the short side before mild crops, pixels: evaluation's, if above the crop; None for other crops."""
    if config.cropped not in ("mild", "squash"):
        return None
    return config.resize or (eval_resize if eval_resize > side else scoring.enlarged_side(side))


def _optimizer_options(config: Train) -> dict[str, Any]:
    # A function of the user has a momentum and a weight decay of its own.
    if is_function_name(config.optimizer):
        return {"momentum": None, "weight_decay": 0.0}
    return {"momentum": factory.resolve_momentum(config.optimizer, config.momentum)}


def warn_of_late_steps(config: Train) -> None:
    """Warns of a schedule that is longer than the run."""
    # A warning, not an error: nearly always a recipe was shortened to try it out.
    steps, warmup = config.steps or 1, config.warmup_steps or 0
    late = [step for step in config.decay_steps if step >= steps]
    if warmup >= steps > 1:
        info(f"WARNING: the warm-up of {warmup:,} steps is not over when the run ends at {steps:,}; see --warmup-steps")
    if late:
        listed = ", ".join(map(str, late))
        info(f"WARNING: the decays at steps {listed} come after the run ends at {steps:,}; see --decay-steps")
    if config.cooldown_steps and config.cooldown_steps > steps - warmup:
        cooldown = f"{config.cooldown_steps:,} steps"
        info(f"WARNING: the cool-down of {cooldown} begins before the warm-up ends; see --cooldown-steps")


def absolute_paths(config: AnyOptions) -> dict[str, Any]:
    """Returns the options that name files, made absolute, so that a run's record is usable from any directory."""
    found: dict[str, Any] = {}
    for name, opt in type(config).opts():
        value = getattr(config, name)
        if opt.refers is None or value is None:
            continue
        rule = ABSOLUTE[opt.refers]
        found[name] = tuple(map(rule, value)) if isinstance(value, tuple) else type(value)(rule(str(value)))
    return found


def _absolute_name(name: str) -> str:
    """Returns the name of a model; made absolute if it is a path."""
    prefix = next((prefix for prefix in (SAVEDMODEL, LOCAL) if name.startswith(prefix)), "")
    if is_clip(name):
        return absolute(name)
    path = Path(name.removeprefix(prefix)).expanduser()
    # A folder may have a timm model's name; the name then means the model, as it does when it is loaded.
    if name in NAMED or is_timm_name(name) or not path.exists():
        return name
    return f"{prefix.replace(LOCAL, '')}{path.resolve()}"


ABSOLUTE: dict[Refers, Callable[[str], str]] = {
    Refers.DATA: resolve_spec,
    Refers.MODEL: _absolute_name,
    # A link to weights or to a class map is resolved: the record holds what was read. One to images may be moved to
    # others on purpose.
    Refers.WEIGHTS: lambda path: path if path.lower() == "none" else str(Path(path).expanduser().resolve()),
    Refers.CLASS_MAP: lambda path: path if path in RULES else str(Path(path).expanduser().resolve()),
    Refers.CLASS_NAMES: lambda path: path if path == OF_DATA else str(Path(path).expanduser().resolve()),
    Refers.TEMPLATES: lambda path: path if path in NAMED_TEMPLATES else str(Path(path).expanduser().resolve()),
    Refers.FILE: lambda path: resolve_spec(path) if is_address(path) else str(Path(path).expanduser().absolute()),
}
"""How each kind of name becomes independent of the working directory."""


def apply_hyperrule(config: Finetune, cache: Cache) -> Finetune:
    """Returns the configuration with the options that were not given set by BiT-HyperRule (Kolesnikov et al., 2020)."""
    train, terms = cache.splits["train"], task_of(config.task).loss_terms(len(cache.classes))
    count = len(train)
    # The median, since a few panoramas would move the mean over the rule's threshold.
    heights, widths = train.sizes(np.arange(count))
    resize, side = hyperrule.sides(float(np.median(heights.astype(np.int64) * widths)))
    # A smaller --resize shrinks the crop in proportion, since a crop cannot exceed the image.
    fitting = min(side, round((config.resize or resize) * side / resize))
    steps = config.steps
    if config.epochs is not None:
        steps = max(1, round(config.epochs * count / config.batch))
    ruled: dict[str, Any] = {
        "side": config.side or fitting,
        # `is None`, not `or`: 0 turns MixUp off.
        "mixup": hyperrule.mixup(count) if config.mixup is None else config.mixup,
        # The rule's rate was made for SGD, whose steps are in proportion to the loss: to its sum over classes.
        "lr": config.lr or (hyperrule.lr(config.batch) * terms if config.optimizer == "sgd" else FINETUNE_LR),
        "steps": steps or hyperrule.steps(count),
        "epochs": None,
    }
    if config.cropped in ("mild", "squash") and config.resize is None:
        ruled["resize"] = round(ruled["side"] * resize / side)
    if config.eval_resize is None:
        ruled["eval_resize"] = ruled.get("resize", config.resize) or round(ruled["side"] * resize / side)
    # In a run of another length, warm-up and decays come at the same share of it as in the rule's.
    share = ruled["steps"] / hyperrule.steps(count)
    if config.warmup_steps is None:
        ruled["warmup_steps"] = round(hyperrule.warmup_steps(count) * min(1.0, share))
    if config.schedule == "staircase" and not config.decay_steps:
        # A short run may round two decays to the same step, where the rate can fall only once.
        decay = dict.fromkeys(max(1, round(step * share)) for step in hyperrule.decay_steps(count))
        if config.decay_factors and len(decay) != len(config.decay_factors):
            raise InputError(f"{len(config.decay_factors)} decay_factors for {len(decay)} decay_steps; give one each")
        ruled["decay_steps"] = tuple(decay)
    return config.model_copy(update=ruled)
