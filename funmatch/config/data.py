"""Options for the images, and the tables of the commands that only read images: prepare and data."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from funmatch.config.choices import Fit, ShardResample, TaskName
from funmatch.config.metadata import Changes, Group, OnResume, Opt, Refers
from funmatch.config.options import Options
from funmatch.config.values import Names, Place, Share

DATA, PLACE = Changes.DATA, Changes.PLACE
VALIDATION_SHARE = "10%"
"""Share of the training images that runs hold out for validation where the data has no such split."""
NO_VALIDATION = "none"
"""Value of --val by which a run trains on all training images."""


class Images(Options):
    """How images are read and stored."""

    # Text, since 10% and 10, a number of images, are both valid.
    val: Annotated[
        Share, Opt(group=Group.DATA, changes=DATA, usual="the data's own split", essential=True, metavar="SHARE")
    ] = None
    """Hold out this much of the training images for validation: 10%, a number of images, or none. The choice depends
    only on the images' content and on --val-seed."""
    val_seed: Annotated[int, Opt(group=Group.DATA, changes=DATA, at_least=0, at_most=2**62)] = 0
    """Seed of the validation split."""
    # It decides the loss and the metrics too, but all of these follow from what labels mean.
    task: Annotated[TaskName | None, Opt(group=Group.DATA, changes=DATA)] = "multiclass"
    """What labels mean. multiclass: one class an image. multilabel: any number of them, each with a probability of its
    own; images of the same content in several class folders have all these classes."""
    unlabelled: Annotated[bool, Opt(group=Group.DATA, changes=DATA)] = False
    """Ignore labels, whatever the folders are called."""
    image_feature: Annotated[
        str | None,
        Opt(group=Group.DATA, changes=DATA, usual="one of the usual names", metavar="NAME", aliases=("--path-column",)),
    ] = None
    """In shards and tables: the feature, file ending or column that holds the image, or its path."""
    label_feature: Annotated[
        str | None,
        Opt(
            group=Group.DATA, changes=DATA, usual="one of the usual names", metavar="NAME", aliases=("--label-column",)
        ),
    ] = None
    """In shards and tables: the feature, file ending or column that holds the class; none for no labels. In tables of
    paths also several columns of 0 and 1, one for each class: "cat;dog"."""
    split_column: Annotated[
        str | None, Opt(group=Group.DATA, changes=DATA, usual="one of the usual names", metavar="NAME")
    ] = None
    """In tables of paths: the column that says train, val or test; none for no splits."""
    # A run compares its images by their content.
    image_root: Annotated[
        Path | None,
        Opt(
            group=Group.DATA,
            changes=DATA,
            refers=Refers.FILE,
            resume=OnResume.UNCOMPARED,
            usual="that of the table",
            metavar="FOLDER",
        ),
    ] = None
    """In tables of paths: the folder that paths are relative to."""
    label_separator: Annotated[str, Opt(group=Group.DATA, changes=DATA, metavar="TEXT")] = ";"
    """In tables of paths: what separates several labels in one cell."""
    first_label: Annotated[int, Opt(group=Group.DATA, changes=DATA)] = 0
    """In shards and tables: the number of the first class, where classes are numbers."""
    # A run compares its images by their content, so what leads to the same images may differ when it resumes.
    class_file: Annotated[
        Place,
        Opt(group=Group.DATA, changes=DATA, refers=Refers.FILE, resume=OnResume.UNCOMPARED, usual="names in the data"),
    ] = None
    """In shards and tables: a text file with one class name per line, or its address (https://, gs://, s3://, hf://)."""
    follow_links: Annotated[bool, Opt(group=Group.DATA, changes=DATA, resume=OnResume.UNCOMPARED)] = False
    """Follow symbolic links that lead out of a folder."""
    # PLACE: the same data set in another folder is the same data.
    data_dir: Annotated[
        Path | None,
        Opt(
            group=Group.DATA, changes=PLACE, refers=Refers.FILE, usual="$FUNMATCH_DATA, or a folder in the user's cache"
        ),
    ] = None
    """Folder that holds the catalog's data sets, and into which they are downloaded."""
    cap: Annotated[int, Opt(group=Group.DATA, changes=DATA, at_least=1)] = 512
    """Images whose shorter side is longer than this, in pixels, are scaled down to it."""
    # Decoders round differently: their pixels are other data.
    decoder: Annotated[Literal["auto", "pillow", "torchcodec"], Opt(group=Group.DATA, changes=DATA)] = "auto"
    """JPEG decoder; auto is torchcodec where it is installed, else Pillow."""
    # Both ways give the same pixels, so a run may resume with the other.
    pixels: Annotated[Literal["auto", "resident", "streaming"], Opt(group=Group.DATA, changes=PLACE)] = "auto"
    """resident: decode once into the cache. streaming: keep images encoded and decode them a step ahead, in threads.
    auto is resident up to --resident-gb."""
    resident_gb: Annotated[float, Opt(group=Group.DATA, changes=PLACE, at_least=0, metavar="GB")] = 32.0
    """With --pixels auto: the most gigabytes of decoded pixels that are stored in the cache."""
    # Pillow's own limit: it refuses images of more than twice its MAX_IMAGE_PIXELS.
    max_pixels: Annotated[int, Opt(group=Group.DATA, changes=DATA, at_least=1)] = 178_956_970
    """Larger images are rejected as decompression bombs. Those of more than 32,000,000 pixels are decoded one at a
    time."""
    # Not compared, as on_bad.
    max_scans: Annotated[int, Opt(group=Group.DATA, changes=DATA, at_least=1, resume=OnResume.UNCOMPARED)] = 100
    """JPEGs of more progressive scans are rejected: each scan takes the time of a whole image."""
    # Not compared: images are compared by their content, and those skipped are missing in it.
    on_bad: Annotated[Literal["stop", "skip"], Opt(group=Group.DATA, changes=DATA, resume=OnResume.UNCOMPARED)] = "stop"
    """When images cannot be decoded: stop and list all of them, or skip them."""


