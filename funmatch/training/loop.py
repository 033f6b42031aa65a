"""Runs the training loop: batches in, (step, losses) out; the caller decides the loss, and when to log and save."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from funmatch.config import Train
from funmatch.data.loader import Batch
from funmatch.ops.optim import schedules
from funmatch.runtime import devices, distributed, env, malloc
from funmatch.runtime.timing import timed

Losses = Mapping[str, Tensor]
"""Scalars by name: `loss`, which is minimised, and the parts that it consists of (`distance`, `label_loss`); the same
names in every step."""


@dataclass(frozen=True)
class LoopOptions:
    """Options of the training loop.

    Attributes:
        steps: length of the whole run.
        lr: peak learning rate.
        factor: maps a step to its factor of the peak learning rate.
        clip_norm: limit of the global gradient norm, or None.
        micro_batch: images per forward pass (gradient accumulation), or None for the whole batch.
        seed: seed of the run.
        device: where the student is.
        precision: arithmetic of autocast: fp32, bf16 or fp16.
    """

    steps: int
    lr: float
    factor: Callable[[int], float]
    clip_norm: float | None
    seed: int
    device: torch.device
    precision: str
    micro_batch: int | None = None

    def lr_at(self, step: int) -> float:
        """Returns the learning rate of the update that leads from `step` to `step` + 1."""
        # Of the step before the update: the first update of a warm-up from 0 is made with a rate of 0.
        return self.lr * self.factor(step)


def loop_options(config: Train, device: torch.device) -> LoopOptions:
    """Returns the options of the training loop of a resolved configuration."""
    steps, warmup = config.steps, config.warmup_steps or 0
    assert steps is not None
    assert config.lr is not None

    def factor(step: int) -> float:
        decay, cooldown = (config.decay_steps, config.decay_factors), (config.cooldown_steps, config.cooldown_shape)
        return schedules.factor(config.schedule, step, steps, warmup, *decay, *cooldown)

    return LoopOptions(
        steps, config.lr, factor, config.clip_norm, config.seed, device, config.precision, config.micro_batch
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float, factor: float) -> None:
    """Sets the learning rate of every group to `lr · factor`, the factor of the schedule."""
    # In every step, instead of by torch's schedulers: a function of the step alone has no state to save and restore.
    for group in optimizer.param_groups:
        group["lr"] = lr * factor


def fit(
    options: LoopOptions,
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    batches: Iterable[Batch],
    loss_of: Callable[[Batch], Losses],
    start: int = 0,
    left_out: list[int] | None = None,
) -> Iterator[tuple[int, Losses]]:
    """Updates the student once per batch.

    Args:
        batches: of steps `start`, `start` + 1, …
        loss_of: maps a batch on the student's device to its mean losses, of which `loss` is minimised. With several
            processes each has an equal share of the batch.
        start: updates already done.
        left_out: the number of each step is appended whose loss or gradient is not finite, and its update is left out:
            the student stays as it was. Costs a wait for the device in every step. None: nothing is checked.

    Yields:
        updates done, and the losses of the last one, still on the device so that nothing waits for them.
    """
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    # Whatever mode it is in: buffers of a checkpoint may say that layers do not observe their inputs, as they do not
    # while the student is evaluated.
    student.train()
    with malloc.keep_freed_memory(options.device):
        for step, batch in enumerate(batches, start):
            if not student.training:  # the caller may have evaluated it
                student.train()
            # Dropout becomes a function of (seed, step, rank), so that a resumed run drops the same units.
            devices.seed_networks(options.seed, step, options.device, env.rank())
            set_lr(optimizer, options.lr, options.factor(step))
            optimizer.zero_grad(set_to_none=True)
            statistics = None if left_out is None else [buffer.clone() for buffer in student.buffers()]
            total = compute_gradients(options, batch.to(options.device), scaler, loss_of)
            with timed("optimizer"):
                if not _update(options, parameters, optimizer, scaler, total, check=left_out is not None):
                    assert left_out is not None
                    assert statistics is not None
                    # BatchNorm has already averaged in what the forward pass gave.
                    torch._foreach_copy_([*student.buffers()], statistics)
                    left_out.append(step + 1)
            yield step + 1, total


def compute_gradients(
    options: LoopOptions, batch: Batch, scaler: torch.amp.GradScaler, loss_of: Callable[[Batch], Losses]
) -> dict[str, Tensor]:
    """Computes the losses of a batch on the device, and adds their gradients, scaled, to the parameters'.

    Returns:
        the losses, of this process's images.
    """
    pieces = []
    for piece, share in batch.pieces(options.micro_batch):
        with timed("mixing and distance"), devices.autocast(options.device, options.precision):
            # Weighted by size: the pieces' gradients then add up to the whole batch's.
            losses = {name: loss * share for name, loss in loss_of(piece).items()}
        # Outside autocast, as PyTorch advises: each operation's gradient has the type of its forward pass.
        with timed("backward"):
            scaler.scale(losses["loss"]).backward()
        pieces.append({name: loss.detach() for name, loss in losses.items()})  # else it keeps its activations
    return {name: torch.stack([each[name] for each in pieces]).sum() for name in pieces[0]}


def _update(
    options: LoopOptions, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler, losses: Losses, *, check: bool,
) -> bool:  # fmt: skip
    """Updates the parameters by their gradients, averaged over processes as the losses are.

    Args:
        check: leave the update out where the losses or gradients are not finite.

    Returns:
        whether the parameters were updated.
    """
    # Before unscaling, so that a gradient that overflowed on one process is seen by all.
    gradients = [each.grad for each in parameters if each.grad is not None]
    distributed.all_reduce_mean_([*losses.values(), *gradients])
    scaler.unscale_(optimizer)
    # After unscaling: the limit is of true gradients, of all together as in the paper's code.
    if options.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(parameters, options.clip_norm)
    # The gradients of fp16 overflow now and then by design: the scaler leaves out such an update itself.
    checked = [*losses.values(), *(() if scaler.is_enabled() else gradients)] if check else []
    updated = not checked or all_finite(checked)
    if updated:
        scaler.step(optimizer)
    scaler.update()
    return updated


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Returns whether all values of all tensors are finite."""
    # Stacked, so that the host waits for the device once, not for each tensor.
    each = [tensor.isfinite().all() for tensor in tensors]
    return not each or bool(torch.stack(each).all())
