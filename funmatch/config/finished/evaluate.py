"""The table of evaluate."""

from typing import Annotated, ClassVar

from funmatch.config.distill import Distill, Teaching
from funmatch.config.finished.model import MODEL, WithImages
from funmatch.config.metadata import Changes, Group, Opt
from funmatch.config.options import like
from funmatch.config.values import Names


class Evaluate(Teaching, WithImages):
    """Evaluate a run or a model: accuracy, calibration, and agreement with a teacher."""

    verbs: ClassVar[str] = "Start"
    examples: ClassVar[tuple[str, ...]] = (
        "funmatch evaluate runs/student",
        "funmatch evaluate resnet18 --weights resnet18.safetensors --data ~/images --split test",
    )

    model: Annotated[str, MODEL]
    """Run folder, or any model that `distill --teacher` takes."""
    split: Annotated[
        str, Opt(group=Group.DATA, changes=Changes.DATA, essential=True, metavar="auto|train|val|test")
    ] = "auto"
    """Split to evaluate on; auto is test, else val, else train."""
    teacher: Annotated[Names, like(Distill, "teacher", usual="the run's")] = ()
    """Teacher to compare with, or several, as `distill --teacher` takes them."""

    def problems(self) -> list[str]:
        found = []
        # Silently ignored otherwise, and the model's published weights looked for.
        if self.teacher_weights and not self.teacher:
            found = ["teacher_weights belong to --teacher; for the weights of the model itself, pass --weights"]
        return found + super().problems()
