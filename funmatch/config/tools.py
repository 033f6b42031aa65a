"""The tables of the commands around runs: demo, report, study, tape, import, models, recipes."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from funmatch.config.data import Images
from funmatch.config.finished.model import FinishedModel
from funmatch.config.loop import Loop
from funmatch.config.metadata import Changes, Group, Opt, Refers
from funmatch.config.options import Machine, Options, like
from funmatch.config.teaching import ByText
from funmatch.config.train import Train
from funmatch.config.values import Duration, Names, Pairs, Place, duration_problems

PLACE, STUDENT = Changes.PLACE, Changes.STUDENT


class Report(Options):
    """Write an HTML page about one run or several: curves, metrics, configuration and views."""

    verbs: ClassVar[str] = "Science"
    examples: ClassVar[tuple[str, ...]] = ("funmatch report runs/first runs/second --out compared.html",)

    runs: Annotated[
        tuple[Path, ...],
        Opt(group=Group.OUTPUT, changes=PLACE, positional=True, essential=True, metavar="RUN …"),
    ]
    """Run folders."""
    out: Annotated[
        Path | None,
        Opt(group=Group.OUTPUT, changes=PLACE, essential=True,
            usual="report.html in the run's folder; of several runs comparison.html here"),
    ] = None  # fmt: skip
    """File for the page."""
    # A view is a function of (seed, step), so any step can be drawn, also one that the run has not reached.
    view_step: Annotated[
        int | None,
        Opt(group=Group.OUTPUT, changes=PLACE, at_least=0, at_most=10**12, essential=True,
            usual="0, if the data set was opened on this machine before"),
    ] = None  # fmt: skip
    """Step whose views are shown; the data set that the run names is then opened, and downloaded if need be."""

    def problems(self) -> list[str]:
        # An empty list is a value too: a file or Python may set one, though `runs` is required.
        return ([] if self.runs else ["give at least one run folder"]) + super().problems()


class Replay(Options):
    """Take a step of a run again, and show where its loss or gradients are not finite."""

    verbs: ClassVar[str] = "Science"
    examples: ClassVar[tuple[str, ...]] = ("funmatch replay runs/first --step 1200",)

    folder: Annotated[
        Path, Opt(group=Group.OUTPUT, changes=PLACE, positional=True, essential=True, refers=Refers.FILE, metavar="RUN")
    ]
    """Folder of the run, which is not changed."""
    step: Annotated[
        int | None,
        Opt(group=Group.OUTPUT, changes=PLACE, at_least=1, at_most=10**12, essential=True,
            usual="the one after the newest checkpoint"),
    ] = None  # fmt: skip
    """Number of the step. It is reached from the newest checkpoint before it."""


class Demo(Machine):
    """See it work in minutes: a small student learns from labels, then from a teacher."""

    verbs: ClassVar[str] = "Start"
    examples: ClassVar[tuple[str, ...]] = ("funmatch demo", "funmatch demo --steps 500")

    # Replaces nothing: there are no epochs here, and an option must not name one that its table lacks.
    steps: Annotated[int, like(Train, "steps", replaces=())] = 7000
    """Length of each of the two runs in steps (updates of the weights)."""
    seed: Annotated[int, like(Train, "seed", essential=True)] = 0
    """Seed of the student's first weights and of every random choice."""
    # None, since the name holds steps and seed: a demo with others must not meet the runs of this one.
    out: Annotated[Path | None, like(Train, "out", usual="runs/demo-STEPS-steps-seed-SEED")] = None
    """Folder for the two runs and their report."""


