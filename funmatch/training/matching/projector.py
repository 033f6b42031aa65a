"""Projects a student's features linearly to the teachers' dimensions, while it is trained."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from funmatch.models.classifier import TRAINING_ONLY
from funmatch.models.inference.answers import Layout, read
from funmatch.ops.features.grids import to_grid


class Projector(nn.Module):
    """Maps the student's pooled features, and its tokens, to those of all teachers in line.

    It is held by the student's network (`TRAINING_ONLY`), so that optimizer, average and checkpoints have it, too; a
    finished student lacks it.
    """

    def __init__(self, layout: Layout, pooled: int, token: int, seed: int) -> None:
        """Draws the weights.

        Args:
            layout: of the teachers' answers.
            pooled: dimensions of the student's pooled features.
            token: those of its tokens.
            seed: the run's.
        """
        super().__init__()
        # Of its own generator: the student's first weights must be those of a run on logits.
        drawn = torch.Generator().manual_seed(seed)
        self.pooled = _linear(pooled, sum(layout.pooled), drawn)
        self.tokens = _linear(token, sum(layout.tokens), drawn) if layout.tokens else None


def _linear(inputs: int, outputs: int, drawn: torch.Generator) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, device="meta").to_empty(device="cpu")
    nn.init.trunc_normal_(layer.weight, std=inputs**-0.5, generator=drawn)
    nn.init.zeros_(layer.bias)
    return layer


@dataclass(frozen=True)
class StudentReadout:
    """Reads a student's answers as rows of the teachers' layout: its logits, and its features as projected.

    Attributes:
        layout: of the rows.
        head_last: whether the last layer alone makes the logits of the pooled features.
    """

    # It holds no module: copies of the student, such as the average of its weights, read by their own projector.
    layout: Layout
    head_last: bool

    def __call__(self, net: nn.Module, inputs: Tensor) -> Tensor:
        return self.project(net, *self.read(net, inputs))

    def read(self, net: nn.Module, inputs: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Computes logits, pooled features and map as of `answers.read`."""
        tokens, layout = bool(self.layout.tokens), self.layout
        return read(net, inputs, logits=layout.classes > 0, tokens=tokens, head_last=self.head_last)

    def project(self, net: nn.Module, logits: Tensor | None, pooled: Tensor, maps: Tensor | None) -> Tensor:
        """Returns the rows, (n, width), of what `read` gave."""
        projector: Any = net.get_submodule(TRAINING_ONLY)
        tokens = None if maps is None else projector.tokens(to_grid(maps, self.layout.grid).flatten(1, 2))
        return self.layout.join(pooled[:, :0] if logits is None else logits, projector.pooled(pooled), tokens)


class WithoutTokens(nn.Module):
    """A student in evaluation: [its own pooled features | logits | features as projected], (n, d + judged).

    Without tokens, which are many: these are compared on whole splits.
    """

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    def forward(self, views: Tensor) -> Tensor:
        student: Any = self.student
        readout: StudentReadout = student.readout
        logits, pooled, _ = read(
            student.net, student.normalize(views), logits=readout.layout.classes > 0, tokens=False,
            head_last=readout.head_last,
        )  # fmt: skip
        return torch.cat([pooled.float(), readout.project(student.net, logits, pooled, None)], 1)
