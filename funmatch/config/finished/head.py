"""The table of head."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from funmatch.config.data import Images
from funmatch.config.finished.model import MODEL, FinishedModel
from funmatch.config.metadata import Changes, Group, OnResume, Opt
from funmatch.config.options import like
from funmatch.config.train import Train
from funmatch.config.values import Integers, Names, Numbers, Share

PLACE, STUDENT = Changes.PLACE, Changes.STUDENT
KINDS = {"linear": ("strengths", "standardise", "class_weights"), "knn": ("neighbours",), "means": ("distance",)}
"""Options that belong to one kind of head."""
TRIED = {"linear": ("strengths",), "knn": ("neighbours",)}
"""Options among whose values the validation images choose."""
STRENGTHS = tuple(round(10 ** (exponent / 2), 9) for exponent in range(-10, 5))
"""Strengths that are tried where none are given: 10⁻⁵ … 100, two a decade."""
NEIGHBOURS = (1, 5, 10, 20, 50, 100, 200)


class Head(Images, FinishedModel):
    """Fit a head to the features of a frozen backbone, computed once: a teacher in the time of one pass."""

    verbs: ClassVar[str] = "Models"
    examples: ClassVar[tuple[str, ...]] = (
        "funmatch head --data ~/images --model resnet50.a1_in1k --out teacher",
        "funmatch head --data ~/images --model resnet50.a1_in1k --kind knn --out neighbours",
    )

    data: Annotated[Names, like(Train, "data")]
    """Images with labels: a name of the catalog, a folder, or a source with its prefix, e.g. tfrecord:PATTERN,
    wds:PATTERN, hf:NAME; or any of these at an address (gs://, s3://, hf://, https://). Several are joined."""
    model: Annotated[str, replace(MODEL, positional=False, aliases=("--backbone",))]
    """Backbone, which stays as it is: any model that `distill --teacher` takes, with its head, which is dropped, or
    without one."""
    val: Annotated[Share, like(Train, "val")] = None
    """Hold out this much of the training images, to choose by: 10%, or a number of images; none takes the one strength
    that is given. The choice depends only on the images' content and on --val-seed."""
    out: Annotated[Path, like(Train, "out")]
    """Folder of the new model. The same command again goes on where it was stopped."""
    # Rounds alone, as where it is computed: no batch is trained on.
    batch: Annotated[int, like(Train, "batch", changes=Changes.ARITHMETIC, resume=OnResume.UNCOMPARED)] = 128
    """Images per forward pass."""
    kind: Annotated[Literal["linear", "knn", "means"], Opt(group=Group.STUDENT, changes=STUDENT, essential=True)] = (
        "linear"
    )
    """Head to fit. linear: logistic regression, multinomial, or binary for each class with --task multilabel. knn: the
    weighted vote of the nearest training images, which become a part of the network. means: the nearest mean of a
    class, or with --task multilabel, for each class, of the images with and without it."""
    # Called C in scikit-learn, as in the flag.
    strengths: Annotated[
        Numbers,
        Opt(group=Group.STUDENT, changes=STUDENT, above=0, at_most=1e12, essential=True, flag="C", metavar="C …",
            usual="15 from 1e-5 to 100"),
    ] = ()  # fmt: skip
    """Strengths of linear's L2 penalty to try, as scikit-learn's C: the smaller, the stronger. The best on the
    validation images is taken: of those within a standard error of the best accuracy, that of least log loss; with
    --task multilabel that of the best mean average precision."""
    standardise: Annotated[bool, Opt(group=Group.STUDENT, changes=STUDENT)] = True
    """Fit linear to features with mean 0 and deviation 1, as scikit-learn's StandardScaler makes them. The weights that
    are saved are for the features as they are."""
    class_weights: Annotated[Literal["none", "balanced"], like(Train, "class_weights", group=Group.STUDENT)] = "none"
    """Weights of the classes in linear's loss. balanced: inversely proportional to their numbers of training images;
    with --task multilabel, an image with a class weighs as many times as there are without it for each with it."""
    calibrate: Annotated[bool, Opt(group=Group.STUDENT, changes=STUDENT)] = True
    """Scale the logits so that the log loss on the validation images is least, which changes no predicted class."""
    neighbours: Annotated[
        Integers,
        Opt(group=Group.STUDENT, changes=STUDENT, at_least=1, usual=" ".join(map(str, NEIGHBOURS)), metavar="K …"),
    ] = ()
    """Numbers of knn's neighbours to try."""
    distance: Annotated[Literal["cosine", "euclidean"], Opt(group=Group.STUDENT, changes=STUDENT)] = "cosine"
    """By what the means are near."""

    def problems(self) -> list[str]:
        found = [] if self.data else ["give the training images by --data"]
        for kind, names in KINDS.items():
            moved = [f"--{type(self).opt(name).flag or name.replace('_', '-')}" for name in names if self.moved(name)]
            if moved and kind != self.kind:
                found.append(f"{' and '.join(moved)} belong to --kind {kind}, not {self.kind}")
        if self.unlabelled:
            found.append("--unlabelled leaves no labels to fit a head to")
        return found + super().problems()

    @property
    def resolved(self) -> dict[str, tuple[float, ...]]:
        """The option of the kind with the values that are tried, for its record."""
        return dict.fromkeys(TRIED.get(self.kind, ()), self.tried)

    @property
    def is_linear(self) -> bool:
        """Whether logits are linear in the features, so that the head can take the place of a network's last layer."""
        return self.kind == "linear" or (self.kind == "means" and self.distance == "euclidean")

    @property
    def tried(self) -> tuple[float, ...]:
        """The values among which the validation images choose; empty where the kind has no option for them."""
        usual = {"linear": self.strengths or STRENGTHS, "knn": self.neighbours or NEIGHBOURS}
        # The strongest penalty first: each fit begins at the one before.
        return tuple(sorted(set(usual.get(self.kind, ()))))
