"""The table of evaluate."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from funmatch.config.choices import CORRUPTIONS
from funmatch.config.distill import Distill
from funmatch.config.finished.model import MODEL, WithImages
from funmatch.config.metadata import Changes, Group, Opt, Refers
from funmatch.config.options import like
from funmatch.config.teaching import Teaching
from funmatch.config.values import Names
from funmatch.errors import unknown


class Evaluate(Teaching, WithImages):
    """Evaluate a run or a model: accuracy, calibration, and agreement with a teacher."""

    verbs: ClassVar[str] = "Start"
    examples: ClassVar[tuple[str, ...]] = (
        "funmatch evaluate runs/student",
        "funmatch evaluate resnet18 --weights resnet18.safetensors --data ~/images --split test",
    )

    model: Annotated[str, MODEL]
    """Run folder, or any model that `distill --teacher` takes."""
    others: Annotated[Names, replace(MODEL, usual="none", metavar="MODEL …")] = ()
    """More models, each compared with the first on the same images."""
    split: Annotated[
        str, Opt(group=Group.DATA, changes=Changes.DATA, essential=True, metavar="auto|train|val|test")
    ] = "auto"
    """Split to evaluate on; auto is test, else val, else train."""
    teacher: Annotated[Names, like(Distill, "teacher", usual="the run's")] = ()
    """Teacher to compare with, or several, as `distill --teacher` takes them."""
    tta: Annotated[Literal["none", "flip"], Opt(group=Group.VIEWS, changes=Changes.STUDENT)] = "none"
    """Test-time augmentation: flip averages the logits of each image and its mirror image, also the teacher's."""
    corruptions: Annotated[
        Names,
        Opt(group=Group.VIEWS, changes=Changes.STUDENT, usual="none", metavar="NAME …", essential=True),
    ] = ()
    """Evaluate on corrupted images, too, at severities 1 to 5: all, or some of noise, blur, brightness, darkness,
    contrast, saturation, jpeg, solarize, posterize, elastic, pixelate."""
    corruption_images: Annotated[int, Opt(group=Group.VIEWS, changes=Changes.STUDENT, at_least=1)] = 2000
    """Images that are corrupted, at most; they are spread evenly over the split."""
    embedding: Annotated[bool, Opt(group=Group.STUDENT, changes=Changes.STUDENT)] = False
    """Measure the model's features, too: nearest neighbours and a linear probe, from the training images to the
    evaluated ones. Models without classes (num_classes=0) are measured by these alone."""
    seed: Annotated[int, Opt(group=Group.MACHINE, changes=Changes.ARITHMETIC, at_least=0, at_most=2**62)] = 0
    """Seed of the corruptions and of the bootstrap intervals."""

    per_image: Annotated[
        Path | None,
        Opt(group=Group.OUTPUT, changes=Changes.PLACE, refers=Refers.FILE, usual="none", essential=True,
            metavar="FILE"),
    ] = None  # fmt: skip
    """CSV file for a line per image: its name, label, predicted class, probability, and the teacher's."""
    report: Annotated[
        Path | None,
        Opt(group=Group.OUTPUT, changes=Changes.PLACE, refers=Refers.FILE, essential=True, metavar="FILE",
            usual="evaluation.html in the run's folder"),
    ] = None  # fmt: skip
    """HTML page with plots, the metrics of each class, and the images on which model and teacher differ most; none for
    no page. Models that are no runs, and several models, have a page only where this names one."""
    overwrite: Annotated[bool, Opt(group=Group.OUTPUT, changes=Changes.PLACE)] = False
    """Replace the files of --per-image and --report if they exist."""

    def problems(self) -> list[str]:
        found = []
        # Silently ignored otherwise, and the model's published weights looked for.
        if self.teacher_weights and not self.teacher:
            found = ["teacher_weights belong to --teacher; for the weights of the model itself, pass --weights"]
        found += [
            str(unknown("corruption", name, ("all", *CORRUPTIONS)))
            for name in self.corruptions
            if name not in ("all", *CORRUPTIONS)
        ]
        if len({self.model, *self.others}) <= len(self.others):
            found.append("a model is given twice; name each once")
        return found + super().problems()
