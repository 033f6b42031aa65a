"""Resolves every default of a run, and the paths in its configuration: what the run's record holds."""

from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import timm
import torch

from funmatch.config import Distill, Finetune, Train
from funmatch.config.choices import STRATEGIES
from funmatch.config.optim import ADAMW_LR, LR, WARMUP_SHARE, WARMUP_STEPS
from funmatch.data.cache.open_cache import Cache
from funmatch.data.decode import pick_decoder
from funmatch.errors import InputError
from funmatch.models.class_map import SAME_NAMES
from funmatch.models.classifier import Classifier
from funmatch.models.load import NAMED
from funmatch.ops.optim import factory, hyperrule
from funmatch.runtime import devices, distributed, env
from funmatch.training import datasets, scoring
from funmatch.training.run import folder as run_folder
from funmatch.training.student import acceleration

Options = TypeVar("Options", bound=Train)
SHARE = 1 / 4
"""Of an accelerator's memory, for pixels."""


def resolve_defaults(config: Options, cache: Cache, student: Classifier, device: torch.device) -> Options:
    """The configuration with every default resolved, and its length in steps."""
    side = config.side or student.card.side
    resize = config.eval_resize or config.resize or scoring.default_eval_resize(side, student.card)
    if resize < side:
        raise InputError(f"eval_resize ({resize}) must be at least side ({side})")
    steps = config.steps or max(1, round((config.epochs or 0) * len(cache.splits["train"]) / config.batch))
    closed = {
        **absolute_paths(config),
        "steps": steps,
        "epochs": None,
        "side": side,
        "crop": config.cropped,
        "resize": _short_side(config, side, resize),
        "eval_resize": resize,
        "mixup": _mixup(config) if config.mixup is None else config.mixup,
        "lr": config.lr or LR,
        "momentum": factory.resolve_momentum(config.optimizer, config.momentum),
        "warmup_steps": min(WARMUP_STEPS, steps // WARMUP_SHARE)
        if config.warmup_steps is None
        else config.warmup_steps,
        "device": str(device) if env.world_size() == 1 else device.type,  # the number is each process's own
        "device_gb": _on_device(config, device),
        **acceleration.resolve_auto(config, steps, side, student, device),
        "decoder": pick_decoder(config.decoder),
    }
    return config.model_copy(update=closed)


def _on_device(config: Train, device: torch.device) -> float:
    """GB of pixels that may lie on the device; a resumed run keeps its value: the device's crops round otherwise."""
    before = distributed.broadcast_from_main(lambda: run_folder.options_of(config.out)).get("device_gb")
    given = before if config.device_gb is None else config.device_gb
    return round(SHARE * devices.device_memory(device) / 1e9, 1) if given is None else given


def _mixup(config: Train) -> float:
    """The a of MixUp's Beta(a, a) where nobody said it: uniform, as in function matching, or as the strategy does."""
    return STRATEGIES[config.strategy].mixup if isinstance(config, Distill) else 1.0


def _short_side(config: Train, side: int, eval_resize: int) -> int | None:
    """The short side of which mild crops are cut: as evaluation has it, but so that there is something to cut."""
    if config.cropped not in ("mild", "squash"):
        return None
    return config.resize or (eval_resize if eval_resize > side else scoring.enlarged_side(side))


def absolute_paths(config: Train) -> dict[str, Any]:
    """The paths in a configuration from the root, so that the record of a run can be used from anywhere."""
    found = datasets.absolute_paths(config)
    found["student"] = _absolute_name(config.student)
    if config.student_weights:
        found["student_weights"] = config.student_weights.expanduser().resolve()
    if isinstance(config, Distill):
        found["teacher"] = tuple(map(_absolute_name, config.teacher))
        found["teacher_weights"] = tuple(
            file if file.lower() == "none" else str(Path(file).expanduser().resolve())
            for file in config.teacher_weights
        )
        if config.classes and config.classes != SAME_NAMES:
            found["classes"] = str(Path(config.classes).expanduser().resolve())
    return found


def _absolute_name(name: str) -> str:
    """The name of a model, with its path from the root if it is one."""
    prefix = next((prefix for prefix in ("savedmodel:", "local-dir:") if name.startswith(prefix)), "")
    path = Path(name.removeprefix(prefix)).expanduser()
    if name in NAMED or timm.is_model(name.partition(".")[0]) or not path.exists():
        return name
    return f"{prefix.replace('local-dir:', '')}{path.resolve()}"


def apply_hyperrule(config: Finetune, cache: Cache) -> Finetune:
    """The configuration with what was not given set by BiT-HyperRule for these images."""
    train = cache.splits["train"]
    count = len(train)
    heights, widths = train.sizes(np.arange(count))
    resize, side = hyperrule.sides(float(np.median(heights.astype(np.int64) * widths)))
    fitting = min(side, round((config.resize or resize) * side / resize))  # images resized to less give less
    steps = config.steps
    if config.epochs is not None:
        steps = max(1, round(config.epochs * count / config.batch))
    ruled: dict[str, Any] = {
        "side": config.side or fitting,
        "mixup": hyperrule.mixup(count) if config.mixup is None else config.mixup,
        "lr": config.lr or (hyperrule.lr(config.batch) if config.optimizer == "sgd" else ADAMW_LR),
        "steps": steps or hyperrule.steps(count),
        "epochs": None,
    }
    if config.cropped in ("mild", "squash") and config.resize is None:
        ruled["resize"] = round(ruled["side"] * resize / side)
    if config.eval_resize is None:
        ruled["eval_resize"] = ruled.get("resize", config.resize) or round(ruled["side"] * resize / side)
    share = ruled["steps"] / hyperrule.steps(count)  # a run of another length has its steps where the rule's has them
    if config.warmup_steps is None:
        ruled["warmup_steps"] = round(hyperrule.warmup_steps(count) * min(1.0, share))
    if config.schedule == "staircase" and not config.decay_steps:
        decay = dict.fromkeys(max(1, round(step * share)) for step in hyperrule.decay_steps(count))
        if config.decay_factors and len(decay) != len(config.decay_factors):
            raise InputError(f"{len(config.decay_factors)} decay_factors for {len(decay)} decay_steps; give one each")
        ruled["decay_steps"] = tuple(decay)
    return config.model_copy(update=ruled)
