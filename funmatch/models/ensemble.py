"""Several teachers that speak as one, each with its own images, normalisation and classes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from funmatch.models.class_map import ClassMap, select_classes
from funmatch.models.inference.frozen import Frozen
from funmatch.runtime.chunks import even_chunks


@dataclass(frozen=True)
class EnsembleMember:
    """One of the teachers.

    Attributes:
        frozen: itself.
        side: of the views that it sees, pixels.
        share: its weight; all of them together are 1.
        picks: which of its classes are asked, None for all in their order.
    """

    frozen: Frozen
    side: int
    weight: float = 1.0
    class_map: ClassMap | None = None

    @property
    def name(self) -> str:
        return self.frozen.classifier.card.name

    def logits(self, views: Tensor) -> Tensor:
        """Logits (n, classes that are asked) of views (n, 3, side, side)."""
        return select_classes(self.frozen(views), self.class_map)


def mean_logits(answers: Sequence[Tensor], shares: Sequence[float], temperature: float) -> Tensor:  # noqa: ARG001
    """The weighted mean of logits (paper, section 4.2: an ensemble's logits are averaged)."""
    return torch.stack([share * logits for logits, share in zip(answers, shares, strict=True)]).sum(0)


def mean_probabilities(answers: Sequence[Tensor], shares: Sequence[float], temperature: float) -> Tensor:
    """Logits whose softmax at the temperature is the weighted mean of the teachers' probabilities.

    KL from them has the gradient of the weighted mean of the KLs from each teacher, since Σ wᵢ KL(pᵢ ‖ s) and
    KL(Σ wᵢ pᵢ ‖ s) differ by what does not depend on s. (The authors' code adds the KLs up: n times this.)
    """
    logs = [
        (logits / temperature).log_softmax(-1) + torch.tensor(share).log()
        for logits, share in zip(answers, shares, strict=True)
    ]
    return torch.stack(logs).logsumexp(0) * temperature


COMBINE = {"mean-logits": mean_logits, "mean-probabilities": mean_probabilities}


class TeacherEnsemble(nn.Module):
    """What a student matches: one frozen teacher, or several combined."""

    def __init__(
        self, members: Sequence[EnsembleMember], combine: str = "mean-logits", at_once: int | None = None
    ) -> None:
        """`at_once` is how many images are asked about at a time, None for all that are shown."""
        super().__init__()
        self.members = tuple(members)
        self.frozen = nn.ModuleList(member.frozen for member in members)
        self.combine = combine
        self.chunk = at_once

    @property
    def name(self) -> str:
        return " + ".join(member.name for member in self.members)

    def forward(self, views: Mapping[int, Tensor], temperature: float = 1.0) -> Tensor:
        """Logits (n, classes) for views by their side, each (n, 3, side, side) of the same images."""
        return self.combine_logits(
            [self.forward_chunked(member, views[member.side]) for member in self.members], temperature
        )

    def forward_chunked(self, member: EnsembleMember, views: Tensor) -> Tensor:
        """What one of them says, (n, classes), of views (n, 3, side, side): in even pieces, if they are many."""
        ends = even_chunks(len(views), self.chunk)
        return torch.cat([member.logits(views[start:stop]) for start, stop in pairwise(ends)])

    def combine_logits(self, answers: Sequence[Tensor], temperature: float = 1.0) -> Tensor:
        """What the teachers say together, when each says (n, classes)."""
        if len(answers) == 1:
            return answers[0]
        return COMBINE[self.combine](answers, [member.weight for member in self.members], temperature)

    def count_parameters(self) -> int:
        """Parameters of all."""
        return sum(member.frozen.size for member in self.members)
