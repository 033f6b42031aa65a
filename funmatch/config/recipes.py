"""Lists the published recipes: complete configurations, and the accuracies published for them.

Accuracies are those of Beyer et al., "Knowledge distillation: A good teacher is patient and consistent" (CVPR 2022;
table 4 for the small data sets), and of the README of Paul's TensorFlow project. A recipe sets every option of a
command; options on the command line override it, and the run's record lists them.
"""

import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from funmatch.config.distill import TAUGHT
from funmatch.config.options import replaced_by
from funmatch.config.train import Train
from funmatch.errors import InputError, unknown

PAPER, EARLIER = "Beyer et al., CVPR 2022", "FunMatch-Distillation (TensorFlow)"


@dataclass(frozen=True)
class Recipe:
    """A published run.

    Attributes:
        name: the name to call it by.
        verb: the command that runs it.
        knobs: the options it sets; all others have the command's defaults.
        top1: published accuracy of its student on the test images, percent, or None.
        teacher_top1: published accuracy of its teacher, percent, or None.
        source: its publication.
        note: a sentence on what else to know, or "".
        space: the options that `funmatch tune` searches, and their values.
    """

    name: str
    verb: str
    knobs: Mapping[str, Any]
    top1: float | None = None
    teacher_top1: float | None = None
    source: str = PAPER
    note: str = ""
    space: Mapping[str, str] = field(default_factory=dict)

    @property
    def command(self) -> str:
        """The command line that runs it."""
        return f"funmatch {self.verb} {self.name}"

    def table(self, **overrides: Any) -> Train:
        """Its complete configuration, with some options overridden."""
        # Checked, though recipes are our own: the user's overrides may contradict them.
        return TAUGHT[self.verb].checked(**self.over(overrides), **overrides)

    def over(self, overrides: Iterable[str]) -> dict[str, Any]:
        """The options it still sets beside those that the user sets: without these, and without what they replace."""
        table = TAUGHT[self.verb]
        # By the fields' names: the user may write --batch-size where the recipe has `batch`.
        names = {table.field_of(word) or word for word in overrides}
        dropped = {*names, *replaced_by(table, names)}
        return {name: value for name, value in self.knobs.items() if name not in dropped} | {"recipe": self.name}


def find(name: str, verb: str | None = None) -> Recipe:
    """Looks a recipe up by its name.

    Raises:
        InputError: there is none, or it belongs to another command.
    """
    # Only recipes of this command are suggested: the others would be refused next.
    if name not in RECIPES:
        raise unknown("recipe", name, [each.name for each in RECIPES.values() if verb in (None, each.verb)])
    recipe = RECIPES[name]
    if verb not in (None, recipe.verb):
        raise InputError(f"{name} is a recipe of another command; run: {recipe.command}")
    return recipe


def matching(pattern: str) -> list[Recipe]:
    """The recipes whose names match a pattern or contain it; all for an empty one."""
    # A plain word is searched anywhere in the names; with a wildcard the pattern is the user's own.
    wide = pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"
    found = [recipe for name, recipe in RECIPES.items() if fnmatch(name, wide)]
    if not found:
        raise unknown("recipe", pattern, RECIPES)
    return found


def facts(config: Train) -> dict[str, Any]:
    """A run's facts about its recipe: `overridden`, option to [the recipe's value, the run's]; {} without a recipe."""
    if config.recipe is None:
        return {}
    recipe = find(config.recipe)
    # A table cannot be built without `out`, which is PLACE and so not compared.
    own = recipe.table(out=config.out) if "out" not in recipe.knobs else recipe.table()
    # Only what a recipe decides: another machine or folder is not a deviation.
    names = type(config).where(lambda opt: opt.in_recipe)
    differing = {name for name in names if getattr(own, name) != getattr(config, name)}
    # As JSON, since this goes into the run's record.
    values = own.model_dump(mode="json"), config.model_dump(mode="json")
    return {"overridden": {name: [each[name] for each in values] for name in sorted(differing)}}


def words(recipe: Recipe) -> str:
    """The recipe as a command line that gives every option it sets."""
    return " ".join([f"funmatch {recipe.verb}", *options(recipe.verb, recipe.knobs)])


def options(verb: str, values: Mapping[str, Any]) -> Iterator[str]:
    """Options as they are typed, one string for each with its values."""
    for name, value in values.items():
        option = "--" + (TAUGHT[verb].opt(name).flag or name).replace("_", "-")
        each = value if isinstance(value, tuple) else (value,)
        if value is False:
            # The parser has --no-NAME only for switches that are on by default.
            if TAUGHT[verb].model_fields[name].default is True:
                yield option.replace("--", "--no-", 1)
        else:
            # Quoted: module names, paths and patterns may hold spaces or signs that a shell would read.
            yield option if value is True else f"{option} {shlex.join(map(str, each))}"


