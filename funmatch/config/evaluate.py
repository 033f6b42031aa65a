"""The table of evaluate."""

from pathlib import Path
from typing import Annotated, ClassVar

from funmatch.config.choices import Resample
from funmatch.config.data import Images
from funmatch.config.distill import Distill, Teaching
from funmatch.config.metadata import Changes, Group, Opt, Refers
from funmatch.config.options import Machine, like
from funmatch.config.train import Train
from funmatch.config.values import Names, Pairs


# No `Views`: evaluation has no random crops, so it takes only the two sizes of the views, below.
class Evaluate(Images, Teaching, Machine):
    """Evaluate a run or a model: accuracy, calibration, and agreement with a teacher."""

    verbs: ClassVar[str] = "Start"
    headings: ClassVar[dict[Group, str]] = {Group.STUDENT: "Model"}
    examples: ClassVar[tuple[str, ...]] = (
        "funmatch evaluate runs/student",
        "funmatch evaluate resnet18 --weights resnet18.safetensors --data ~/images --split test",
    )

    model: Annotated[
        str,
        Opt(group=Group.STUDENT, changes=Changes.STUDENT, positional=True, essential=True, refers=Refers.MODEL,
            content="student", metavar="MODEL"),
    ]  # fmt: skip
    """Run folder, or any model that `distill --teacher` takes."""
    weights: Annotated[
        Path | None,
        Opt(group=Group.STUDENT, changes=Changes.STUDENT, refers=Refers.WEIGHTS, content="student", usual="none",
            essential=True),
    ] = None  # fmt: skip
    """File with weights (.safetensors, .pt or BiT .npz), for a model given by its timm name."""
    model_kwargs: Annotated[
        Pairs, Opt(group=Group.STUDENT, changes=Changes.STUDENT, usual="none", metavar="KEY=VALUE …")
    ] = ()
    """Arguments for timm's constructor."""
    # Optional, as are teacher and sizes: a run knows its own, and only a named model needs them.
    data: Annotated[Names, like(Train, "data", usual="the run's")] = ()
    """Images: a name of the catalog, a folder, or a source with its prefix, e.g. tfrecord:PATTERN, wds:PATTERN,
    hf:NAME. Several are joined."""
    split: Annotated[
        str, Opt(group=Group.DATA, changes=Changes.DATA, essential=True, metavar="auto|train|val|test")
    ] = "auto"
    """Split to evaluate on; auto is test, else val, else train."""
    teacher: Annotated[Names, like(Distill, "teacher", usual="the run's")] = ()
    """Teacher to compare with, or several, as `distill --teacher` takes them."""
    side: Annotated[int | None, like(Train, "side", usual="the run's or the model's own")] = None
    """Image size: side of the square views, in pixels."""
    eval_resize: Annotated[int | None, like(Train, "eval_resize", usual="the run's or the model's own")] = None
    """Length of the image's shorter side before the central crop, in pixels."""
    eval_resample: Annotated[Resample | None, like(Train, "eval_resample", usual="the run's or the model's own")] = None
    """How images are resized: antialias, bicubic, or tf (bilinear without antialias)."""
    batch: Annotated[int, like(Train, "batch")] = 128
    """Images per forward pass."""

    def problems(self) -> list[str]:
        found = []
        # Silently ignored otherwise, and the model's published weights looked for.
        if self.teacher_weights and not self.teacher:
            found = ["teacher_weights belong to --teacher; for the weights of the model itself, pass --weights"]
        return found + super().problems()
