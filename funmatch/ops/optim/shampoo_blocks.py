"""Equal blocks of many tensors as one tensor, with a matrix for each of their axes: what Shampoo computes with."""

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
"""`share(work, *stacks)` gives what `work(*stacks)` gives, a stack of matrices of stacks of them, one of each. Several
processes may each do a part of it and tell each other."""


def map_locally(work: Callable[..., Tensor], *stacks: Tensor) -> Tensor:
    """All of the work, here."""
    return work(*stacks)


def merge_axes(shape: Sequence[int], longest: int) -> Shape:
    """A shape whose neighbouring axes are one where that is no longer than `longest`, and which has no axis of 1."""
    axes, length = [], 1
    for axis in shape:
        if length * axis > longest:
            axes.append(length)
            length = 1
        length *= axis
    return tuple(axis for axis in (*axes, length) if axis > 1)


@dataclass(frozen=True)
class BlockGrid:
    """A part of a tensor that falls into equal blocks.

    Attributes:
        corner: where it begins, along each axis.
        counts: of blocks along each axis.
        block: shape of one.
    """

    corner: Shape
    counts: Shape
    block: Shape

    @property
    def total(self) -> int:
        """The number of blocks."""
        return prod(self.counts)

    def split(self, tensor: Tensor) -> Tensor:
        """Its blocks, [total, *block]."""
        rank = len(self.block)
        axes = [length for pair in zip(self.counts, self.block, strict=True) for length in pair]
        split = self._part(tensor).reshape(axes)
        return split.permute(*range(0, 2 * rank, 2), *range(1, 2 * rank, 2)).reshape(-1, *self.block)

    def join_(self, tensor: Tensor, blocks: Tensor) -> None:
        """Puts blocks back where they were cut from."""
        rank, part = len(self.block), self._part(tensor)
        axes = [axis for i in range(rank) for axis in (i, rank + i)]
        part.copy_(blocks.reshape(*self.counts, *self.block).permute(axes).reshape(part.shape))

    def _part(self, tensor: Tensor) -> Tensor:
        sides = zip(self.corner, self.counts, self.block, strict=True)
        return tensor[tuple(slice(begin, begin + count * length) for begin, count, length in sides)]


def block_grids(shape: Shape, size: int) -> list[BlockGrid]:
    """A tensor as grids of blocks with sides of `size`, but for the rests at its ends."""
    spans = []
    for length in shape:
        whole, rest = divmod(length, size)
        spans.append([(0, whole, size)] * (whole > 0) + [(length - rest, 1, rest)] * (rest > 0))
    return [BlockGrid(*map(tuple, zip(*each, strict=True))) for each in product(*spans)]