class Study(Options):
    """Carry out a table of runs with several seeds, and draw its figures."""

    verbs: ClassVar[str] = "Science"
    examples: ClassVar[tuple[str, ...]] = (
        "funmatch study consistency --jobs 2",
        "funmatch study mine.toml --set epochs=10",
    )

    name: Annotated[
        str, Opt(group=Group.STUDY, changes=STUDENT, positional=True, essential=True, usual="list all", metavar="STUDY")
    ] = ""
    """A built-in study (consistency, patience, …), a file of your own (.toml), or the folder of one."""
    out: Annotated[Path | None, Opt(group=Group.OUTPUT, changes=PLACE, essential=True, usual="studies/NAME")] = None
    """Folder of the study. The same command again resumes, and repeats no finished run."""
    # Empty, since the file has seeds; each run may have its own.
    seeds: Annotated[
        tuple[int, ...], Opt(group=Group.STUDY, changes=STUDENT, at_least=0, essential=True, usual="those of the file")
    ] = ()
    """Seeds of each run."""
    # One on an accelerator: several runs at once would share its memory.
    jobs: Annotated[
        int | None,
        Opt(group=Group.MACHINE, changes=PLACE, at_least=1, aliases=("-j",), essential=True,
            usual="one per core, or one where there is an accelerator"),
    ] = None  # fmt: skip
    """Runs at a time."""
    time_limit: Annotated[Duration, like(Loop, "time_limit", group=Group.MACHINE)] = None
    """Time from the start of the program after which all runs have saved and stopped: 8h30m, 510m, 30600 (seconds) or
    1-06:00:00. The same command resumes the study."""
    only: Annotated[
        tuple[str, ...], Opt(group=Group.STUDY, changes=PLACE, usual="all runs", metavar="NAME …", essential=True)
    ] = ()
    """Carry out only the runs with these names; * and ? stand for anything."""
    # From here on `set` in this class's body is the option, not Python's type.
    set: Annotated[
        tuple[str, ...],
        Opt(group=Group.STUDY, changes=STUDENT, usual="none", metavar="OPTION=VALUE …", essential=True),
    ] = ()
    """Options that override the file's for all runs, e.g. epochs=10; after a run's name and a dot, for that run."""
    tapes: Annotated[bool, Opt(group=Group.STUDY, changes=PLACE)] = True
    """Let runs that show the same teacher the same views share its logits (`distill --tape`)."""
    draw: Annotated[bool, Opt(group=Group.OUTPUT, changes=PLACE)] = False
    """Only redraw the page from results.jsonl."""

    def problems(self) -> list[str]:
        return duration_problems("time_limit", self.time_limit) + super().problems()


class Config(Options):
    """Write a configuration file: a template with every option of a command."""

    verbs: ClassVar[str] = "Start"
    examples: ClassVar[tuple[str, ...]] = ("funmatch config distill > run.toml",)

    # Names, since `tune distill` and `plan train` are two words.
    command: Annotated[
        Names, Opt(group=Group.OUTPUT, changes=PLACE, positional=True, essential=True, metavar="COMMAND")
    ] = ("distill",)
    """Command whose options the file shall hold, e.g. finetune, or tune distill."""

    def problems(self) -> list[str]:
        return ([] if self.command else ["give the command whose options the file shall hold"]) + super().problems()


class Tape(Options):
    """Show a teacher tape: whose logits it holds, which steps, and whether every row is intact."""

    verbs: ClassVar[str] = "Science"
    examples: ClassVar[tuple[str, ...]] = ("funmatch tape runs/tape --recompute 3",)

    folder: Annotated[Path, Opt(group=Group.OUTPUT, changes=PLACE, positional=True, essential=True, metavar="FOLDER")]
    """Folder that was given to `distill --tape`."""
    # 0, since it needs the teacher and the images; without it a tape can be inspected anywhere.
    recompute: Annotated[int, Opt(group=Group.OUTPUT, changes=PLACE, at_least=0, essential=True)] = 0
    """Run the teacher again for this many of the steps, and compare."""


