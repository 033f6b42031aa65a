"""Stacks the equal blocks of many tensors, and the statistics and roots of their axes, for Shampoo's computations."""

from collections import Counter
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, ...]
ShardedMap = Callable[..., Tensor]
"""`sharded_map(work, *stacks)` returns `work(*stacks)`, where `work` treats the elements of the stacks independently,
so that several processes can each compute a part and exchange the results."""


def map_locally(work: Callable[..., Tensor], *stacks: Tensor) -> Tensor:
    """Returns `work(*stacks)`, computed in this process alone."""
    return work(*stacks)


def merge_axes(shape: Sequence[int], longest: int) -> Shape:
    """Merges neighbouring axes of a shape while their product is at most `longest`, and drops axes of length 1.

    So a kernel of (256, 64, 1, 1) is one matrix, and 3 × 3 positions do not become tiny preconditioners.
    """
    axes, length = [], 1
    for axis in shape:
        # Before multiplying: an axis that is too long by itself must not swallow the short one in front of it.
        if length * axis > longest:
            axes.append(length)
            length = 1
        length *= axis
    return tuple(axis for axis in (*axes, length) if axis > 1)


@dataclass(frozen=True)
class BlockGrid:
    """A part of a tensor that divides into equal blocks.

    Attributes:
        corner: index of its first element along each axis.
        counts: number of blocks along each axis.
        block: shape of one block.
    """

    corner: Shape
    counts: Shape
    block: Shape

    @property
    def total(self) -> int:
        """The number of blocks."""
        return prod(self.counts)

    def split(self, tensor: Tensor) -> Tensor:
        """Splits this part of a tensor into its blocks, [total, *block]."""
        rank = len(self.block)
        axes = [length for pair in zip(self.counts, self.block, strict=True) for length in pair]
        split = self._part(tensor).reshape(axes)
        # Axes now alternate (count, side, count, side, …); the counts move to the front.
        return split.permute(*range(0, 2 * rank, 2), *range(1, 2 * rank, 2)).reshape(-1, *self.block)

    def join_(self, tensor: Tensor, blocks: Tensor) -> None:
        """Writes blocks, [total, *block], back to this part of a tensor."""
        rank, part = len(self.block), self._part(tensor)
        axes = [axis for i in range(rank) for axis in (i, rank + i)]
        part.copy_(blocks.reshape(*self.counts, *self.block).permute(axes).reshape(part.shape))

    def _part(self, tensor: Tensor) -> Tensor:
        sides = zip(self.corner, self.counts, self.block, strict=True)
        return tensor[tuple(slice(begin, begin + count * length) for begin, count, length in sides)]


def block_grids(shape: Shape, size: int) -> list[BlockGrid]:
    """Divides a tensor into grids of blocks with sides of `size`, or of the remainder at the end of an axis."""
    spans = []
    for length in shape:
        whole, rest = divmod(length, size)
        spans.append([(0, whole, size)] * (whole > 0) + [(length - rest, 1, rest)] * (rest > 0))
    # The order must stay: a grid's number is part of the names in a checkpoint.
    return [BlockGrid(*map(tuple, zip(*each, strict=True))) for each in product(*spans)]


