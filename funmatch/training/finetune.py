"""Fine-tuning: a network with pretrained weights is taught the labels of some images, as BiT-HyperRule says."""

from typing import Any

import numpy as np

from funmatch.config import Finetune
from funmatch.data.cache.open_cache import Cache
from funmatch.errors import InputError
from funmatch.ops.optim import hyperrule
from funmatch.runtime import distributed
from funmatch.runtime.log import info
from funmatch.training.setup import TrainSetup, Trial, build_setup, open_data
from funmatch.training.teachers.loading import Modules
from funmatch.training.train import check_labels, label_loss
from funmatch.training.trainer import run_training

CUT = "10%"
"""Of the training images, for validation, where there are no images for it."""
ADAMW_LR = 1e-4


def run(config: Finetune, given: Modules | None = None, trial: Trial | None = None) -> dict[str, Any]:
    """Fine-tunes a network and returns the figures of the finished run.

    Args:
        given: modules from Python, by the names that stand for them.
        trial: what a search asks of the run, if it is part of one.
    """
    config.check()
    with distributed.process_group(config.device):
        lesson = build_finetune_setup(config, given, trial)
        return run_training(lesson, label_loss(lesson))


def build_finetune_setup(config: Finetune, given: Modules | None = None, trial: Trial | None = None) -> TrainSetup:
    """The run made ready, with what nobody said as the rule says it."""
    cache, cut = with_validation(config, trial)
    ruled = apply_hyperrule(cut, check_labels(cut, cache))
    ruled.check()  # what contradicts the rule
    return build_setup("finetune", ruled, cache, classes=len(cache.classes), given=given, asked=config, trial=trial)


def with_validation(config: Finetune, trial: Trial | None = None) -> tuple[Cache, Finetune]:
    """The images, with some for validation: which network is kept must not be chosen on the test images."""
    cache = open_data(config, trial)
    if "val" in cache.splits or config.val is not None:
        return cache, config
    if config.eval_data:
        info(f"{cache.name} has no split val, so the network is kept as it is at the end")
        return cache, config.model_copy(update={"keep": "last"})
    info(f"{cache.name} has no split val: {CUT} of the training images are cut off for it (--val says how many)")
    config = config.model_copy(update={"val": CUT})
    return open_data(config, trial), config


def apply_hyperrule(config: Finetune, cache: Cache) -> Finetune:
    """The configuration with what nobody said as BiT-HyperRule says it for these images."""
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
