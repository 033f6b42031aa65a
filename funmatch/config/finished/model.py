"""The options that all commands for a finished run or a model share: its weights, and how it sees images."""

from pathlib import Path
from typing import Annotated, ClassVar

from funmatch.config.choices import EvalResample, TaskName
from funmatch.config.data import Images
from funmatch.config.metadata import Changes, Group, Opt, Refers
from funmatch.config.options import Machine, like
from funmatch.config.teaching import ByText
from funmatch.config.train import Train
from funmatch.config.values import Names, Pairs

MODEL = Opt(
    group=Group.STUDENT, changes=Changes.STUDENT, positional=True, essential=True, refers=Refers.MODEL,
    content="student", metavar="MODEL",
)  # fmt: skip
"""A run folder or a model, the first word of such a command."""


# No `Views`: there are no random crops, so of the options of views it takes only the two sizes, below.
class FinishedModel(ByText, Machine):
    """The weights and the preprocessing of a model that is evaluated or used."""

    headings: ClassVar[dict[Group, str]] = {Group.STUDENT: "Model"}

    weights: Annotated[
        Path | None,
        Opt(group=Group.STUDENT, changes=Changes.STUDENT, refers=Refers.WEIGHTS, content="student", usual="none",
            essential=True),
    ] = None  # fmt: skip
    """File with weights (.safetensors, .pt or BiT .npz), for a model given by its timm name."""
    model_kwargs: Annotated[
        Pairs, Opt(group=Group.STUDENT, changes=Changes.STUDENT, usual="none", metavar="KEY=VALUE …")
    ] = ()
    """Arguments for timm's constructor. weights_key=KEY chooses among several weights in a file, e.g.
    state_dict_ema."""
    classes_from: Annotated[str | None, like(ByText, "classes_from", group=Group.STUDENT, changes=Changes.STUDENT)] = (
        None
    )
    """For a network of image and text (clip:MODEL), the classes that it tells apart: a text file with a name a line; a
    JSON file with a list of names, or {"name": ["description", …], …}; or data, the class names of the images that it
    is evaluated on. Without it, its outputs are embeddings."""
    templates: Annotated[str | None, like(ByText, "templates", group=Group.STUDENT, changes=Changes.STUDENT)] = None
    """Sentences in which a class name is put: openai-80, short, none, or a text file with one a line, {} where the name
    stands."""
    # Optional: a run knows its own, and only a named model may need them.
    side: Annotated[int | None, like(Train, "side", usual="the run's or the model's own")] = None
    """Image size: side of the square views, in pixels."""
    eval_resize: Annotated[int | None, like(Train, "eval_resize", usual="the run's or the model's own")] = None
    """Length of the image's shorter side before the central crop, in pixels."""
    eval_resample: Annotated[
        EvalResample | None, like(Train, "eval_resample", usual="the run's or the model's own")
    ] = None
    """How images are resized: antialias (bilinear), bicubic, area, tf (bilinear without antialias), nearest, lanczos,
    box, hamming, or a filter of torchvision's own code."""
    batch: Annotated[int, like(Train, "batch")] = 128
    """Images per forward pass."""


class WithImages(Images, FinishedModel):
    """The images that a model is evaluated on, or that what is made of it is checked on."""

    # Optional: a student that was trained for several classes an image says so.
    task: Annotated[TaskName | None, like(Images, "task", usual="the model's")] = None
    """What labels mean. multiclass: one class an image. multilabel: any number of them, each with a probability of its
    own."""
    # Optional: a run knows its own.
    data: Annotated[Names, like(Train, "data", usual="the run's")] = ()
    """Images: a name of the catalog, a folder, or a source with its prefix, e.g. tfrecord:PATTERN, wds:PATTERN,
    hf:NAME, csv:FILE; or any of these at an address (gs://, s3://, hf://, https://). Several are joined."""
