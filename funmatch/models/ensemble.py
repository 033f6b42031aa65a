"""Combines the answers of several frozen teachers, each with its own image size, normalization and classes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor, nn

from funmatch.models.class_map import ClassMap
from funmatch.models.inference.answers import Layout, Readout
from funmatch.models.inference.frozen import Frozen
from funmatch.ops.tasks.task import MULTICLASS, Task, task_of
from funmatch.runtime.chunks import even_chunks


@dataclass(frozen=True)
class EnsembleMember:
    """One teacher of an ensemble.

    Attributes:
        frozen: the network, in its inference mode.
        side: image size of its views, pixels.
        weight: its weight; those of all members sum to 1.
        class_map: its classes for each of the student's, or None if they are the same in the same order.
    """

    frozen: Frozen
    side: int
    weight: float = 1.0
    class_map: ClassMap | None = None

    @property
    def name(self) -> str:
        return self.frozen.classifier.card.name

    def answers(self, views: Tensor) -> Tensor:
        """Computes the logits of the student's classes, (n, classes), of views (n, 3, side, side); or rows with them.

        Where the classifier has a readout: [logits | pooled features | tokens], (n, width).
        """
        rows, readout = self.frozen(views), self.frozen.classifier.readout
        if readout is None:
            return select_classes(rows, self.class_map, self.task)
        assert isinstance(readout, Readout)
        if not readout.classes or self.class_map is None:
            return rows
        logits = select_classes(rows[:, : readout.classes], self.class_map, self.task)
        return torch.cat([logits, rows[:, readout.classes :]], 1)

    @property
    def task(self) -> Task:
        """What its logits mean."""
        return task_of(self.frozen.classifier.card.task)


def select_classes(logits: Tensor, class_map: ClassMap | None, task: Task = MULTICLASS) -> Tensor:
    """Selects the logits of the data's classes; the softmax shares out what the teacher gives to others.

    Args:
        logits: (n, teacher's classes).
        class_map: the classes to select, or None for all. Where a class stands for several, they are joined as the
            task says: of one class an image, their probabilities are added.
        task: what the logits mean.

    Returns:
        (n, data's classes).
    """
    if class_map is None:
        return logits
    index = _index_of(class_map, logits.device)
    sizes = [len(indices) for indices in class_map]
    # Indexing copies numbers as they are; logsumexp of a single one would round it.
    if set(sizes) == {1}:
        return logits[:, index]
    return torch.stack([task.join_classes(logits[:, each]) for each in index.split(sizes)], 1)


@lru_cache(maxsize=32)
def _index_of(class_map: ClassMap, device: torch.device) -> Tensor:
    """Returns the classes that a map selects, one after another, on a device."""
    # Kept there: an index that is a list is copied to the device anew, and each step would wait for it.
    return torch.tensor([index for indices in class_map for index in indices], device=device)


def mean_logits(logits: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Computes the weighted mean of the teachers' logits (paper, section 4.2).

    Args:
        logits: one tensor (n, classes) a teacher.
        weights: one a teacher, summing to 1.
    """
    return torch.stack([weight * each for each, weight in zip(logits, weights, strict=True)]).sum(0)


class TeacherEnsemble(nn.Module):
    """The teacher of a student: one frozen classifier, or several combined.

    Args:
        members: the teachers.
        combine: `mean-logits` or `mean-probabilities`.
        chunk: most images in a forward pass, or None for no limit.
        layout: of the rows of answers; None where these are logits alone.
    """

    def __init__(
        self,
        members: Sequence[EnsembleMember],
        combine: str = "mean-logits",
        chunk: int | None = None,
        layout: Layout | None = None,
    ) -> None:
        super().__init__()
        self.members = tuple(members)
        # Registered too, so that `.to(device)` reaches the networks; a tuple of dataclasses is invisible to torch.
        self.frozen = nn.ModuleList(member.frozen for member in members)
        self.combine = combine
        self.chunk = chunk
        self.layout = layout

    @property
    def name(self) -> str:
        return " + ".join(member.name for member in self.members)

    @property
    def task(self) -> Task:
        """What its logits mean, which is the same of all members."""
        return self.members[0].task

    def forward(self, views: Mapping[int, Tensor], temperature: float = 1.0) -> Tensor:
        """Computes the combined answers.

        Args:
            views: for each image size the views (n, 3, side, side) of the same images.
            temperature: at which probabilities are averaged.

        Returns:
            (n, classes), or (n, width) of the layout.
        """
        return self.combine_answers(
            [self.forward_chunked(member, views[member.side]) for member in self.members], temperature
        )

    def forward_chunked(self, member: EnsembleMember, views: Tensor) -> Tensor:
        """Computes one member's answers, (n, width), of views (n, 3, side, side), in even chunks of `chunk` images."""
        bounds = even_chunks(len(views), self.chunk)
        return torch.cat([member.answers(views[start:stop]) for start, stop in pairwise(bounds)])

    def combine_answers(self, answers: Sequence[Tensor], temperature: float = 1.0) -> Tensor:
        """Combines the members' answers, (n, width) each and in their order: logits become one, features stand in line.

        Args:
            answers: logits; or rows of each member's own, with tokens or without.
            temperature: at which probabilities are averaged.
        """
        # A single teacher's answers are returned as they are: combining would round them.
        if len(answers) == 1:
            return answers[0]
        if self.layout is None:
            return self._combine_logits(answers, temperature)
        classes = self.layout.classes
        own = [each[:, :classes] for each in answers]
        logits = [self._combine_logits(own, temperature)] if classes else []
        ends = [classes + dimensions for dimensions in self.layout.pooled]
        pooled = [each[:, classes:end] for each, end in zip(answers, ends, strict=True)]
        tokens = [each[:, end:] for each, end in zip(answers, ends, strict=True)]
        return torch.cat([*logits, *pooled, *tokens], 1)

    def _combine_logits(self, logits: Sequence[Tensor], temperature: float) -> Tensor:
        weights = [member.weight for member in self.members]
        if self.combine == "mean-logits":
            return mean_logits(logits, weights)
        return self.task.mean_probabilities(logits, weights, temperature)

    def count_parameters(self) -> int:
        """Returns the number of parameters of all members."""
        # `size` was counted at first: folding removes parameters.
        return sum(member.frozen.size for member in self.members)
