"""Implements Shampoo: the gradient of a kernel is preconditioned along each of its axes.

Gupta et al., "Shampoo: Preconditioned stochastic tensor optimization" (2018), as Anil et al. made it practical for deep
networks ("Scalable second order optimization for deep learning", 2020): a tensor whose small axes are merged is split
into blocks. A block G with k axes keeps for each the statistic L ← β₂·L + (1 − β₂)·G·Gᵀ of its unfolding, and is
multiplied along it by L^(−1/2k). The tensor as a whole then gets the length of another optimizer's update: grafting.

Blocks of one shape, of whatever parameters, are one tensor here, and so are matrices of one side: a ResNet-50 is a few
dozen matrix products and eigenvalue problems instead of some ten thousand.
"""

from typing import Any

import torch
from torch import Tensor

from funmatch.ops.optim.shampoo_blocks import BlockStacks, ShardedMap, map_locally, merge_axes

GRAFTS = ("none", "sgd", "sqrtn", "adagrad", "adagrad-normalized", "rmsprop", "rmsprop-normalized")


class Shampoo(torch.optim.Optimizer):
    """Shampoo with momentum and grafting, without weight decay.

    The options have the names of the published code. A parameter that is a vector, or becomes one by merging, has no
    preconditioner and is updated by its graft.

    Args:
        params: parameters or groups, as for any optimizer of torch.
        lr: learning rate.
        betas: decay of the momentum, m ← β₁·m + update, and of the statistics; with β₂ = 1 these are sums.
        block_size: longest side of a block, and longest axis that small axes are merged to.
        graft_type: optimizer whose update's length is used, one of `GRAFTS`. The default, the plain gradient's length,
            is that of the published code.
        nesterov: look ahead by a step of the momentum.
        start_preconditioning_step: first step, counted from 1, that is preconditioned; earlier ones take the graft's
            update.
        statistics_compute_steps: steps between updates of the statistics.
        preconditioning_compute_steps: steps between computations of the roots.
        no_preconditioning_for_layers_with_dim_gt: parameters with a longer axis have no preconditioner.
        matrix_eps: initial value of the statistics' diagonal, and what is added under the root, as a share of their
            largest eigenvalue.
        diagonal_eps: added to the square roots of AdaGrad's and RMSProp's statistics.
        sharded_map: distributes the computation of the roots over processes.

    Raises:
        ValueError: an option is out of range.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        *,
        block_size: int = 128,
        graft_type: str = "sgd",
        nesterov: bool = True,
        start_preconditioning_step: int = 25,
        statistics_compute_steps: int = 1,
        preconditioning_compute_steps: int = 1,
        no_preconditioning_for_layers_with_dim_gt: int = 8192,
        matrix_eps: float = 1e-6,
        diagonal_eps: float = 1e-10,
        sharded_map: ShardedMap = map_locally,
    ) -> None:
        if graft_type not in GRAFTS:
            raise ValueError(f"graft_type {graft_type!r} is none of {', '.join(GRAFTS)}")
        if low := [n for n in (block_size, statistics_compute_steps, preconditioning_compute_steps) if n < 1]:
            raise ValueError(f"block_size and the steps between computations must be at least 1, got {low[0]}")
        if not (0 <= betas[0] < 1 and 0 <= betas[1] <= 1):
            raise ValueError(f"betas must lie in [0, 1) and [0, 1], got {betas}")
        self.block_size, self.graft_type, self.nesterov = block_size, graft_type, nesterov
        self.start, self.longest = start_preconditioning_step, no_preconditioning_for_layers_with_dim_gt
        self.statistics_every, self.roots_every = statistics_compute_steps, preconditioning_compute_steps
        self.matrix_eps, self.diagonal_eps, self.sharded_map = matrix_eps, diagonal_eps, sharded_map
        # By group, since groups may differ in their learning rate; built in the first step, when gradients are known.
        self.stacks: dict[int, BlockStacks] = {}
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Takes one step; each group counts its steps in `step`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, group in enumerate(self.param_groups):
            # A tensor on the CPU, so that reading it never waits for the device.
            group.setdefault("step", torch.zeros(()))
            group["step"] += 1
            if updated := [p for p in group["params"] if p.grad is not None]:
                self._update_(number, group, updated)
        return loss

    def _update_(self, number: int, group: dict[str, Any], updated: list[Tensor]) -> None:
        (beta1, beta2), step = group["betas"], int(group["step"])
        # Grafts and statistics are updated in every step, also before preconditioning starts, which then has good ones.
        grafts = [self._graft(p, beta2) for p in updated]
        preconditioned = self._precondition(number, updated, beta2, step)
        if preconditioned and self.graft_type != "none":
            lengths = [graft for p, graft in zip(updated, grafts, strict=True) if p in preconditioned]
            _rescale_(list(preconditioned.values()), lengths)
        updates = [preconditioned.get(p, graft) for p, graft in zip(updated, grafts, strict=True)]
        moments = self._momentum(updated, "momentum", updates, beta1)
        if step < self.start:
            # As in the published code the early steps have a momentum of their own, of the grafts alone.
            moments, updates = self._momentum(updated, "graft_momentum", grafts, beta1), grafts
        else:
            for p in updated:
                self.state[p].pop("graft_momentum", None)  # never read again, and as large as the parameter
        # As in the published code: β₁·m + update, with m already updated.
        if self.nesterov:
            moments = list(torch._foreach_add(torch._foreach_mul(moments, beta1), updates))
        torch._foreach_add_(updated, moments, alpha=-group["lr"])

    def _precondition(self, number: int, updated: list[Tensor], beta2: float, step: int) -> dict[Tensor, Tensor]:
        """Returns the preconditioned gradients of those parameters of a group that have preconditioners."""
        matrices = [
            p for p in updated if len(merge_axes(p.shape, self.block_size)) > 1 and max(p.shape) <= self.longest
        ]
        if not matrices:
            return {}
        stacks = self.stacks.get(number)
        # Rebuilt if other parameters have gradients than before; by identity, since == on tensors compares elements.
        if stacks is None or [*map(id, stacks.tensors)] != [*map(id, matrices)]:
            stacks = self.stacks[number] = BlockStacks(matrices, self.block_size, self.matrix_eps)
        # In every step: a loaded checkpoint has replaced the state's tensors.
        stacks.attach_state(self.state)
        blocks = stacks.split([p.grad for p in matrices if p.grad is not None])
        if step % self.statistics_every == 0:
            stacks.update_statistics_(blocks, beta2)
        if step % self.roots_every == 0:
            stacks.update_roots_(self.matrix_eps, self.sharded_map)
        return dict(zip(matrices, stacks.join(stacks.precondition(blocks)), strict=True))

    def _graft(self, p: Tensor, beta2: float) -> Tensor:
        """Returns the update of the optimizer that is grafted on, and updates its statistics."""
        gradient = p.grad
        assert gradient is not None
        if self.graft_type in ("none", "sgd"):
            return gradient
        if self.graft_type == "sqrtn":
            return gradient.sign()
        if self.graft_type.endswith("-normalized"):
            # The addend keeps a gradient of zeros, as of a part that is not used, from becoming NaN.
            gradient = gradient / (gradient.norm() + 1e-16)
        squares = self._slot(p, "squares")
        is_sum = self.graft_type.startswith("adagrad")
        squares.mul_(1 if is_sum else beta2).addcmul_(gradient, gradient, value=1 if is_sum else 1 - beta2)
        return gradient / (squares.sqrt() + self.diagonal_eps)

    def _momentum(self, updated: list[Tensor], slot: str, updates: list[Tensor], beta: float) -> list[Tensor]:
        """Returns the momentum stored in a slot, after these updates."""
        moments = [self._slot(p, slot) for p in updated]
        torch._foreach_mul_(moments, beta)
        torch._foreach_add_(moments, updates)
        return moments

    def _slot(self, p: Tensor, slot: str) -> Tensor:
        """Returns a tensor of a parameter's state, zeros at first."""
        if slot not in self.state[p]:
            # In the parameter's own memory layout, so that the foreach kernels can treat both as flat memory.
            self.state[p][slot] = torch.zeros_like(p)
        return self.state[p][slot]

    def __setstate__(self, state: dict[str, Any]) -> None:
        # The stacks belong to this object's tensors, not to those of the optimizer that was copied or unpickled.
        self.stacks = {}
        super().__setstate__(state)


def _rescale_(updates: list[Tensor], like: list[Tensor]) -> None:
    """Gives each update the norm of its counterpart."""
    # Of whole tensors, not blocks: grafting restores the parameter's step, not that of its parts.
    wanted, given = (torch.stack(list(torch._foreach_norm(each))) for each in (like, updates))
    torch._foreach_mul_(updates, list((wanted / (given + 1e-16)).unbind()))