DATA = {"pet37": "pet", "flowers102": "flowers", "food101": "food", "sun397": "sun"}
"""Data sets of the paper, and their names in its files."""
TEACHER_TOP1 = {"flowers102": 97.82, "pet37": 91.03, "food101": 86.24, "sun397": 74.22}
# Both codes train without antialias. The paper's evaluates by area (`resize_small`), the earlier project as it trains.
TF_RESIZE = {"resample": "tf", "eval_resample": "tf"}
PAPER_RESIZE = {"resample": "tf", "eval_resample": "area"}
# TensorFlow's default, which the paper's code does not change.
CROPS = {"crop_ratio": (0.75, 1.33)}
ADAM = {"momentum_dtype": "bf16"}
STUDENT = {"student": "resnetv2_50x1_bit", "side": 128}

# data, name, epochs, lr, weight decay, temperature, top-1 of the student: table 4 of the paper
ROWS = (
    ("flowers102", "1000", 1_000, 3e-3, 1e-3, 10, 77.51),
    ("flowers102", "fast", 10_000, 3e-3, 3e-4, 10, 92.83),
    ("flowers102", "medium", 100_000, 1e-3, 1e-4, 1, 95.54),
    ("flowers102", "long", 1_000_000, 3e-4, 1e-5, 1, 96.93),
    ("pet37", "300", 300, 1e-2, 1e-5, 2, 82.75),
    ("pet37", "fast", 1_000, 1e-2, 1e-3, 5, 88.01),
    ("pet37", "medium", 3_000, 3e-3, 3e-4, 10, 90.08),
    ("pet37", "10000", 10_000, 1e-3, 1e-4, 2, 90.98),
    ("pet37", "long", 30_000, 3e-3, 1e-5, 2, 91.06),
    ("food101", "fast", 100, 1e-2, 1e-3, 10, 83.29),
    ("food101", "medium", 1_000, 1e-3, 3e-4, 10, 86.64),
    ("food101", "long", 3_000, 1e-2, 1e-4, 5, 87.20),
    ("sun397", "fast", 100, 1e-2, 1e-3, 10, 68.28),
    ("sun397", "medium", 1_000, 3e-3, 1e-4, 10, 73.46),
    ("sun397", "long", 3_000, 1e-2, 3e-5, 10, 74.26),
)
SPACE = {"lr": "3e-4,1e-3,3e-3,1e-2", "temperature": "1,2,5,10", "weight_decay": "1e-5,3e-5,1e-4,3e-4,1e-3"}
"""The values searched for table 4 of the paper."""


def _small_data() -> Iterator[Recipe]:
    """The paper's students for images of 128 pixels."""
    for data, name, epochs, lr, decay, temperature, top1 in ROWS:
        values = {
            "data": (data,), "teacher": (f"bit:R152x2_T_{DATA[data]}128",), **STUDENT,
            "eval_resize": 160, **PAPER_RESIZE, **CROPS, **ADAM,
            "out": Path(f"runs/{data}-{name}"), "epochs": float(epochs), "batch": 512, "lr": lr,
            "weight_decay": decay, "temperature": float(temperature), "warmup_steps": 1500,
        }  # fmt: skip
        note = "The paper's code uses lr 0.001." if (data, name) == ("sun397", "medium") else ""
        yield Recipe(f"{data}-{name}", "distill", values, top1, TEACHER_TOP1[data], note=note, space=SPACE)


def _teachers() -> Iterator[Recipe]:
    """The paper's teachers for images of 128 pixels, fine-tuned by BiT-HyperRule; and the earlier project's network."""
    for data, top1 in TEACHER_TOP1.items():
        for name, network in ((f"teacher-{data}", "152x2"), (f"teacher-{data}-r101x3", "101x3")):
            values = {
                "data": (data,), "student": f"resnetv2_{network}_bit.goog_in21k", "side": 128, "resize": 160,
                "out": Path(f"runs/{name}"), "batch": 512, "micro_batch": 64, **PAPER_RESIZE,
            }  # fmt: skip
            note = "With micro-batches of 64 images it fits in 16 GB; --grad-checkpointing halves that again."
            # The published accuracies are those of the paper's own network.
            published = top1 if network == "152x2" else None
            yield Recipe(name, "finetune", values, published, note=note, space={"lr": "log:3e-4..3e-2"})


