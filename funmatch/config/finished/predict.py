"""The tables of predict and embed, and the options that they share with the functions of these names."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from funmatch.config.data import Images
from funmatch.config.distill import Distill
from funmatch.config.finished.model import MODEL, FinishedModel
from funmatch.config.metadata import Changes, Group, Opt, Refers
from funmatch.config.options import like
from funmatch.config.values import Names

DATA, PLACE, TEACHER = Changes.DATA, Changes.PLACE, Changes.TEACHER


class ImageReading(FinishedModel):
    """How the images that a model is used on are read."""

    split: Annotated[
        Literal["auto", "train", "val", "test", "all"] | None,
        Opt(group=Group.DATA, changes=DATA, usual="auto, and of a folder all images"),
    ] = None
    """Split of data sets that have several; auto is test, else val, else train."""
    cap: Annotated[int | None, like(Images, "cap", usual="the run's, or 512")] = None
    """Images whose shorter side is longer than this, in pixels, are scaled down to it first, as `evaluate` does."""
    decoder: Annotated[
        Literal["auto", "pillow", "torchcodec"] | None, like(Images, "decoder", usual="the run's, or auto")
    ] = None
    """JPEG decoder; auto is torchcodec where it is installed, else Pillow."""
    max_pixels: Annotated[int | None, like(Images, "max_pixels", usual="the run's, or 178,956,970")] = None
    """Larger images are rejected as decompression bombs. Those of more than 32,000,000 pixels are decoded one at a
    time."""
    max_scans: Annotated[int | None, like(Images, "max_scans", usual="the run's, or 100")] = None
    """JPEGs of more progressive scans are rejected: each scan takes the time of a whole image."""
    image_feature: Annotated[str | None, like(Images, "image_feature")] = None
    """In shards and tables: the feature, file ending or column that holds the image, or its path."""
    split_column: Annotated[str | None, like(Images, "split_column")] = None
    """In tables of paths: the column that says train, val or test; none for no splits."""
    image_root: Annotated[Path | None, like(Images, "image_root")] = None
    """In tables of paths: the folder that paths are relative to."""
    data_dir: Annotated[Path | None, like(Images, "data_dir")] = None
    """Folder that holds the catalog's data sets, and into which they are downloaded."""


class ImageOptions(ImageReading):
    """A model, and how the images that it is used on are read."""

    model: Annotated[str, MODEL]
    """Run folder, or any model that `distill --teacher` takes."""


class ImageFiles(ImageOptions):
    """The images that a command reads, and where its rows go."""

    paths: Annotated[
        Names,
        Opt(group=Group.DATA, changes=DATA, positional=True, essential=True, refers=Refers.IMAGES, metavar="PATH …"),
    ]
    """Images: files, folders, patterns in quotes ('photos/**/*.jpg'), data sets (a name of the catalog, tfrecord:…,
    wds:…, hf:…), addresses (gs://, s3://, hf://, https://), or - for a list of paths on standard input."""
    # Each command says where its rows go otherwise.
    out: Annotated[Path | None, Opt(group=Group.OUTPUT, changes=PLACE, essential=True, usual="none")] = None
    """File for the rows."""
    overwrite: Annotated[bool, Opt(group=Group.OUTPUT, changes=PLACE)] = False
    """Replace the file --out if it exists."""
    strict: Annotated[bool, Opt(group=Group.OUTPUT, changes=PLACE, essential=True)] = False
    """Exit with code 2 if an image cannot be read, after all rows are written."""

    def problems(self) -> list[str]:
        # An empty list is a value too: with a model alone on the command line, the paths are one.
        found = [] if self.paths else ["give the images: files, folders, patterns in quotes, or - for a list of paths"]
        if self.paths.count("-") > 1:
            found.append("- stands for standard input, which can be read only once")
        return found + super().problems()


