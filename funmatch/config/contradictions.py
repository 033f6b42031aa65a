"""Knobs that contradict each other, told in sentences before anything is loaded.

Each function takes a table of `config`, which asks them, and gives a sentence for each thing that is wrong.
"""

from pathlib import Path
from typing import Any

from funmatch.config.choices import DISTANCES, STRATEGIES
from funmatch.config.options import outside
from funmatch.errors import unknown


def of_length(config: Any) -> list[str]:
    """Whether the length is said once; where a rule knows one, at most once."""
    if config.steps is not None and config.epochs is not None:
        return ["give the length by either --steps or --epochs, not both"]
    if config.steps is None and config.epochs is None and not config.by_rule:
        return ["give the length by either --steps or --epochs, e.g. --epochs 1000"]
    return []


def of_schedule(config: Any) -> list[str]:
    """What a schedule or an optimizer has no use for."""
    steps, factors, found = config.decay_steps, config.decay_factors, []
    if config.schedule == "staircase" and not steps and not config.by_rule:
        found.append("a staircase needs --decay-steps, e.g. --decay-steps 200 300 400")
    if steps and config.schedule != "staircase":
        found.append(f"decay_steps belong to --schedule staircase, not {config.schedule}")
    if config.cooldown_steps is not None and config.schedule != "wsd":
        found.append(f"cooldown_steps belong to --schedule wsd, not {config.schedule}")
    if config.momentum_dtype != "fp32" and config.optimizer != "adamw":
        found.append(f"momentum_dtype {config.momentum_dtype} belongs to --optimizer adamw, not {config.optimizer}")
    if moved(config, "cooldown_shape") and config.schedule != "wsd":
        found.append(f"cooldown_shape belongs to --schedule wsd, not {config.schedule}")
    if factors and len(factors) != len(steps) and not (config.by_rule and not steps):
        found.append(f"{len(factors)} decay_factors for {len(steps)} decay_steps; give one each")
    if list(steps) != sorted(set(steps)) or (steps and steps[0] < 1):
        found.append(f"decay_steps must rise from 1 on, got {', '.join(map(str, steps))}")
    return found + [f"decay_factors must be at least 0, got {factor}" for factor in factors if factor < 0]


def of_sizes(config: Any) -> list[str]:
    """Views that are cut out of something smaller, and shares beyond their bounds."""
    found = []
    if config.crop_min_area > 1:
        found.append(f"crop_min_area is a share of the image, at most 1, got {config.crop_min_area}")
    for name in ("weight_decay", "drop_rate", "drop_path", "ema", "momentum", "label_smoothing"):
        if (share := getattr(config, name)) is not None and not 0 <= share < 1:
            found.append(f"{name} must lie in [0, 1), got {share}")
    for name in ("eval_resize", "resize"):
        if config.side and (size := getattr(config, name)) and size < config.side:
            found.append(f"{name} ({size}) must be at least side ({config.side})")
    if moved(config, "crop_min_area") and config.cropped != "inception":
        found.append(f"crop_min_area belongs to Inception crops, not to {config.cropped} ones")
    if config.resize and config.cropped not in ("mild", "squash"):
        found.append(f"resize belongs to mild crops (--crop mild or squash), not to {config.cropped} ones")
    return found


def of_mixing(config: Any) -> list[str]:
    """Knobs of MixUp without MixUp, and a λ that is no share."""
    found = []
    if config.mixup_lam is not None and not 0 <= config.mixup_lam <= 1:
        found.append(f"mixup_lam is the share of the image itself, in [0, 1], got {config.mixup_lam}")
    if config.mixup_lam is not None and config.mixup not in (None, 0, 1):
        found.append(f"mixup_lam is taken as it is, so mixup {config.mixup} has no use; say one of them")
    if config.mixup_lam is not None and not config.mixup_max:
        found.append("mixup_lam is taken as it is, so mixup_max has no use; say one of them")
    if config.randaugment and not (config.randaugment[0] >= 1 and 0 <= config.randaugment[1] <= 30):
        found.append(
            "randaugment is a number of operations from 1 on and a magnitude from 0 to 30, e.g. 2 9, got "
            f"{' '.join(map(str, config.randaugment))}"
        )
    if not config.mixes:
        idle = [name for name in ("mixup_mode", "mixup_max", "mixup_lam") if moved(config, name)]
        if config.cutmix and "mixup_mode" in idle:
            idle.remove("mixup_mode")  # it says how boxes are drawn, too
        row = STRATEGIES.get(getattr(config, "strategy", ""))
        hint = "leave it out" if row and row.fixed else "say --mixup 1 too"
        found += [f"{name} belongs to MixUp, which is off; {hint}" for name in idle]
    return found