class Named(Images):
    """Images that are given without a flag."""

    data: Annotated[
        Names,
        Opt(
            group=Group.DATA,
            changes=DATA,
            resume=OnResume.UNCOMPARED,
            essential=True,
            positional=True,
            metavar="DATA …",
        ),
    ]
    """Images: a name of the catalog, a folder, or a source with its prefix, e.g. tfrecord:PATTERN, wds:PATTERN,
    hf:NAME, csv:FILE; or any of these at an address (gs://, s3://, hf://, https://). Several are joined."""

    def problems(self) -> list[str]:
        # An empty list is a value too: a file or Python may set one, though `data` is required.
        return ([] if self.data else ["give the images, e.g. ~/images or pet37"]) + super().problems()


class Prepare(Named):
    """Download, check and decode images, or write them as TFRecord shards."""

    verbs: ClassVar[str] = "Data"
    examples: ClassVar[tuple[str, ...]] = (
        "funmatch prepare pet37",
        "funmatch prepare ~/images --to tfrecord --out shards",
    )

    to: Annotated[Literal["cache", "tfrecord"], Opt(group=Group.OUTPUT, changes=PLACE, essential=True)] = "cache"
    """cache: decode for the runs of this program. tfrecord: write shards of tf.train.Example into --out."""
    out: Annotated[Path | None, Opt(group=Group.OUTPUT, changes=PLACE, usual="none", essential=True)] = None
    """Folder for the shards."""
    # DATA, unlike the `side` of views: it changes the images that runs read from the shards.
    side: Annotated[
        int | None,
        Opt(group=Group.OUTPUT, changes=DATA, at_least=1, at_most=16384, usual="each image's own size",
            aliases=("--img-size",)),
    ] = None  # fmt: skip
    """Resize the images of the shards to this many pixels a side: to a square, unless --fit keep."""
    fit: Annotated[Fit, Opt(group=Group.OUTPUT, changes=DATA)] = "squash"
    """How --side treats the aspect. squash: make every image a square, as the earlier TensorFlow project did with
    384. keep: make the shorter side that long and keep the aspect."""
    resample: Annotated[ShardResample, Opt(group=Group.OUTPUT, changes=DATA)] = "antialias"
    """How --side resizes. antialias: bilinear with antialias, as Pillow. bicubic: bicubic with antialias. tf:
    bilinear without antialias, as tf.image.resize and so the earlier TensorFlow project."""
    shard_size: Annotated[int, Opt(group=Group.OUTPUT, changes=PLACE, at_least=1, at_most=10**6)] = 128
    """Images per shard."""

    def problems(self) -> list[str]:
        found = []
        if self.to == "tfrecord" and self.out is None:
            found.append("--to tfrecord needs --out, the folder for the shards")
        # Refused, not ignored: somebody who gives them expects a folder of shards.
        if self.to == "cache" and (self.out or self.side):
            found.append("--out and --side belong to --to tfrecord")
        if not self.side and (self.fit != "squash" or self.resample != "antialias"):
            found.append("--fit and --resample say how --side resizes the images of shards; pass --side too")
        return found + super().problems()


class Data(Named):
    """Show what a data set holds: counts, sizes, oddities, and a sheet of samples."""

    verbs: ClassVar[str] = "Data"
    examples: ClassVar[tuple[str, ...]] = ("funmatch data ~/images", "funmatch data pet37 --sheet pet37.png")

    sheet: Annotated[
        Path | None, Opt(group=Group.OUTPUT, changes=PLACE, usual="NAME-sheet.png in this folder", essential=True)
    ] = None
    """Image file (PNG) for the sheet of samples."""


class Cache(Options):
    """Show what the cache holds, with its size and last use, and clear what nobody needs."""

    verbs: ClassVar[str] = "Data"
    examples: ClassVar[tuple[str, ...]] = (
        "funmatch cache",
        "funmatch cache --missing",
        "funmatch cache --older-than 30",
    )

    missing: Annotated[bool, Opt(group=Group.DATA, changes=PLACE, essential=True)] = False
    """Remove what was decoded from images that are gone."""
    older_than: Annotated[
        float | None, Opt(group=Group.DATA, changes=PLACE, at_least=0, usual="nothing", essential=True, metavar="DAYS")
    ] = None
    """Remove what was not used for this many days; with --missing, of that only."""
    everything: Annotated[bool, Opt(group=Group.DATA, changes=PLACE, flag="all", essential=True)] = False
    """Remove everything; it is made again when it is needed, and weights are downloaded again."""
