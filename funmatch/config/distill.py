"""The table of distillation."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from funmatch.config.choices import DISTANCES, STRATEGIES, Crop, Strategy, find_distance
from funmatch.config.metadata import Changes, Group, OnResume, Opt, Refers
from funmatch.config.options import like
from funmatch.config.teachers.matching import Matching
from funmatch.config.teaching import Teaching
from funmatch.config.train import Finetune, Train
from funmatch.config.values import Names, Precision
from funmatch.errors import unknown

STUDENT, TEACHER = Changes.STUDENT, Changes.TEACHER


class Distill(Train, Teaching, Matching):
    """Train a student to match a teacher's outputs; no labels are used."""

    examples: ClassVar[tuple[str, ...]] = (
        "funmatch distill --data ~/images --teacher runs/teacher --student resnet18 --epochs 1000 --out runs/student",
        "funmatch distill pet37-fast",
    )

    student: Annotated[str, like(Train, "student")]
    """Network to train: a timm name, with random weights or, with its tag, its published ones; a folder or file with
    weights, as for a teacher; or fashion-mini-student. For another number of classes it gets a new head of zeros. Give
    --student several times to train several students in one process."""
    # What describes a recipe's teachers does not fit others.
    teacher: Annotated[
        Names,
        Opt(group=Group.TEACHER, changes=TEACHER, essential=True, refers=Refers.MODEL, content="teacher",
            metavar="MODEL …",
            replaces=("teacher_weights", "teacher_kwargs", "teacher_side", "teacher_share", "classes", "classes_from",
                      "templates")),
    ]  # fmt: skip
    """Network to match, or several: a run folder, a timm name, hf-hub:user/model or the folder of a model (of timm or
    transformers), a BiT checkpoint path.npz or bit:R152x2_T_pet128, savedmodel:path, path.keras, clip:MODEL,
    package.module:function, or fashion-mini-teacher."""
    teacher_precision: Annotated[Precision, Opt(group=Group.TEACHER, changes=TEACHER | Changes.ARITHMETIC)] = "auto"
    """Floating-point format of the frozen teacher; auto is the fastest whose outputs for the first views equal those in
    fp32."""
    # A frozen teacher has no batch statistics, so pieces give the same logits up to rounding.
    teacher_batch: Annotated[
        int | None, Opt(group=Group.TEACHER, changes=Changes.ARITHMETIC, at_least=1, usual="as many as the student")
    ] = None
    """Images per forward pass of the teacher, to need less memory."""
    # Text, not choices: the table has the names, and the check suggests the near ones.
    strategy: Annotated[
        str, Opt(group=Group.VIEWS, changes=Changes.VIEWS | TEACHER, metavar="|".join(reversed(STRATEGIES)))
    ] = "funmatch"
    """Views of teacher and student. funmatch: one shared Inception crop, mixed. same/ic, same/rc: one shared Inception
    or mild random crop. ind/ic, ind/rc: independent crops. fix/rs, fix/cc, fix/ic_ens: the teacher always gets the
    whole image, its centre, or many Inception crops, whose mean output counts; the student gets the whole image, mild
    random or Inception crops."""
    # TEACHER, not VIEWS: the student's crops do not change.
    teacher_crops: Annotated[int, Opt(group=Group.VIEWS, changes=TEACHER, at_least=1, at_most=10**6)] = 1000
    """fix/ic_ens: Inception crops of each image over which the teacher's probabilities are averaged beforehand."""
    crop: Annotated[Crop | None, like(Train, "crop", usual="the strategy's")] = None
    """The student's crop. Strategies with mild crops (*/rc, fix/cc) also take squash: random squares of the whole image
    resized to a square."""
    mixup: Annotated[float | None, like(Train, "mixup", usual="1 for funmatch, else 0")] = None
    """MixUp: draw λ from Beta(a, a) with this a. 1 is uniform, 0 turns MixUp off."""
    distance: Annotated[
        str, Opt(group=Group.LOOP, changes=STUDENT, aliases=("--loss",), metavar="|".join(DISTANCES), function=True)
    ] = "kl"
    """Loss between the outputs of student and teacher. Of probabilities at the temperature: kl, reverse-kl, js
    (Jensen–Shannon), dist (Huang et al., 2022). Of logits: l2, euclidean, log-softmax-l2, log-softmax-euclidean. hard:
    cross-entropy on the teacher's top class. Or package.module:function of both logits, (n, classes) each, that gives
    one number an image."""
    standardise: Annotated[bool, Opt(group=Group.LOOP, changes=STUDENT)] = False
    """Standardise each image's logits to mean 0 and deviation 1 before the distance (Sun et al., 2024)."""
    label_weight: Annotated[float, Opt(group=Group.LOOP, changes=STUDENT, at_least=0, at_most=1)] = 0.0
    """Share of the loss that is cross-entropy on the images' labels, mixed as the views are; function matching uses
    none."""
    temperature: Annotated[
        # The teachers' mean probabilities depend on it; with one teacher, or mean logits, only the loss does.
        float, Opt(group=Group.LOOP, changes=STUDENT | TEACHER, above=0, aliases=("-T",), essential=True)
    ] = 1.0
    """Temperature: both networks' logits are divided by it before the softmax."""
    t_squared: Annotated[bool, Opt(group=Group.LOOP, changes=STUDENT)] = True
    """Multiply the distance by the square of the temperature, so that the temperature does not scale gradients."""
    teacher_ahead: Annotated[bool, Opt(group=Group.TEACHER, changes=Changes.ARITHMETIC)] = False
    """Run the teacher in the threads that make views: faster for small networks on a CPU."""
    # A permission changes no result, but a search that tried both values would try the same run twice.
    allow_weak_teacher: Annotated[bool, Opt(group=Group.TEACHER, changes=TEACHER, searchable=False)] = False
    """Continue with a teacher that is near chance on the labelled validation images."""
    tape: Annotated[
        Path | None,
        # Its rounding is compared by what the record says of it.
        Opt(group=Group.TEACHER, changes=Changes.PLACE | TEACHER | Changes.ARITHMETIC, refers=Refers.FILE,
            resume=OnResume.UNCOMPARED, usual="none", metavar="FOLDER"),
    ] = None  # fmt: skip
    """Folder for a tape: the teacher's logits for every view, in half precision. The first run records it; later runs
    with the same images, seed, batch, views and teacher read it instead of running the teacher."""
    tape_top: Annotated[
        int | None, Opt(group=Group.TEACHER, changes=TEACHER, at_least=1, at_most=1 << 16, usual="all", metavar="K")
    ] = None
    """Store only the teacher's top K classes on the tape, and the mass of all others as one number."""
    tape_full: Annotated[Literal["stop", "go-on"], Opt(group=Group.TEACHER, changes=Changes.PLACE)] = "stop"
    """When the disk becomes full while a tape is recorded: stop the run, or continue without recording."""

    @property
    def row(self) -> Strategy | None:
        """The strategy's row of the table; None for an unknown name."""
        return STRATEGIES.get(self.strategy)

    @property
    def teacher_is_fixed(self) -> bool:
        return self.row is not None and self.row.fixed

    @property
    def cropped(self) -> Crop:
        return self.crop or (self.row.crop if self.row else "inception")

    @property
    def mixes(self) -> bool:
        # A strategy without MixUp in its row mixes only if somebody sets it.
        return self.mixup != 0 if self.row is None or self.row.mixup else bool(self.mixup)

    @property
    def coupled(self) -> list[str]:
        distance = find_distance(self.distance)
        return [f"distance {self.distance}"] * bool(distance and distance.couples_batch) + super().coupled

    def variant(self, values: dict[str, Any]) -> Self:
        found = super().variant(values)
        if self.row is None or found.mixes:
            return found
        # Views that a policy does not mix are those of the strategy's row without MixUp.
        plain = replace(self.row, mixup=0.0)
        strategy = next((name for name, row in STRATEGIES.items() if row == plain), self.strategy)
        return found.model_copy(update={"strategy": strategy})

    def problems(self) -> list[str]:
        found = [] if self.teacher else ["give the network to match by --teacher"]
        found += self._strategy_problems() + self._distance_problems() + self._tape_problems()
        # A piece as large as the batch is the batch.
        if self.micro_batch and self.micro_batch < self.batch:
            found += [
                f"{name} compares the images of a batch with each other, so micro_batch would change it"
                for name in self.coupled
            ]
        # Refused, not ignored: the teacher's outputs say of each image what it is worth, whatever its class.
        found += [
            f"--{name.replace('_', '-')} {getattr(self, name)} is for training on labels (train, finetune); distill "
            "matches the teacher on all images alike"
            for name in ("sampling", "class_weights")
            if self.moved(name)
        ]
        return found + super().problems()

    def _strategy_problems(self) -> list[str]:
        """A strategy that is unknown, or that other options of the views contradict."""
        row, found = self.row, []
        # Alone: without its row nothing else about the views can be checked.
        if row is None:
            return [str(unknown("strategy", self.strategy, STRATEGIES))]
        if row.fixed and self.mixup:
            found.append(
                f"mixup ({self.mixup}) needs a teacher that gets the mixed images, but the teacher of {self.strategy} "
                "is fixed: its outputs are for each image alone. Omit --mixup, or use a strategy of same/ or ind/"
            )
        if row.fixed and self.augment:
            found.append(
                f"augment changes the views of both networks, but the teacher of {self.strategy} gets a fixed one; "
                "use a strategy of same/ or ind/, or funmatch"
            )
        if row.teacher != "same":
            found += [
                f"{name} changes the view that both share, but in {self.strategy} the teacher gets another; use a "
                "strategy of same/, or funmatch"
                for name, value in (("cutmix", self.cutmix), ("randaugment", self.randaugment))
                if value
            ]
        # Refused, so that the same views have one name in every comparison.
        if row.mixup and not self.mixes_some:
            found.append(f"{self.strategy} is same/ic with MixUp; without MixUp (mixup 0) pass --strategy same/ic")
        if self.crop and self.crop not in row.crops:
            others = [name for name, each in STRATEGIES.items() if self.crop in each.crops]
            found.append(
                f"crop {self.crop} contradicts strategy {self.strategy}, whose student gets {row.crop} crops; "
                f"{self.crop} ones are used in {', '.join(others)}"
            )
        if row.teacher != "ensemble" and self.moved("teacher_crops"):
            found.append(f"teacher_crops belongs to strategy fix/ic_ens, not {self.strategy}")
        return found

    def _distance_problems(self) -> list[str]:
        """A distance that is unknown, or options that it has no use for."""
        distance = find_distance(self.distance)
        if distance is None:
            return [str(unknown("distance", self.distance, DISTANCES))]
        found = []
        if not distance.tempered:
            tempered = ", ".join(name for name, each in DISTANCES.items() if each.tempered)
            found += [
                f"{name} belongs to distances of probabilities ({tempered}), not {self.distance}"
                for name in ("temperature", "t_squared")
                if self.moved(name)
            ]
        if self.task == "multilabel" and not distance.multilabel:
            several = ", ".join(name for name, each in DISTANCES.items() if each.multilabel)
            found.append(f"distance {self.distance} is for one class an image; with --task multilabel use {several}")
        if distance.needs_top_class and self.standardise:
            found.append(
                f"standardise does not change which class is the top one, so it has no effect on distance "
                f"{self.distance}"
            )
        if self.label_weight and self.unlabelled:
            found.append(f"label_weight ({self.label_weight}) needs labels, but unlabelled ignores them")
        # With a share of labels, their cross-entropy is smoothed, whatever the distance.
        if self.label_smoothing and not distance.smooths and not self.label_weight:
            found.append("label_smoothing belongs to --distance hard or to labels (--label-weight); neither is used")
        return found

    def _tape_problems(self) -> list[str]:
        """A tape of outputs that are stored anyway, or of too few for the distance."""
        found, distance = [], find_distance(self.distance)
        if self.tape is None:
            found += [f"{name} belongs to --tape" for name in ("tape_top", "tape_full") if self.moved(name)]
        elif self.teacher_is_fixed:
            found.append(f"the teacher of {self.strategy} is fixed: its outputs are stored anyway. Omit --tape")
        if self.tape is not None and self.out is not None:
            # Whatever removes a run folder would remove the tape of other runs with it.
            places = [Path(each).expanduser().absolute() for each in (self.tape, self.out)]
            if places[0].is_relative_to(places[1]) or places[1].is_relative_to(places[0]):
                found.append(f"tape {self.tape} and out {self.out} must be apart: each is a folder of its own")
        # The rest as one mass, and the shape of an image's logits, are those of one distribution over all classes.
        found += [
            f"{name} is for one class an image; omit it with --task multilabel"
            for name in ("tape_top", "standardise")
            if self.task == "multilabel" and self.moved(name)
        ]
        if self.tape_top is not None and (self.standardise or (distance and distance.needs_all_classes)):
            cause = "standardise" if self.standardise else f"distance {self.distance}"
            found.append(f"{cause} needs all of the teacher's logits, and tape_top keeps some; omit one of them")
        return found


TAUGHT: dict[str, type[Train]] = {"train": Train, "finetune": Finetune, "distill": Distill}
"""The tables of the commands that make runs."""