def of_views(config: Any) -> list[str]:
    """A strategy that is unknown, or that other knobs of the views contradict."""
    row, found = STRATEGIES.get(config.strategy), []
    if row is None:
        return [str(unknown("strategy", config.strategy, STRATEGIES))]
    if row.fixed and config.mixup:
        found.append(
            f"mixup ({config.mixup}) needs a teacher that sees the mixed images, but that of {config.strategy} is "
            "fixed: its answers are those to each image alone. Leave --mixup out, or say a strategy of same/ or ind/"
        )
    if row.teacher != "same":
        found += [
            f"{name} changes the view that both see, but in {config.strategy} the teacher sees another; say a strategy "
            "of same/, or funmatch"
            for name in ("cutmix", "randaugment")
            if getattr(config, name)
        ]
    if row.mixup and config.mixup == 0:
        found.append(f"{config.strategy} is same/ic with MixUp; without (mixup 0) say --strategy same/ic")
    if config.crop and config.crop not in row.crops:
        others = [name for name, each in STRATEGIES.items() if config.crop in each.crops]
        found.append(
            f"crop {config.crop} contradicts strategy {config.strategy}, whose student sees {row.crop} crops; "
            f"{config.crop} ones are seen in {', '.join(others)}"
        )
    if row.teacher != "ensemble" and moved(config, "teacher_crops"):
        found.append(f"teacher_crops belongs to strategy fix/ic_ens, not {config.strategy}")
    return found + outside(config, {"teacher_crops": 1, "teacher_batch": 1}, {"teacher_crops": 10**6})


def of_distance(config: Any) -> list[str]:
    """A distance that is unknown, or knobs that it has no use for."""
    found = []
    if config.distance not in DISTANCES:
        found.append(str(unknown("distance", config.distance, DISTANCES)))
    elif not DISTANCES[config.distance]:
        tempered = ", ".join(name for name, at_temperature in DISTANCES.items() if at_temperature)
        found += [
            f"{name} belongs to distances of probabilities ({tempered}), not {config.distance}"
            for name in ("temperature", "t_squared")
            if moved(config, name)
        ]
    if config.distance == "dist" and config.micro_batch and config.micro_batch < config.batch:
        found.append("distance dist compares the images of a batch with each other, so micro_batch would change it")
    if config.distance == "hard" and config.standardise:
        found.append("standardise does not change which class is the first, so distance hard has no use for it")
    if not 0 <= config.label_weight <= 1:
        found.append(f"label_weight is a share of the loss, in [0, 1], got {config.label_weight}")
    if config.label_weight and config.unlabelled:
        found.append(f"label_weight ({config.label_weight}) needs labels, but unlabelled forgets them")
    if config.label_smoothing and config.distance != "hard" and not config.label_weight:
        found.append("label_smoothing belongs to --distance hard or to labels (--label-weight), and neither is used")
    return found


def of_tape(config: Any) -> list[str]:
    """A tape of answers that are kept anyway, or of too little for the distance."""
    row, found = STRATEGIES.get(config.strategy), []
    if config.tape is None:
        found += [f"{name} belongs to --tape" for name in ("tape_top", "tape_full") if moved(config, name)]
    elif row and row.fixed:
        found.append(f"the teacher of {config.strategy} is fixed: its answers are kept anyway. Leave --tape out")
    if config.tape is not None and config.out is not None:
        places = [Path(each).expanduser().absolute() for each in (config.tape, config.out)]
        if places[0].is_relative_to(places[1]) or places[1].is_relative_to(places[0]):
            found.append(f"tape {config.tape} and out {config.out} must be apart: each is a folder of its own")
    if config.tape_top is not None:
        if not DISTANCES.get(config.distance, True) or config.distance == "dist" or config.standardise:
            said = "standardise" if config.standardise else f"distance {config.distance}"
            found.append(f"{said} needs all of the teacher's logits, and tape_top keeps some; leave one of them out")
        found += outside(config, {"tape_top": 1}, {"tape_top": 1 << 16})
    return found


def moved(config: Any, name: str) -> bool:
    """Whether a knob is not at its default."""
    return getattr(config, name) != type(config).model_fields[name].default