IMAGENET_TEACHER = "resnetv2_152x2_bit.goog_teacher_in21k_ft_in1k"
IMAGENET = {
    "data": ("imagenet",), "batch": 4096, "lr": 0.03, "weight_decay": 3e-4, "temperature": 1.0, "warmup_steps": 5000,
    **PAPER_RESIZE, **CROPS, **ADAM,
}  # fmt: skip
# name, options, epochs to top-1 of the student on the validation images
IMAGENET_ROWS = (
    ("imagenet", {"side": 224, "eval_resize": 256}, {300: 80.30, 1200: 81.54, 4800: 82.18, 9600: 82.31}),
    ("imagenet-s160", {"side": 160, "teacher_side": (224,)}, {300: 78.17, 1200: 79.61, 9600: 80.49}),
    ("imagenet-t384",
     {"side": 224, "eval_resize": 256, "teacher": (f"{IMAGENET_TEACHER}_384",), "teacher_side": (384,)},
     {300: 80.46, 1200: 81.82, 4800: 82.33, 9600: 82.64}),
    ("imagenet-two-teachers",
     {"side": 224, "eval_resize": 256, "teacher": (IMAGENET_TEACHER, f"{IMAGENET_TEACHER}_384"),
      "teacher_side": (224, 384), "combine": "mean-probabilities"},
     {1200: 82.12, 4800: 82.71, 9600: 82.82}),
    ("imagenet-mobilenet",
     {"student": "funmatch.models.groupnorm:mobilenetv3_large_gn", "side": 224, "eval_resize": 256},
     {300: 74.60, 1200: 76.31, 4800: 76.84, 9600: 76.97}),
    ("imagenet-mobilenet-bn", {"student": "mobilenetv3_large_100", "side": 224, "eval_resize": 256}, {1200: 73.51}),
)  # fmt: skip


def _imagenet() -> Iterator[Recipe]:
    for name, own, published in IMAGENET_ROWS:
        for epochs, top1 in published.items():
            values = {
                # The row's own options come last, so that they replace the common ones.
                **IMAGENET, "teacher": (IMAGENET_TEACHER,), "student": "resnetv2_50x1_bit", **own,
                "epochs": float(epochs), "out": Path(f"runs/{name}-{epochs}"),
            }  # fmt: skip
            note = (
                "The number of groups is not published; here a group has 8 channels." if name.endswith("lenet") else ""
            )
            yield Recipe(f"{name}-{epochs}", "distill", values, top1, note=note, space=SPACE)


# data, epochs, top-1 of the student, of the teacher: the earlier project's README
EARLIER_ROWS = (
    ("flowers102", 1000, 81.02, 98.18),
    ("pet37", 300, 81.3, 90.92),
    ("pet37", 1000, 86.0, 90.92),
    ("food101", 100, 76.06, 85.52),
)
SHARDS = (
    "Its images were squashed to 384 x 384 pixels before; "
    "`funmatch prepare --to tfrecord --side 384 --resample tf` writes such shards."
)
FAULTS = (
    "Its settings without its faults: MixUp paired mirrored images, the loss lacked T², gradients were clipped per "
    "variable, and weight decay followed neither the schedule nor the kind of variable."
)


def _earlier() -> Iterator[Recipe]:
    """The runs of the TensorFlow project that this one succeeds."""
    # Two rows of Oxford's pets have the same teacher, which is one recipe.
    tops = {data: top for data, _, _, top in EARLIER_ROWS}
    for data, top1 in tops.items():
        values = {
            "data": (data,), "student": "resnetv2_101x3_bit.goog_in21k", "side": 128, "crop": "squash", "resize": 160,
            # 128 / 0.875: that project evaluated the central 0.875 of an image.
            "eval_resize": 146, "out": Path(f"runs/tf-teacher-{data}"), "batch": 512, "micro_batch": 64, "lr": 8e-5,
            "steps": 450, "warmup_steps": 0, "decay_steps": (200, 300, 400), "decay_factors": (0.1, 1e-3, 1e-4),
            "mixup": 0.0, "eval_every": 10, "keep": "last", **TF_RESIZE,
        }  # fmt: skip
        note = (
            "Evaluated on the central 0.875 of the image, squashed to 128 pixels. Its lr is 1e-5 per TPU core, and the "
            f"project kept the teacher of the last step. {SHARDS}"
        )
        # Its values for one core, times its eight.
        space = {"lr": "0.024,8e-4,8e-5,4e-4"}
        yield Recipe(f"tf-teacher-{data}", "finetune", values, top1, source=EARLIER, note=note, space=space)
    for data, epochs, top1, teacher_top1 in EARLIER_ROWS:
        values = {
            "data": (data,), "teacher": (f"runs/tf-teacher-{data}",), **STUDENT, "eval_resize": 146,
            # `min_object_covered`: it draws crops of 5 % of the image on, and again those below 10 %.
            "crop_min_area": 0.1, **TF_RESIZE,
            "out": Path(f"runs/tf-{data}-{epochs}"), "epochs": float(epochs), "batch": 512, "lr": 0.01,
            "weight_decay": 1e-5, "temperature": 2.0, "warmup_steps": 1500,
        }  # fmt: skip
        yield Recipe(f"tf-{data}-{epochs}", "distill", values, top1, teacher_top1, EARLIER, f"{FAULTS} {SHARDS}", SPACE)


# Teachers first, as in the list that users see: the small data sets' students begin with them.
RECIPES: dict[str, Recipe] = {
    recipe.name: recipe for group in (_teachers, _small_data, _imagenet, _earlier) for recipe in group()
}
