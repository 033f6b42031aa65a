"""Holds where a run stands besides its tensors, and what its student is compared with."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class TrainState:
    """Where a run stands besides its tensors: what `state.json` of a checkpoint holds.

    Attributes:
        window: the losses of the steps since the last record.
        window_parts: the parts of these losses, by name.
    """

    step: int = 0
    seconds: float = 0.0
    best_step: int | None = None
    best_score: float = -1.0
    since_best: int = 0
    window: list[float] = field(default_factory=list)
    window_parts: dict[str, list[float]] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TeacherLogits:
    """The teachers' logits of the validation split, (n, classes): combined, and of each member."""

    combined: Tensor
    members: list[Tensor]
