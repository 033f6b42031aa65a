"""Decides at which steps a run logs, evaluates and saves."""

from dataclasses import dataclass

from funmatch.config import Train

LOG_POINTS, EVALUATIONS, SAVES = 50, 10, 10
"""At least how many of each a run has whose intervals come from its length, if it has as many steps."""
LOG_CAP, EVAL_CAP, SAVE_CAP = 50, 500, 500
"""Longest intervals that come from the length of a run, in steps."""
EARLY_SHARE = 0.02
"""Share of the run after which it is evaluated for the first time."""
PASSES = 10
"""Forward passes of the student that training on an image is taken to cost: three of its own, and the teacher's."""


@dataclass(frozen=True)
class Due:
    """What is due after a step."""

    logged: bool
    evaluated: bool
    saved: bool


def default_intervals(steps: int, batch: int, images: int, eval_cap: int = EVAL_CAP) -> dict[str, int]:
    """Returns `log_every`, `eval_every`, `save_every` and `eval_first` that suit the length of a run.

    Args:
        steps, batch: its length, and the images of a step.
        images: number of images that an evaluation looks at.
        eval_cap: most steps between two evaluations.
    """
    # Evaluations should not take longer than the training between them: a few steps for each of 50,000 images would.
    fair = -(-images // (PASSES * batch))
    eval_every = _clamp(max(steps // EVALUATIONS, fair), eval_cap)
    return {
        "log_every": _clamp(steps // LOG_POINTS, LOG_CAP),
        "eval_every": eval_every,
        "save_every": _clamp(steps // SAVES, SAVE_CAP),
        # Early, so that a run that learns nothing is noticed before a tenth of it is over.
        "eval_first": _clamp(round(EARLY_SHARE * steps), eval_every),
    }


def _clamp(value: int, most: int) -> int:
    return max(1, min(value, most))


def due_at(config: Train, step: int) -> Due:
    """Returns what is due after a step: every so many steps, at the end, and an early evaluation.

    Args:
        config: the resolved options.
    """
    last = step == config.steps

    def every(interval: int | None) -> bool:
        assert interval is not None
        return last or step % interval == 0

    return Due(every(config.log_every), every(config.eval_every) or step == config.eval_first, every(config.save_every))


def evaluations_until(config: Train, step: int) -> int:
    """Counts the evaluations of a run up to a step; the options are resolved."""
    every, first, steps = config.eval_every, config.eval_first, config.steps
    assert every is not None
    assert steps is not None
    early = first is not None and first <= min(step, steps) and first % every > 0 and first != steps
    return step // every + early + (step == steps and steps % every > 0)


def saves_of(config: Train) -> int:
    """Counts the checkpoints of a whole run; the options are resolved."""
    assert config.save_every is not None
    return -(-(config.steps or 1) // config.save_every)