class BlockStacks:
    """The statistics of the blocks of several tensors, and their inverse roots, stacked by side.

    Each tensor's state holds views of them: `statistics.<grid>.<axis>` and `roots.<grid>.<axis>`, [blocks, side, side],
    names that are part of the checkpoint format.

    Args:
        tensors: the parameters, each with at least two axes when merged.
        size: longest side of a block.
        initial: initial value of the statistics' diagonal.

    Attributes:
        members: for each shape of a block its occurrences: (number of the tensor, number of the grid, grid).
        spans: for each shape and axis of a block the stack's side and the rows in it.
        statistics, roots: for each side, [matrices, side, side].
        powers: for each side the roots' exponents, [matrices].
    """

    def __init__(self, tensors: Sequence[Tensor], size: int, initial: float) -> None:
        self.tensors = list(tensors)
        self.shapes = [merge_axes(tensor.shape, size) for tensor in tensors]
        # Blocks of one shape become one tensor, whichever parameters they come from.
        self.members: dict[Shape, list[tuple[int, int, BlockGrid]]] = {}
        for number, shape in enumerate(self.shapes):
            for i, grid in enumerate(block_grids(shape, size)):
                self.members.setdefault(grid.block, []).append((number, i, grid))
        self.spans: dict[tuple[Shape, int], tuple[int, slice]] = {}
        slots, counts = [], Counter[int]()
        powers: dict[int, list[float]] = {}
        for block, members in self.members.items():
            for axis, side in enumerate(block):
                begin = counts[side]
                for number, i, grid in members:
                    slots.append((tensors[number], f"{i}.{axis}", side, slice(counts[side], counts[side] + grid.total)))
                    counts[side] += grid.total
                self.spans[block, axis] = side, slice(begin, counts[side])
                powers.setdefault(side, []).extend([-1 / (2 * len(block))] * (counts[side] - begin))
        # At least float32: eigenvalues of statistics in 16 bits would be noise.
        kind: dict[str, Any] = {
            "device": tensors[0].device,
            "dtype": torch.promote_types(tensors[0].dtype, torch.float32),
        }
        # Identities at first, so that a parameter is updated by its plain gradient until roots are computed.
        eyes = {side: torch.eye(side, **kind).expand(count, -1, -1) for side, count in counts.items()}
        self.roots = {side: eye.clone() for side, eye in eyes.items()}
        self.statistics = {side: eye * initial for side, eye in eyes.items()}
        self.powers = {side: torch.tensor(each, **kind) for side, each in powers.items()}
        # Views, so that the state needs no copy in either direction: a step changes the stacks, and they are the state.
        self.views = [
            (tensor, f"{name}.{slot}", stack[side][span])
            for tensor, slot, side, span in slots
            for name, stack in (("statistics", self.statistics), ("roots", self.roots))
        ]

    def attach_state(self, state: MutableMapping[Any, dict[str, Any]]) -> None:
        """Makes the tensors' state views of the stacks; values already there, such as loaded ones, are copied in."""
        for tensor, slot, view in self.views:
            # By identity: once attached, the state is the view, and copying it onto itself costs a pass in every step.
            current = state[tensor].get(slot)
            if current is not view:
                state[tensor][slot] = view if current is None else view.copy_(current)

    def split(self, tensors: Sequence[Tensor]) -> dict[Shape, Tensor]:
        """Splits tensors of the parameters' shapes into blocks, stacked by shape, [n, *shape]."""
        merged = [tensor.reshape(shape) for tensor, shape in zip(tensors, self.shapes, strict=True)]
        dtype = next(iter(self.roots.values())).dtype
        return {
            block: torch.cat([grid.split(merged[number]) for number, _, grid in members]).to(dtype)
            for block, members in self.members.items()
        }

    def join(self, blocks: dict[Shape, Tensor]) -> list[Tensor]:
        """Joins the blocks from `split` into tensors of the parameters' shapes and dtypes."""
        # Uninitialized memory will do, since the grids of a tensor cover it without gaps.
        joined = [
            torch.empty(shape, dtype=t.dtype, device=t.device)
            for t, shape in zip(self.tensors, self.shapes, strict=True)
        ]
        for block, members in self.members.items():
            parts = blocks[block].split([grid.total for _, _, grid in members])
            for (number, _, grid), part in zip(members, parts, strict=True):
                grid.join_(joined[number], part)
        return [tensor.view(like.shape) for tensor, like in zip(joined, self.tensors, strict=True)]

    def update_statistics_(self, blocks: dict[Shape, Tensor], decay: float) -> None:
        """Updates the statistics by G·Gᵀ of each unfolding of the gradients' blocks; a decay of 1 sums up."""
        for block, gradients in blocks.items():
            for axis in range(len(block)):
                side, span = self.spans[block, axis]
                old, unfolded = self.statistics[side][span], gradients.movedim(1 + axis, 1).flatten(2)
                new = torch.baddbmm(old, unfolded, unfolded.mT, beta=decay, alpha=1 - decay if decay < 1 else 1)
                # A gradient that overflowed is left out; its infinity would stay in the statistics forever.
                torch.where(_is_finite(new), new, old, out=old)

    def update_roots_(self, ridge: float, sharded_map: ShardedMap) -> None:
        """Computes the roots of all statistics; arguments as of `inverse_roots`."""
        compute = partial(inverse_roots, ridge=ridge)
        for side, statistics in self.statistics.items():
            # In place, since the parameters' state holds views of this very tensor.
            self.roots[side].copy_(sharded_map(compute, statistics, self.roots[side], self.powers[side]))

    def precondition(self, blocks: dict[Shape, Tensor]) -> dict[Shape, Tensor]:
        """Multiplies blocks along each axis by that axis's root."""
        result = {}
        # One axis after another: roots along different axes commute.
        for block, values in blocks.items():
            for axis in range(len(block)):
                side, span = self.spans[block, axis]
                moved = values.movedim(1 + axis, 1)
                values = torch.bmm(self.roots[side][span], moved.flatten(2)).view(moved.shape).movedim(1, 1 + axis)
            result[block] = values
        return result


def inverse_roots(statistics: Tensor, last: Tensor, powers: Tensor, ridge: float) -> Tensor:
    """Computes (L + ridge·λ·I)^power of each positive semidefinite matrix L with the largest eigenvalue λ.

    Args:
        statistics: [n, side, side], the matrices L.
        last: [n, side, side], the previous roots, kept where L or its root is not finite.
        powers: [n], negative.
        ridge: added to the eigenvalues, as a share of the largest.

    Returns:
        [n, side, side].
    """
    eye = torch.eye(statistics.shape[-1], dtype=statistics.dtype, device=statistics.device)
    is_finite = _is_finite(statistics)
    # Replaced beforehand: a single matrix with NaN makes `eigh` fail for the whole stack.
    values, vectors = _eigh(torch.where(is_finite, statistics, eye))
    # Rounding makes the smallest eigenvalues negative; of an L of zeros all are 0, and so is the ridge.
    values = values.clamp_min(0)
    values = (values + ridge * values[:, -1:]).clamp_min(torch.finfo(values.dtype).tiny)
    roots = (vectors * values.pow(powers[:, None])[:, None]) @ vectors.mT
    return torch.where(is_finite & _is_finite(roots), roots, last)


def _eigh(stack: Tensor) -> tuple[Tensor, Tensor]:
    """Computes eigenvalues and eigenvectors, NaN for those matrices on which the library gives up."""
    try:
        return torch.linalg.eigh(stack)
    except torch.linalg.LinAlgError:
        # The error does not say which matrix failed, so the stack is halved until it is alone.
        if len(stack) == 1:
            return torch.full_like(stack[:, 0], torch.nan), torch.full_like(stack, torch.nan)
        halves = [_eigh(half) for half in stack.tensor_split(2)]
        return torch.cat([values for values, _ in halves]), torch.cat([vectors for _, vectors in halves])


def _is_finite(stack: Tensor) -> Tensor:
    """Returns for each matrix whether all of its numbers and their sum are finite, [n, 1, 1] bool."""
    # By the sum, which NaN and infinity reach: one reduction instead of a mask of the stack's size and its reduction.
    return stack.sum((-2, -1), keepdim=True).isfinite()
