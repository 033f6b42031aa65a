"""Makes the views that a run shows its teachers, beginning with those of its first batch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from funmatch.config.choices import STRATEGIES
from funmatch.models.inference.reference import VIEWS_NEAR_LIMIT, FurtherViews
from funmatch.training.setup import TrainSetup
from funmatch.training.teachers import fixed
from funmatch.training.teachers.source import views_by_side

SHORT_RUN = 25
"""Batches of views up to which teachers are judged by the first batch alone: judging longer would not pay off."""
SHARE = 0.01
"""Share of a run's views that may be computed, in plain fp32 and in each mode, to judge a teacher's modes."""


@dataclass(frozen=True)
class RunViews:
    """The views that a run shows its teachers.

    Attributes:
        batch_at: makes the views of a batch of a number from 0 on, by side, on the run's device; a pure function.
        batches: number of batches.
        size: views of a batch.
        total: views that each teacher sees in the run.
        key: everything that decides the views, as text; empty where that is not known.
    """

    batch_at: Callable[[int], dict[int, Tensor]]
    batches: int
    size: int
    total: int
    key: str = ""

    def further(self, side: int, size: int) -> FurtherViews | None:
        """Returns the views behind the first `size`, by as many at a time; None in a run that is too short."""
        if self.total <= SHORT_RUN * self.size:
            return None
        return FurtherViews(self._parts(side, size), int(SHARE * self.total), self.key)

    def _parts(self, side: int, size: int) -> Iterator[Tensor]:
        for number in range(self.batches):
            # Whole parts only: a compiled network is specialised to their size.
            parts = [part for part in self.batch_at(number)[side].split(size) if len(part) == size]
            yield from parts[1:] if number == 0 else parts


def run_views(setup: TrainSetup, sides: tuple[int, ...]) -> RunViews:
    """Returns the views that the teachers of a run see, at their sides: of its steps, or of its images once."""
    device, loader = setup.loop.device, setup.loader

    def of_step(step: int) -> dict[int, Tensor]:
        return views_by_side(loader.batch_at(step).to(device), loader.teacher_sides)[0]

    def of_images(number: int) -> dict[int, Tensor]:
        return {side: views.to(device) for side, views in fixed.some_views(setup, sides, number).items()}

    if not STRATEGIES[setup.config.strategy].fixed:
        total = setup.loop.steps * loader.size
        # Of long runs no more views are ever looked at, so that these are judged alike.
        key = repr((setup.cache.key, loader.spec, loader.world_size, min(total, int(VIEWS_NEAR_LIMIT / SHARE))))
        return RunViews(of_step, setup.loop.steps, loader.size, total, key)
    size, source = fixed.images_at_once(setup), fixed.fixed_views(setup)
    return RunViews(of_images, len(source.split) // size, size, len(source.split) * source.crops)