class PredictionOptions(ImageOptions):
    """What is predicted of an image, and by which models."""

    topk: Annotated[int, Opt(group=Group.OUTPUT, changes=PLACE, at_least=1, essential=True)] = 5
    """Number of classes to list for each image, the most probable first."""
    threshold: Annotated[
        float, Opt(group=Group.OUTPUT, changes=PLACE, at_least=0, at_most=1, essential=True, metavar="P")
    ] = 0.0
    """List only classes of at least this probability; an image without one keeps its row, with an empty class."""
    teacher: Annotated[
        str | None,
        Opt(group=Group.TEACHER, changes=TEACHER, essential=True, refers=Refers.MODEL, usual="none", metavar="MODEL"),
    ] = None
    """A model whose class and probability stand beside, with agreement and KL divergence, in nats. It sees each image
    by its own preprocessing."""
    teacher_weights: Annotated[
        Path | None, Opt(group=Group.TEACHER, changes=TEACHER, refers=Refers.WEIGHTS, usual="none")
    ] = None
    """File with the teacher's weights, for a teacher given by its timm name."""
    teacher_side: Annotated[
        int | None,
        Opt(group=Group.TEACHER, changes=TEACHER, at_least=1, at_most=10**4, usual="the teacher's own"),
    ] = None
    """Image size of the teacher, in pixels."""
    classes: Annotated[str | None, like(Distill, "classes", usual="the same as the model's")] = None
    """For a teacher with other classes: same-names matches classes by name; by-number sorts classes that are numbers by
    value; a file map.json holds {"our class": "the teacher's", …}, by name, by number, or a list of these."""
    trust_class_order: Annotated[bool, like(Distill, "trust_class_order")] = False
    """Compare with a teacher whose class names differ, assuming the same order."""

    def problems(self) -> list[str]:
        found = []
        if self.teacher is None:
            given = [name for name in ("teacher_weights", "teacher_side", "classes") if getattr(self, name) is not None]
            found = [f"--{name.replace('_', '-')} belongs to --teacher, which is not given" for name in given]
        return found + super().problems()


class Predict(PredictionOptions, ImageFiles):
    """Predict the classes of images: a row for each, with class names and probabilities."""

    verbs: ClassVar[str] = "Use"
    examples: ClassVar[tuple[str, ...]] = (
        "funmatch predict runs/student photos --out predictions.csv",
        "funmatch predict runs/student 'photos/**/*.jpg' --teacher runs/teacher --topk 1",
        "funmatch predict runs/student - --format jsonl",
    )

    out: Annotated[Path | None, Opt(group=Group.OUTPUT, changes=PLACE, essential=True, usual="standard output")] = None
    """File for the rows."""
    format: Annotated[
        Literal["csv", "jsonl", "parquet"] | None,
        Opt(group=Group.OUTPUT, changes=PLACE, essential=True, usual="by the ending of --out, else csv"),
    ] = None
    """Format of the rows; parquet needs --out."""

    def problems(self) -> list[str]:
        found = []
        if self.format == "parquet" and self.out is None:
            found.append("--format parquet needs --out FILE: a parquet file cannot be written to standard output")
        # Both would stand in one stream.
        if self.as_json and self.out is None:
            found.append("--json prints a summary on standard output, where the rows go; pass --out FILE for these")
        return found + super().problems()


class Embed(ImageFiles):
    """Compute the features of images: what the model's last layer classifies, a row of numbers for each."""

    verbs: ClassVar[str] = "Use"
    examples: ClassVar[tuple[str, ...]] = (
        "funmatch embed runs/student photos --out features.npy",
        "funmatch embed runs/student 'photos/**/*.jpg' --out features.parquet",
    )

    out: Annotated[Path, Opt(group=Group.OUTPUT, changes=PLACE, essential=True)]
    """File for the features: .npy, with the paths in NAME.paths.csv beside it, or .parquet, which holds both."""

    def problems(self) -> list[str]:
        # Before the images are looked for, which may take minutes.
        suffix = self.out.suffix.lower()
        found = [] if suffix in (".npy", ".parquet") else [f"--out {self.out} ends in neither .npy nor .parquet"]
        return found + super().problems()
