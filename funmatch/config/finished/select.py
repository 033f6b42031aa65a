"""The table of select."""

from pathlib import Path
from typing import Annotated, ClassVar

from funmatch.config.finished.model import FinishedModel
from funmatch.config.finished.predict import ImageReading
from funmatch.config.metadata import Changes, Group, Opt, Refers
from funmatch.config.options import like
from funmatch.config.values import Names

DATA, PLACE, TEACHER = Changes.DATA, Changes.PLACE, Changes.TEACHER
ENDINGS = (".csv", ".parquet")


class Select(ImageReading):
    """Choose images from an unlabelled pool: for each class those that a teacher is surest of, as a table of paths."""

    verbs: ClassVar[str] = "Data"
    headings: ClassVar[dict[Group, str]] = {Group.STUDENT: "Teacher"}
    examples: ClassVar[tuple[str, ...]] = (
        "funmatch select photos --teacher runs/teacher --per-class 500 --out chosen.csv",
        "funmatch select photos --teacher runs/teacher --per-class 500 --without ~/images --out chosen.csv",
    )

    pool: Annotated[
        Names,
        Opt(group=Group.DATA, changes=DATA, positional=True, essential=True, refers=Refers.IMAGES, metavar="POOL …"),
    ]
    """Images to choose from: folders, files, patterns in quotes, tables of paths (csv:FILE), names of the catalog, or -
    for a list of paths on standard input; with --extract also shards (tfrecord:, wds:, hf:)."""
    teacher: Annotated[
        str,
        Opt(group=Group.STUDENT, changes=TEACHER, essential=True, refers=Refers.MODEL, metavar="MODEL"),
    ]
    """Run folder, or any model that `distill --teacher` takes; it gives the classes and the confidence."""
    weights: Annotated[Path | None, like(FinishedModel, "weights", aliases=("--teacher-weights",))] = None
    """File with weights (.safetensors, .pt or BiT .npz), for a teacher given by its timm name."""
    per_class: Annotated[int, Opt(group=Group.DATA, changes=DATA, at_least=1, essential=True, metavar="N")] = 500
    """Most images of a class."""
    min_confidence: Annotated[
        float, Opt(group=Group.DATA, changes=DATA, at_least=0, at_most=1, essential=True, metavar="P")
    ] = 0.0
    """Least probability that the teacher must give to its class."""
    without: Annotated[
        Names,
        Opt(group=Group.DATA, changes=DATA, essential=True, refers=Refers.DATA, usual="none", metavar="DATA …"),
    ] = ()
    """Images to keep clear of, e.g. those that the student is evaluated on: near copies of them are left out. Of data
    sets with several splits, these are the validation and test images."""
    alike: Annotated[float, Opt(group=Group.DATA, changes=DATA, above=0.5, at_most=1)] = 0.95
    """How alike two images are if one counts as a near copy of the other: correlation of their grey thumbnails, which
    may be mirrored or cut by up to a tenth."""
    out: Annotated[Path, Opt(group=Group.OUTPUT, changes=PLACE, essential=True)]
    """Table of the chosen images, .csv or .parquet, with path, label and confidence: --data csv:FILE reads it."""
    extract: Annotated[Path | None, Opt(group=Group.OUTPUT, changes=PLACE, usual="none", metavar="FOLDER")] = None
    """Folder to write the chosen images into, as they are encoded, which the table then names; needed where they are no
    files of their own, as in shards."""
    overwrite: Annotated[bool, Opt(group=Group.OUTPUT, changes=PLACE)] = False
    """Replace the file --out if it exists."""

    def problems(self) -> list[str]:
        found = [] if self.pool else ["give the images to choose from: folders, patterns in quotes, or csv:FILE"]
        if self.pool.count("-") > 1:
            found.append("- stands for standard input, which can be read only once")
        # Before the images are looked at, which may take hours.
        if self.out.suffix.lower() not in ENDINGS:
            found.append(f"--out {self.out} ends in neither {' nor '.join(ENDINGS)}")
        return found + super().problems()
