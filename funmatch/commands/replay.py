"""Takes a step of a run again, without changing the run, and shows where a loss, gradient or weight is not finite."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from funmatch.commands.common.ready import build, prepared
from funmatch.config import TAUGHT, Train
from funmatch.config.tools import Replay
from funmatch.errors import InputError
from funmatch.reports.result import Result
from funmatch.runtime import devices, env
from funmatch.runtime.log import ProgressBar, info, print_table
from funmatch.runtime.text import listed
from funmatch.training import nonfinite
from funmatch.training.loop import compute_gradients, fit, set_lr
from funmatch.training.objective import Objective
from funmatch.training.run import checkpoint
from funmatch.training.run import folder as run_folder
from funmatch.training.run.places import saved_step
from funmatch.training.setup import TrainSetup
from funmatch.training.student.acceleration import accelerate_student

SHOWN = 10
"""Parameters and images that are listed, at most."""


BEGINNING = 0
"""Step of the first weights."""


@dataclass(frozen=True)
class Replayed:
    """A step that was taken again.

    Attributes:
        step: its number.
        start: the step of the checkpoint from which it was reached.
        lr: its learning rate.
        losses: by name, the means over the batch.
        gradient_norm: of all gradients together, before clipping.
        forward: the first layer whose output is not finite, or None.
        backward: parameters whose gradient is not finite.
        weights: parameters that are not finite before the step.
        images: a row for each image: name, `lam`, `teacher_finite`, `student_finite`.
    """

    step: int
    start: int
    lr: float
    losses: dict[str, float]
    gradient_norm: float
    forward: str | None
    backward: list[str]
    weights: list[str]
    images: list[dict[str, Any]]


def run(options: Replay) -> Result:
    """Takes a step again.

    Returns:
        the attributes of `Replayed`; None stands for a number that is not finite.

    Raises:
        InputError: the folder is no run, the run has no such step, or its images or teacher have changed.
    """
    found = replay(options.folder, options.step)
    return Result(options.folder, run_folder.finite(asdict(found)))


def replay(folder: Path, step: int | None = None) -> Replayed:
    """Takes the steps from the newest checkpoint before a step up to it, as the run does, and looks into the last.

    Args:
        folder: of the run, which is only read.
        step: number of the update, from 1; None for the one after the newest checkpoint.

    Raises:
        InputError: the run has no such step, or its data or teacher have changed.
    """
    if env.world_size() > 1:
        raise InputError("replay takes the steps in a single process; start it without torchrun")
    run = run_folder.find_run(folder)
    step = saved_step(run.checkpoints) + 1 if step is None else step
    built, loaded = build(recorded_config(run))
    check_same(run, built)
    with prepared(built, loaded) as (setup, objective):
        if step > setup.loop.steps:
            raise InputError(f"{run.folder} has {setup.loop.steps:,} steps, and no step {step:,}")
        net, optimizer = setup.student.classifier.net, setup.student.optimizer
        state = checkpoint.load_before(run.checkpoints, step, net, optimizer, setup.student.others)
        scaler = devices.loss_scaler(setup.loop.device, setup.loop.precision)
        if state:
            scaler.load_state_dict(state.scaler)
        start = state.step if state else BEGINNING
        info(f"{run.folder}: taking steps {start + 1:,} to {step:,} again, from the checkpoint of step {start:,}")
        # As the run, whose rounding depends on its kernels.
        kinds = setup.provenance["kernels"]
        accelerate_student(setup.student.classifier, setup.loop, setup.config, setup.config.side or 0, kinds)
        take_steps(setup, objective, scaler, start, step - 1)
        return look_into(setup, objective, scaler, start, step)


def recorded_config(run: run_folder.Run) -> Train:
    """Returns the options of a run as its record says; its folder may have been moved."""
    record = run.config
    # A tape is left alone: what it holds is computed again.
    own = {"out": run.folder, "tape": None, "tape_top": None} if record["verb"] == "distill" else {"out": run.folder}
    return TAUGHT[record["verb"]].model_validate({**record["knobs"], **own})


def check_same(run: run_folder.Run, setup: TrainSetup[Any]) -> None:
    """Raises `InputError` if the images are not those of the run."""
    if run.config["facts"].get("data") != setup.cache.key:
        raise InputError(f"the images of {run.folder} have changed since, so its steps cannot be taken again")


def take_steps(
    setup: TrainSetup[Any], objective: Objective, scaler: torch.amp.GradScaler, start: int, stop: int
) -> None:
    """Takes the steps from `start` updates to `stop`, as the run took them."""
    student, optimizer, options = setup.student.classifier, setup.student.optimizer, setup.loop
    batches = map(objective.batches.batch_at, range(start, stop))
    # As the run that leaves out such updates; in one that stops there are none before its last step.
    left_out: list[int] | None = None if setup.config.on_nonfinite == "stop" else []
    with ProgressBar("replay", max(stop - start, 1), 0) as bar:
        for number, _ in fit(options, student, optimizer, scaler, batches, objective.loss, start, left_out):
            bar.update(number - start)


def look_into(
    setup: TrainSetup[Any], objective: Objective, scaler: torch.amp.GradScaler, start: int, step: int
) -> Replayed:
    """Computes losses and gradients of a step, and where they are not finite."""
    student, options = setup.student.classifier, setup.loop
    batch = objective.batches.batch_at(step - 1).to(options.device)
    weights = [name for name, parameter in student.net.named_parameters() if not parameter.isfinite().all()]
    student.train()
    devices.seed_networks(options.seed, step - 1, options.device, env.rank())
    set_lr(setup.student.optimizer, options.lr, options.factor(step - 1))
    setup.student.optimizer.zero_grad(set_to_none=True)
    with first_not_finite(student.net) as found:
        losses = compute_gradients(options, batch, scaler, objective.loss)
    scaler.unscale_(setup.student.optimizer)
    gradients = {name: each.grad for name, each in student.net.named_parameters() if each.grad is not None}
    norm = torch.stack([gradient.double().norm() for gradient in gradients.values()]).norm().item()
    return Replayed(
        step,
        start,
        options.lr_at(step - 1),
        {name: loss.item() for name, loss in losses.items()},
        norm,
        found[0] if found else None,
        [name for name, gradient in gradients.items() if not gradient.isfinite().all()],
        weights,
        image_rows(setup, objective, step),
    )


@contextmanager
def first_not_finite(net: nn.Module) -> Generator[list[str]]:
    """Yields a list to which the names of layers are appended whose output is not finite, in the order of the pass."""
    found: list[str] = []

    def look(name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and not output.isfinite().all():
            found.append(name)

    # Layers only: a block that holds one would be named in its place.
    layers = {name: each for name, each in net.named_modules() if not [*each.children()]}
    handles = [module.register_forward_hook(partial(look, name)) for name, module in layers.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def image_rows(setup: TrainSetup[Any], objective: Objective, step: int) -> list[dict[str, Any]]:
    """Describes the images of a step, in the order of its batch."""
    batch = objective.batches.batch_at(step - 1).to(setup.loop.device)
    names = nonfinite.image_names(setup, step)
    own = torch.as_tensor(batch.own_weight).expand(len(batch)).tolist()
    rows: list[dict[str, Any]] = [{"image": name, "lam": lam} for name, lam in zip(names, own, strict=True)]
    if objective.logits:
        with devices.autocast(setup.loop.device, setup.loop.precision):
            logits = dict(zip(("student_finite", "teacher_finite"), objective.logits(batch), strict=True))
        for key, each in logits.items():
            for row, finite in zip(rows, each.isfinite().all(-1).tolist(), strict=True):
                row[key] = finite
    return rows


def show(result: Result) -> None:
    """Prints the step."""
    step = result.metrics
    rows = [
        ["reached from", f"the checkpoint of step {step['start']:,}" if step["start"] else "the first weights"],
        ["learning rate", f"{step['lr']:.4g}"],
        *([name, _number(value)] for name, value in step["losses"].items()),
        ["gradient norm", _number(step["gradient_norm"])],
        ["weights that are not finite", listed(step["weights"], SHOWN) or "none"],
        ["first output that is not finite", step["forward"] or "none"],
        ["gradients that are not finite", listed(step["backward"], SHOWN) or "none"],
        ["images", listed([each["image"] for each in step["images"]], SHOWN) or "none"],
    ]
    for who in ("teacher", "student"):
        bad = [each["image"] for each in step["images"] if not each.get(f"{who}_finite", True)]
        rows.append([f"{who}'s logits that are not finite", listed(bad, SHOWN) or "none"])
    print_table(f"step {step['step']:,} of {result.folder}", ["", ""], rows)


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.6g}"
