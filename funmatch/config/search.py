"""The tables of tune and plan: options of a search, or of a forecast, beside those of the runs."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from funmatch.config.distill import Distill
from funmatch.config.metadata import Changes, Group, OnResume, Opt
from funmatch.config.options import Options, like
from funmatch.config.train import Finetune, Train
from funmatch.config.values import Names

STUDENT, PLACE = Changes.STUDENT, Changes.PLACE
TRIALS = 20
"""Trials of a search that is not a grid."""
PICTURES = (".png", ".svg")
"""Endings of files that `plan --plot` writes."""


class Search(Options):
    """Search options of train, finetune, distill or a recipe; trials are chosen by validation only."""

    verbs: ClassVar[str] = "Science"
    examples: ClassVar[tuple[str, ...]] = (
        "funmatch tune distill --data ~/images --teacher runs/teacher --student resnet18 --epochs 100 "
        "--space lr=log:1e-4..1e-2 temperature=1,2,5 --out runs/search",
        "funmatch tune pet37-fast",
    )

    # Again here, for its own help: the folder is the search's, and its trials get folders inside.
    out: Annotated[Path, like(Train, "out")]
    """Folder of the search, with a run folder for each trial. The same command again resumes; the same command in
    another process, or on another machine that shares the folder, helps."""
    # Words as on the command line, not a mapping; `funmatch.tune` writes one out.
    space: Annotated[
        tuple[str, ...],
        Opt(group=Group.SEARCH, changes=STUDENT, searchable=False, resume=OnResume.UNCOMPARED, essential=True,
            usual="the recipe's", metavar="OPTION=VALUES …"),
    ] = ()  # fmt: skip
    """Options to search and their values: lr=log:1e-5..3e-3 drop_rate=0..0.5 temperature=1,2,5,10. It replaces the
    recipe's values of the same options."""
    # Neither the space, which is recorded apart, nor the number of trials, which may grow, is compared on resuming.
    trials: Annotated[
        int | None,
        Opt(group=Group.SEARCH, changes=STUDENT, searchable=False, resume=OnResume.UNCOMPARED, essential=True,
            at_least=1, at_most=10**6, usual=f"{TRIALS}, or all of a grid", extends=True),
    ] = None  # fmt: skip
    """Number of configurations to try."""
    executions: Annotated[int, Opt(group=Group.SEARCH, changes=STUDENT, searchable=False, at_least=1, at_most=1000)] = 1
    """Runs of each configuration, with the seeds --seed, --seed + 1, …; their mean counts."""
    sampler: Annotated[
        Literal["random", "grid", "tpe"], Opt(group=Group.SEARCH, changes=STUDENT, searchable=False, essential=True)
    ] = "random"
    """How configurations are chosen. random. grid: every combination of listed values once, in random order. tpe: learn
    from finished trials (with several processes, the order in which they finish then matters)."""
    sampler_seed: Annotated[
        int, Opt(group=Group.SEARCH, changes=STUDENT, searchable=False, at_least=0, at_most=2**62)
    ] = 0
    """Seed of the sampler."""
    # A choice of the search, compared on resuming: trials that other rules would have ended are in its results.
    pruner: Annotated[
        Literal["none", "asha", "hyperband"], Opt(group=Group.SEARCH, changes=STUDENT, searchable=False)
    ] = "none"
    """Whether trials that fall behind are stopped early. In distillation the leader after a short time is often not the
    leader after a long one, so none is the default."""
    storage: Annotated[
        str | None, Opt(group=Group.SEARCH, changes=PLACE, usual="journal.log in --out", metavar="PATH|URL")
    ] = None
    """Where Optuna stores the search: a journal file, or the URL of a database (sqlite:///study.db,
    postgresql+psycopg://…)."""
    study_name: Annotated[
        str | None, Opt(group=Group.SEARCH, changes=PLACE, usual="the name of the folder --out", metavar="NAME")
    ] = None
    """Name of the search in the storage."""
    tapes: Annotated[bool, Opt(group=Group.SEARCH, changes=PLACE)] = True
    """Let trials share the teacher's logits (`distill --tape`), where the searched options do not change its views."""


# `Search` first: its `out` and heading replace those of the command.
class SearchTrain(Search, Train):
    """Search options of `funmatch train`; trials are chosen by validation only."""


