"""The tables of the commands that train on labels: train and finetune."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from funmatch.config.choices import Crop
from funmatch.config.data import NO_VALIDATION, VALIDATION_SHARE, Images
from funmatch.config.loop import Loop, Student
from funmatch.config.metadata import Changes, Group, Inherit, OnResume, Opt, Refers
from funmatch.config.mixtures.policies import MixedViews
from funmatch.config.mixtures.sources import Sources
from funmatch.config.optim import FINETUNE_LR, Optimizer, Schedule
from funmatch.config.options import like
from funmatch.config.values import Names, Share


# Options of the last base come first, in `config.json` as in the list of problems.
class Train(Sources, Student, MixedViews, Optimizer, Loop):
    """Train a model on labels alone: the baseline, with the views and the loop of distill."""

    verbs: ClassVar[str] = "Start"
    examples: ClassVar[tuple[str, ...]] = (
        "funmatch train --data ~/images --student resnet18 --epochs 100 --out runs/labels",
    )

    # Images are compared by their content when a run resumes, wherever they lie.
    data: Annotated[
        Names,
        Opt(
            group=Group.DATA,
            changes=Changes.DATA,
            refers=Refers.DATA,
            resume=OnResume.UNCOMPARED,
            essential=True,
            metavar="DATA …",
        ),
    ]
    """Training images: a name (pet37, flowers102, food101, sun397, imagenet, fashion-mnist, cifar10, cifar100,
    fashion-mini), a folder, or a source with its prefix, e.g. tfrecord:PATTERN, wds:PATTERN, hf:NAME,
    csv:FILE; or any of these at an address (gs://, s3://, hf://, https://). Several are joined."""
    # Not DATA: the teacher's views are of --data alone, so runs that are evaluated on other images may share a tape.
    eval_data: Annotated[
        Names,
        Opt(group=Group.DATA, changes=Changes.STUDENT, refers=Refers.DATA, resume=OnResume.UNCOMPARED, searchable=False,
            usual="those of --data",
            metavar="DATA …"),
    ] = ()  # fmt: skip
    """Other images to evaluate on: their validation and test splits, or all of them as a test split."""
    val: Annotated[
        Share, like(Images, "val", usual=f"the data's own split, or {VALIDATION_SHARE} where it has none")
    ] = None
    """Hold out this much of the training images for validation: 10%, or a number of images; none trains on all of them.
    The choice depends only on the images' content and on --val-seed."""
    # VIEWS too: the images of a step are others.
    sampling: Annotated[
        Literal["shuffled", "balanced"],
        Opt(group=Group.LOOP, changes=Changes.STUDENT | Changes.VIEWS, inherit=Inherit.NEVER),
    ] = "shuffled"
    """Order of the training images. shuffled: each once an epoch. balanced: all classes equally often, the images of a
    class each once before any comes again; for train and finetune."""
    class_weights: Annotated[
        Literal["none", "balanced"], Opt(group=Group.LOOP, changes=Changes.STUDENT, inherit=Inherit.NEVER)
    ] = "none"
    """Weights of the classes in the loss. balanced: inversely proportional to their numbers of training images, 1 in
    the mean over the images; with --task multilabel, an image with a class weighs as many times as there are training
    images without it for each with it; for train and finetune."""
    out: Annotated[Path, Opt(group=Group.OUTPUT, changes=Changes.PLACE, study=False, essential=True, metavar="FOLDER")]
    """Run folder. The same command again resumes from its newest checkpoint."""
    # PLACE: a run is compared by the options that the recipe sets, not by its name.
    recipe: Annotated[
        str | None, Opt(group=Group.OUTPUT, changes=Changes.PLACE, inherit=Inherit.NEVER, usual="none", metavar="NAME")
    ] = None
    """Published recipe (`funmatch recipes` lists them), also given as the first word: it sets every option; options on
    the command line override it."""

    # Excluded from records, which are of runs: a dry run makes none.
    dry_run: Annotated[bool, Opt(group=Group.OUTPUT, changes=Changes.PLACE, study=False), Field(exclude=True)] = False
    """Print the options as they would be used, where each value comes from, the images, the parameters and the length;
    train nothing and write no run folder."""

    def problems(self) -> list[str]:
        found = [] if self.data else ["give the training images by --data"]
        # Refused, since the images that are held out would be trained on by nobody and evaluated by nobody.
        if self.val not in (None, NO_VALIDATION) and self.eval_data:
            found.append("--val holds out images of --data, but --eval-data is evaluated on; give one of them")
        # It shows each image for its one class.
        if self.task == "multilabel" and self.moved("sampling"):
            found.append(f"sampling {self.sampling} is for one class an image; omit it with --task multilabel")
        # The first ranges are infinite, of which no average can be made.
        if self.quantize and self.ema is not None:
            found.append("--quantize does not go with --ema, whose average of weights is not what was rounded; omit it")
        # Rounding looks into each layer, which a compiled network and our kernels pass by.
        if self.quantize and self.compile not in ("auto", "off"):
            found.append(f"--quantize does not go with --compile {self.compile}; omit it")
        return found + super().problems()


class Finetune(Train):
    """Train a network with pretrained weights on your labels, by BiT-HyperRule: a teacher."""

    by_rule: ClassVar[bool] = True
    headings: ClassVar[dict[Group, str]] = {Group.STUDENT: "Model"}
    examples: ClassVar[tuple[str, ...]] = (
        "funmatch finetune --data ~/images --model resnetv2_50x1_bit.goog_in21k --out runs/teacher",
        "funmatch finetune teacher-pet37",
    )

    # The field stays `student`, so that loop, records and reports serve it as any other run; users see --model.
    student: Annotated[str, like(Train, "student", flag="model", aliases=("--student",))]
    """Network to fine-tune: a timm name with the tag of its weights, a BiT checkpoint, a folder, a run, or an
    architecture with --weights. Its head starts at zero, unless it was trained on these very classes."""
    student_weights: Annotated[
        Path | None, like(Train, "student_weights", flag="weights", aliases=("--student-weights",))
    ] = None
    """File to start from (.safetensors, .pt or BiT .npz), for a network given by its timm name."""
    # None here too, but not an error: BiT-HyperRule sets the length (`by_rule`).
    steps: Annotated[
        int | None, like(Train, "steps", usual="500, 10,000 or 20,000, by the number of training images")
    ] = None
    """Length of the run in steps (updates of the weights)."""
    epochs: Annotated[float | None, like(Train, "epochs")] = None
    """Length of the run in passes over the training images, instead of --steps."""
    batch: Annotated[int, like(Train, "batch")] = 512
    """Images per step. May be more than the data set has."""
    side: Annotated[int | None, like(Train, "side", usual="128 for images of fewer than 96 × 96 pixels, else 480")] = (
        None
    )
    """Image size: side of the square views, in pixels."""
    crop: Annotated[Crop | None, like(Train, "crop")] = "mild"
    """How an image becomes a training view. mild: a random square of --side, after resizing the shorter side to
    --resize. squash: the same, after resizing the whole image to a square. whole: all of the image. inception: a crop
    of random size and place."""
    resize: Annotated[int | None, like(Train, "resize", usual="160 for --side 128, 512 for 480, and in proportion")] = (
        None
    )
    """Length of the image's shorter side before a mild crop, in pixels."""
    mixup: Annotated[float | None, like(Train, "mixup", usual="0.1 from 20,000 training images on, else 0")] = None
    """MixUp: draw λ from Beta(a, a) with this a; 0 turns MixUp off."""
    optimizer: Annotated[str, like(Train, "optimizer")] = "sgd"
    """Optimizer: sgd, adamw, lamb, lars, muon, shampoo, soap, or any of timm's."""
    lr: Annotated[float | None, like(Train, "lr", usual=f"0.003 × batch / 512 for sgd, {FINETUNE_LR:g} for others")] = (
        None
    )
    """Learning rate at the top of the schedule."""
    schedule: Annotated[Schedule, like(Train, "schedule")] = "staircase"
    """Learning rate after the warm-up: falling at --decay-steps (staircase); falling to 0 along half a cosine, a line
    or a parabola; constant until it falls over the last --cooldown-steps (wsd); or constant."""
    decay_steps: Annotated[
        tuple[int, ...],
        like(Train, "decay_steps", usual="at 40, 60 and 80 % of 500 steps, at 30, 60 and 90 % of more"),
    ] = ()
    """staircase: the steps at which the learning rate falls."""
    weight_decay: Annotated[float, like(Train, "weight_decay")] = 0.0
    """Weight decay, decoupled from the learning rate: the share of each kernel that one step removes at the top of the
    schedule."""
    warmup_steps: Annotated[
        int | None, like(Train, "warmup_steps", usual="100 for fewer than 20,000 training images, else 500")
    ] = None
    """Number of steps over which the learning rate rises from 0."""
    clip_norm: Annotated[float | None, like(Train, "clip_norm")] = None
    """Clip gradients to this global norm; None never clips."""
    eval_every: Annotated[
        int | None,
        like(
            Train,
            "eval_every",
            usual="a tenth of the run, at most 100; more where the validation split is large",
        ),
    ] = None
    """Steps between evaluations on the validation split. Where there is none, a tenth of the training images is held
    out for it."""
    keep: Annotated[Literal["last", "best"], like(Train, "keep")] = "best"
    """Network to evaluate and save at the end: the last one, or the best on the validation split."""
