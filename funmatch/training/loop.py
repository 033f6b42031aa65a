"""The one loop: batches in, (step, loss) out. What is taught is the caller's loss; when to log, judge and save, too."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from funmatch.data.batch import Batch
from funmatch.ops.optim.updates import clip_grad_norm_, set_lr
from funmatch.runtime import devices, distributed, env, malloc
from funmatch.runtime.timing import timed, timed_iter


@dataclass(frozen=True)
class LoopOptions:
    """How a student is taught.

    Attributes:
        steps: length of the whole run.
        lr: at the top of the schedule.
        factor: of the learning rate at each step.
        clip_norm: of all gradients together, or None.
        micro_batch: images of a batch that go through the student at once, or None for all.
        seed: of the run.
        device: on which the student lives.
        precision: fp32, bf16 or fp16.
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
        """The learning rate of the update that leads from `step` to `step` + 1."""
        return self.lr * self.factor(step)


def fit(
    course: LoopOptions,
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    batches: Iterable[Batch],
    loss_of: Callable[[Batch], Tensor],
    start: int = 0,
) -> Iterator[tuple[int, Tensor]]:
    """Updates the student once a batch.

    Args:
        batches: of steps `start`, `start` + 1, …
        loss_of: a batch on the student's device to its mean loss, a scalar that reaches the student. Of several
            processes each has an equal share of the batch.
        start: updates already done.

    Yields:
        updates done, and the loss of the last one, still on the device so that nothing waits for it.
    """
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    with malloc.keep_freed_memory(course.device):
        for step, batch in enumerate(timed_iter(batches, "waiting for views"), start):
            if not student.training:  # the caller may have judged it
                student.train()
            devices.seed_networks(course.seed, step, course.device, env.rank())
            set_lr(optimizer, course.lr, course.factor(step))
            optimizer.zero_grad(set_to_none=True)
            losses = []
            for piece, share in batch.to(course.device).pieces(course.micro_batch):
                with timed("mixing and distance"), devices.autocast(course.device, course.precision):
                    loss = loss_of(piece) * share
                with timed("backward"):
                    scaler.scale(loss).backward()
                losses.append(loss.detach())
            told = torch.stack(losses).sum()
            with timed("optimizer"):
                # Before they are unscaled: so a gradient that overflowed on one process is seen by all.
                distributed.all_reduce_mean_([told, *(each.grad for each in parameters if each.grad is not None)])
                scaler.unscale_(optimizer)
                if course.clip_norm is not None:
                    clip_grad_norm_(parameters, course.clip_norm)
                scaler.step(optimizer)
                scaler.update()
            yield step + 1, told