class SearchFinetune(Search, Finetune):
    """Search options of `funmatch finetune`; trials are chosen by validation only."""


class SearchDistill(Search, Distill):
    """Search options of `funmatch distill`; trials are chosen by validation only."""


SEARCHED: dict[str, type[Search]] = {"train": SearchTrain, "finetune": SearchFinetune, "distill": SearchDistill}
"""The tables of a search among the runs of a command."""


class Plan(Options):
    """Forecast the time, memory and disk space that a run takes on this machine."""

    verbs: ClassVar[str] = "Science"
    examples: ClassVar[tuple[str, ...]] = (
        "funmatch plan distill --data ~/images --teacher runs/teacher --student resnet18 --epochs 99 --out runs/first",
        "funmatch plan pet37-fast --plot pet37-fast.png",
    )

    # Excluded from records, which are of runs: a plan makes none.
    plot: Annotated[
        Path | None,
        Opt(group=Group.OUTPUT, changes=PLACE, study=False, essential=True, usual="none", metavar="FILE|FOLDER"),
        Field(exclude=True),
    ] = None
    """Also draw the run before it begins: learning rate and weight decay, MixUp's weights, areas and aspects of the
    crops, and the first views. A .png or .svg file, or a folder for a file of each."""

    def problems(self) -> list[str]:
        found = []
        place = self.plot.expanduser() if self.plot else Path()
        # A name without an ending is a folder to be made; one with a dot, as v1.2, must be there to be taken for one.
        if not place.is_dir() and (place.suffix.lower() not in PICTURES if place.suffix else place.exists()):
            found.append(f"--plot {self.plot} is neither a .png nor a .svg file; name one of these, or a folder")
        if self.plot and getattr(self, "dry_run", False):
            found.append("--plot does not go with --dry-run, which writes nothing; omit one of them")
        return found + super().problems()


# `Plan` first: its sentence and examples are shown.
class PlanTrain(Plan, Train):
    """Forecast the time, memory and disk space that `funmatch train` takes on this machine."""


class PlanFinetune(Plan, Finetune):
    """Forecast the time, memory and disk space that `funmatch finetune` takes on this machine."""


class PlanDistill(Plan, Distill):
    """Forecast the time, memory and disk space that `funmatch distill` takes on this machine."""

    examples: ClassVar[tuple[str, ...]] = (
        "funmatch plan distill --data ~/images --teacher runs/teacher --student resnet18 --epochs 99 --out runs/first",
        "funmatch plan distill --data ~/images --teachers runs/a runs/b --student resnet18 --epochs 99 --out runs/c",
    )

    # Not required: candidates stand for it, and are checked as teachers.
    teacher: Annotated[Names, like(Distill, "teacher")] = ()
    teachers: Annotated[
        Names,
        Opt(group=Group.TEACHER, changes=PLACE, study=False, essential=True, usual="none", metavar="MODEL …",
            replaces=("teacher", *Distill.opt("teacher").replaces)),
        Field(exclude=True),
    ] = ()  # fmt: skip
    """Rank these candidate teachers instead, from their answers alone: accuracy, entropy, spread of the mean answer
    over the run's views, cost of an image. Options of teachers are for each of them."""
    teachers_views: Annotated[
        int, Opt(group=Group.TEACHER, changes=PLACE, study=False, at_least=20, at_most=10**9), Field(exclude=True)
    ] = 2560
    """Training views that each of --teachers is shown."""

    @model_validator(mode="before")
    @classmethod
    def _load_candidates(cls, values: Any) -> Any:
        """Has the candidates loaded as the teachers of a run are, and their options checked."""
        if not isinstance(values, dict) or values.get("teacher"):
            return values
        return {**values, "teacher": values.get("teachers") or ()}

    def problems(self) -> list[str]:
        found = []
        if self.teachers and self.teacher != self.teachers:
            found.append("--teachers are the candidates for --teacher; leave out --teacher")
        if self.teachers and self.teacher_is_fixed:
            found.append(f"--teachers ranks by the views that teachers see, which --strategy {self.strategy} fixes")
        if self.teachers and not self.matches_logits:
            found.append("--teachers ranks by probabilities, which --match features does not use")
        return found + super().problems()


PLANNED: dict[str, type[Plan]] = {"train": PlanTrain, "finetune": PlanFinetune, "distill": PlanDistill}
"""The tables of plan, by the command that is planned."""
