"""Explains a loss, gradient or weight that is not finite: where it arose, and what can be done."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from funmatch.errors import InputError
from funmatch.runtime import devices
from funmatch.runtime.log import info
from funmatch.runtime.text import listed
from funmatch.training import datasets
from funmatch.training.objective import Objective
from funmatch.training.run.folder import Run, saved_step
from funmatch.training.run.state import NotFinite
from funmatch.training.setup import TrainSetup

NAMED = 3
"""Images that a message names, at most."""


@contextmanager
def explained(setup: TrainSetup[Any], objective: Objective, run: Run) -> Generator[None]:
    """Turns a `NotFinite` of the block into an `InputError` that says where it arose and what can be done."""
    try:
        yield
    except NotFinite as error:
        reason = error
    else:
        return
    # Not within `except`: the second error would otherwise be shown as one that arose while the first was handled.
    names = image_names(setup, reason.step)
    raise InputError(
        f"{reason} ({_describe(setup, reason.step, names)}); {_remedy(setup, objective, run, reason.step, names)}"
    )


def check_budget(setup: TrainSetup[Any], step: int, left_out: int) -> None:
    """Raises `NotFinite` if a run has left out updates more often than it may."""
    if left_out > setup.config.max_nonfinite:
        raise NotFinite(
            f"updates were left out {left_out - 1} times (--max-nonfinite), and the loss or a gradient is", step
        )


def warn_left_out(setup: TrainSetup[Any], first: int, step: int, left_out: int) -> None:
    """Says that the updates from the first to this step are left out.

    Args:
        left_out: how many times this has happened.
    """
    passed = f"step {step:,}" if first == step else f"steps {first:,} to {step:,}"
    info(
        f"WARNING: a loss or gradient is not finite at step {step:,} "
        f"({_describe(setup, step, image_names(setup, step))}); {passed} left out, {left_out} of at most "
        f"{setup.config.max_nonfinite} times"
    )


def _describe(setup: TrainSetup[Any], step: int, names: Sequence[str]) -> str:
    """Names the learning rate and the images of a step."""
    return f"learning rate {setup.loop.lr_at(step - 1):.3g}; images {listed(names, NAMED)}"


def image_names(setup: TrainSetup[Any], step: int) -> list[str]:
    """Returns the names of the images of a step's global batch, in its order."""
    split = setup.loader.split
    # − 1: the step that leads to `step` updates is drawn by the number of updates before it.
    indices = setup.loader.sample(step - 1).indices
    try:
        names = datasets.name_training_images(setup.config, split)
    except InputError:
        # Of data that is gone since: the message is about something else.
        names = [f"{split.name}/{number}" for number in range(len(split))]
    return [names[index] for index in indices]


def _remedy(setup: TrainSetup[Any], objective: Objective, run: Run, step: int, names: Sequence[str]) -> str:
    """Says which checkpoint is the newest, who is to blame, and what to try."""
    saved = saved_step(run.checkpoints)
    replay = f"funmatch replay {run.folder} --step {step} shows where it begins"
    kept = f"the newest checkpoint is of step {saved:,}" if saved else "no checkpoint has been written yet"
    if blamed := [names[row] for row in _bad_teacher_rows(setup, objective, step)]:
        return (
            f"{kept}. The teacher's logits are not finite for images {listed(blamed, NAMED)}: try "
            f"--teacher-precision fp32 or another teacher, with another --out, or the same command "
            f"with --on-nonfinite skip. {replay}"
        )
    return (
        f"{kept}. Try a lower --lr, a longer --warmup-steps, or --precision fp32, with another --out; or the same "
        f"command with --on-nonfinite skip. {replay}"
    )


@torch.inference_mode()
def _bad_teacher_rows(setup: TrainSetup[Any], objective: Objective, step: int) -> list[int]:
    """Returns this process's places in the batch of a step for which the teachers' logits are not finite."""
    if objective.logits is None:
        return []
    batch = objective.batches.batch_at(step - 1).to(setup.loop.device)
    with devices.autocast(setup.loop.device, setup.loop.precision):
        # The student's are those of its weights now: of the teachers', which do not change, they say nothing.
        _, teacher = objective.logits(batch)
    return (np.flatnonzero(~teacher.isfinite().all(-1).cpu().numpy()) + batch.first_row).tolist()