class Import(ByText):
    """Convert a checkpoint (Keras SavedModel or file, BiT .npz, any named model) into a folder that timm loads."""

    verbs: ClassVar[str] = "Models"
    headings: ClassVar[dict[Group, str]] = {Group.STUDENT: "Model"}
    examples: ClassVar[tuple[str, ...]] = (
        "funmatch import savedmodel:teacher --out models/teacher --class-file classes.txt",
    )

    model: Annotated[
        str,
        Opt(
            group=Group.STUDENT, changes=STUDENT, positional=True, essential=True, refers=Refers.MODEL, metavar="MODEL"
        ),
    ]
    """Folder of a SavedModel, file of Keras, or any model that `distill --teacher` takes."""
    out: Annotated[Path, like(Train, "out")]
    """Folder to write: model.safetensors and config.json in timm's layout."""
    weights: Annotated[
        Path | None,
        Opt(group=Group.STUDENT, changes=STUDENT, refers=Refers.WEIGHTS, usual="none", essential=True),
    ] = None
    """File with weights (.safetensors, .pt or BiT .npz), for a model given by its timm name."""
    model_kwargs: Annotated[Pairs, like(FinishedModel, "model_kwargs")] = ()
    """Arguments for timm's constructor; for a BiT .npz also pool_padding=zeros or -inf, the padding of its first
    max-pool; for a file with several weights also weights_key=KEY, e.g. state_dict_ema."""
    classes_from: Annotated[str | None, like(FinishedModel, "classes_from")] = None
    """For a network of image and text (clip:MODEL), the classes that it tells apart: a text file with a name a line, or
    a JSON file with a list of names, or {"name": ["description", …], …}. Without it, its outputs are embeddings."""
    templates: Annotated[str | None, like(FinishedModel, "templates")] = None
    """Sentences in which a class name is put: openai-80, short, none, or a text file with one a line, {} where the name
    stands."""
    inputs: Annotated[
        Literal["auto", "0..1", "-1..1", "imagenet"], Opt(group=Group.STUDENT, changes=STUDENT, essential=True)
    ] = "auto"
    """Range or normalisation of the images the network was trained on, where the checkpoint does not say. auto: -1..1
    for BiT files; for SavedModels and files of Keras what their graph does to images (hub modules: -1..1), or 0..1
    where it does nothing; else timm's."""
    # In the group of the model: here it is a fact about a network, and not a choice about views.
    side: Annotated[
        int | None,
        like(Train, "side", group=Group.STUDENT, usual="from the checkpoint's name, or timm's", essential=True),
    ] = None
    """Image size the network was trained on, in pixels."""
    crop_fraction: Annotated[
        float | None, Opt(group=Group.STUDENT, changes=STUDENT, above=0, at_most=1, usual="timm's")
    ] = None
    """Share of the shorter side that its evaluation view keeps, e.g. 0.8 for 128 of 160 pixels."""
    class_file: Annotated[Place, like(Images, "class_file", usual="none")] = None
    """Text file with one class name per line, or its address."""

    def problems(self) -> list[str]:
        found = []
        # An empty path is the current folder, whose import would fail with a message about a folder that nobody named.
        if self.model == "savedmodel:":
            found.append("model is empty; name a folder of a SavedModel, or any model")
        return found + super().problems()


class Models(Options):
    """List models that can be named, with parameters, GFLOP and source."""

    verbs: ClassVar[str] = "Models"
    headings: ClassVar[dict[Group, str]] = {Group.STUDENT: "Model"}
    examples: ClassVar[tuple[str, ...]] = ("funmatch models 'resnet*'",)

    pattern: Annotated[
        str,
        Opt(group=Group.STUDENT, changes=PLACE, positional=True, essential=True, metavar="PATTERN",
            usual="funmatch's own models, BiT and the paper's files"),
    ] = ""  # fmt: skip
    """Part of a name, or a pattern with * and ?."""
    side: Annotated[int | None, like(Train, "side", group=Group.STUDENT, usual="each model's own")] = None
    """Image size for which GFLOP are counted, in pixels."""
    figures: Annotated[bool, Opt(group=Group.STUDENT, changes=PLACE)] = False
    """Count the parameters and GFLOP of each model, also where many match; it takes about a second each."""


class Recipes(Machine):
    """List the published recipes, or show one: command, options, published accuracy, expected hours."""

    verbs: ClassVar[str] = "Science"
    examples: ClassVar[tuple[str, ...]] = ("funmatch recipes 'pet37*'", "funmatch recipes pet37-fast")

    name: Annotated[
        str,
        Opt(group=Group.OUTPUT, changes=PLACE, positional=True, essential=True, usual="all", metavar="RECIPE"),
    ] = ""
    """A recipe, or a pattern with * and ?."""
    # On by default, as hours are what a recipe is looked up for; lists measure nothing.
    measure: Annotated[bool, Opt(group=Group.MACHINE, changes=PLACE, essential=True)] = True
    """Measure this machine, for a minute at most, to estimate the hours that a recipe takes on it."""