class BlockStacks:
    """The statistics of the blocks of several tensors and their inverse roots, stacked by side.

    The state of a tensor has views of them: `statistics.<grid>.<axis>` and `roots.<grid>.<axis>`, [blocks, side, side].

    Args:
        tensors: which are cut, each of two axes at least when merged.
        size: longest side of a block.
        beginning: of the statistics, times the identity.
    """

    def __init__(self, tensors: Sequence[Tensor], size: int, beginning: float) -> None:
        self.tensors = list(tensors)
        self.shapes = [merge_axes(tensor.shape, size) for tensor in tensors]
        self.places: dict[Shape, list[tuple[int, int, BlockGrid]]] = {}
        for number, shape in enumerate(self.shapes):
            for i, grid in enumerate(block_grids(shape, size)):
                self.places.setdefault(grid.block, []).append((number, i, grid))
        self.spans: dict[tuple[Shape, int], tuple[int, slice]] = {}
        slots, counts = [], Counter[int]()
        powers: dict[int, list[float]] = {}
        for block, places in self.places.items():
            for axis, side in enumerate(block):
                begin = counts[side]
                for number, i, grid in places:
                    slots.append((tensors[number], f"{i}.{axis}", side, slice(counts[side], counts[side] + grid.total)))
                    counts[side] += grid.total
                self.spans[block, axis] = side, slice(begin, counts[side])
                powers.setdefault(side, []).extend([-1 / (2 * len(block))] * (counts[side] - begin))
        kind: dict[str, Any] = {
            "device": tensors[0].device,
            "dtype": torch.promote_types(tensors[0].dtype, torch.float32),
        }
        eyes = {side: torch.eye(side, **kind).expand(count, -1, -1) for side, count in counts.items()}
        self.roots = {side: eye.clone() for side, eye in eyes.items()}
        self.statistics = {side: eye * beginning for side, eye in eyes.items()}
        self.powers = {side: torch.tensor(each, **kind) for side, each in powers.items()}
        self.views = [
            (tensor, f"{name}.{slot}", stack[side][span])
            for tensor, slot, side, span in slots
            for name, stack in (("statistics", self.statistics), ("roots", self.roots))
        ]

    def attach_state(self, state: MutableMapping[Any, dict[str, Any]]) -> None:
        """Makes the tensors' state views of the stacks, which take over what else stood there."""
        for tensor, slot, view in self.views:
            held = state[tensor].get(slot)
            if held is not view:
                state[tensor][slot] = view if held is None else view.copy_(held)

    def split(self, tensors: Sequence[Tensor]) -> dict[Shape, Tensor]:
        """The blocks of tensors like those that this was made for, by their shape, [n, *shape]."""
        shaped = [tensor.reshape(shape) for tensor, shape in zip(tensors, self.shapes, strict=True)]
        dtype = next(iter(self.roots.values())).dtype
        return {
            block: torch.cat([grid.split(shaped[number]) for number, _, grid in places]).to(dtype)
            for block, places in self.places.items()
        }

    def join(self, blocks: dict[Shape, Tensor]) -> list[Tensor]:
        """The tensors that have these blocks."""
        made = [
            torch.empty(shape, dtype=t.dtype, device=t.device)
            for t, shape in zip(self.tensors, self.shapes, strict=True)
        ]
        for block, places in self.places.items():
            parts = blocks[block].split([grid.total for _, _, grid in places])
            for (number, _, grid), part in zip(places, parts, strict=True):
                grid.join_(made[number], part)
        return [tensor.view(like.shape) for tensor, like in zip(made, self.tensors, strict=True)]

    def update_statistics_(self, blocks: dict[Shape, Tensor], decay: float) -> None:
        """Takes G·Gᵀ of each unfolding into the statistics, but where it overflows; a decay of 1 sums up."""
        for block, gradients in blocks.items():
            for axis in range(len(block)):
                side, span = self.spans[block, axis]
                old, unfolded = self.statistics[side][span], gradients.movedim(1 + axis, 1).flatten(2)
                new = torch.baddbmm(old, unfolded, unfolded.mT, beta=decay, alpha=1 - decay if decay < 1 else 1)
                torch.where(_finite(new), new, old, out=old)

    def update_roots_(self, ridge: float, share: ShardedMap) -> None:
        """Computes the roots of all statistics."""
        for side, statistics in self.statistics.items():
            self.roots[side].copy_(
                share(partial(inverse_roots, ridge=ridge), statistics, self.roots[side], self.powers[side])
            )

    def precondition(self, blocks: dict[Shape, Tensor]) -> dict[Shape, Tensor]:
        """The blocks multiplied along each axis by its root."""
        made = {}
        for block, white in blocks.items():
            for axis in range(len(block)):
                side, span = self.spans[block, axis]
                turned = white.movedim(1 + axis, 1)
                white = torch.bmm(self.roots[side][span], turned.flatten(2)).view(turned.shape).movedim(1, 1 + axis)
            made[block] = white
        return made


def inverse_roots(statistics: Tensor, last: Tensor, powers: Tensor, ridge: float) -> Tensor:
    """(L + ridge·λ·I)^power of each positive semidefinite matrix L with the largest eigenvalue λ.

    Args:
        statistics: [n, side, side].
        last: the roots of before, which stay where L is not finite or has no eigenvalues that are.
        powers: [n], negative.
        ridge: the least eigenvalue, as a share of the largest.
    """
    eye = torch.eye(statistics.shape[-1], dtype=statistics.dtype, device=statistics.device)
    known = _finite(statistics)
    values, vectors = _eigh(torch.where(known, statistics, eye))
    values = values.clamp_min(0)
    values = (values + ridge * values[:, -1:]).clamp_min(torch.finfo(values.dtype).tiny)
    roots = (vectors * values.pow(powers[:, None])[:, None]) @ vectors.mT
    return torch.where(known & _finite(roots), roots, last)


def _eigh(stack: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors, NaN for those matrices on which the library gives up."""
    try:
        return torch.linalg.eigh(stack)
    except torch.linalg.LinAlgError:
        if len(stack) == 1:
            return torch.full_like(stack[:, 0], torch.nan), torch.full_like(stack, torch.nan)
        halves = [_eigh(half) for half in stack.tensor_split(2)]
        return torch.cat([values for values, _ in halves]), torch.cat([vectors for _, vectors in halves])


def _finite(stack: Tensor) -> Tensor:
    """[n, 1, 1]: whether all numbers of a matrix are finite, and so is their sum, which is looked at: it is quicker."""
    return stack.sum((-2, -1), keepdim=True).isfinite()
