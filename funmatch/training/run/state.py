"""Where a run stands, and what it is held against."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class TrainState:
    """Where a run stands besides its tensors: what `state.json` of a checkpoint holds."""

    step: int = 0
    seconds: float = 0.0
    best_step: int | None = None
    best_score: float = -1.0
    since_best: int = 0
    window: list[float] = field(default_factory=list)
    scaler: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TeacherLogits:
    """What the teachers say of the watched split's images, (n, classes): together, and each."""

    combined: Tensor
    members: list[Tensor]
