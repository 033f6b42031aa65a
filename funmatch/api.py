"""Runs the commands from Python: functions that take plain arguments and return finished runs."""

# Annotations stay text, so that they may name torch's classes, which are not imported.
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from funmatch.commands.python.arguments import given, read_call, run_call, space_words
from funmatch.commands.python.finished import Model, benchmark, embed, evaluate, export, load, predict, select
from funmatch.commands.python.messages import python_words
from funmatch.commands.python.signatures import with_options
from funmatch.commands.verbs import TABLES, run_students
from funmatch.config import SEARCHED, TAUGHT, Distill, Finetune, Head, Train, recipes
from funmatch.errors import InputError, unknown
from funmatch.reports.result import Outcome, Result, Tuned
from funmatch.runtime.time_limit import counted_from_here

__all__ = [
    "Images", "Model", "OnEvent", "Outcome", "Result", "Tuned", "benchmark", "distill", "distill_several", "embed",
    "evaluate", "export", "finetune", "head", "load", "predict", "prepare", "recipe", "select", "study", "train",
    "tune",
]  # fmt: skip

Images: TypeAlias = str | Path | Sequence[str | Path]
"""One or several data sets, named as on the command line."""


OnEvent: TypeAlias = Callable[[str, int, dict[str, Any]], object]
"""Called with event, step and values of each record that a run adds to its `metrics.jsonl`."""


@with_options(Distill, "distill")
def distill(
    data: Images | None = None,
    teacher: Model | Sequence[Model] | None = None,
    student: Model | None = None,
    out: str | Path | None = None,
    *,
    on_event: OnEvent | None = None,
    **options: Any,
) -> Outcome:
    """Trains a student to match the outputs of a teacher, or of several, in a run folder.

    Args:
        data: a folder of images, a name of the catalog, or a source with its prefix, e.g. `tfrecord:…`, `hf:…`; several
            are joined.
        teacher: a run folder, a timm name (with `teacher_weights`), a BiT `.npz`, a module, …, or several of these. A
            module is copied and stays as it is.
        student: any timm name, or a module, of which a copy is trained.
        out: the run folder; the same call resumes the run.
        on_event: called with (event, step, values) of each record that `metrics.jsonl` gets, e.g. ("step", 50,
            {"loss": 0.7, …}), by the main process alone; also in a run that resumes, from there on. What it raises
            ends the run as Ctrl-C does, after a checkpoint, and is raised again.
        **options: any other option of the command, e.g. `steps=3000, student_kwargs={"channels": [16, 32]}`;
            `config="run.toml"` reads a file, which may also hold the arguments above. `distance`, `augment` and
            `optimizer` take functions: see docs/python.md.

    Raises:
        funmatch.InputError: an argument or an input is invalid; the message names it and what to do.
        funmatch.Interrupted: a signal such as Ctrl-C stopped the run, which is saved; a `KeyboardInterrupt`.
        funmatch.TimeLimitReached: the run stopped shortly before `time_limit`, and is saved; an `Interrupted`.

    Examples:
        >>> run = funmatch.distill(
        ...     "fashion-mini", "fashion-mini-teacher", "fashion-mini-student", "runs/first", steps=2, temperature=2.0
        ... )
        >>> run.metrics["step"], run.report.name
        (2, 'report.html')
        >>> run.student()
        Classifier(runs/first/student: 26,888 parameters, 32 × 32 pixels, 10 classes)
    """
    named = {"data": data, "teacher": teacher, "student": student, "out": out}
    return _train("distill", Distill, given(named) | options, on_event)


@with_options(Distill, "distill")
def distill_several(
    data: Images, teacher: str | Sequence[str], students: Sequence[str], out: str | Path, **options: Any
) -> list[Outcome]:
    """Distils several students of the same teacher side by side: views and teacher outputs are computed once.

    Args:
        students: timm names; each run folder is named after its student, inside `out`.
        **options: options of all students, as for `distill`.

    Raises:
        funmatch.InputError: as for `distill`; or a student failed, while the others finished.

    Examples:
        >>> runs = funmatch.distill_several(
        ...     "fashion-mini", "fashion-mini-teacher", ["fashion-mini-student", "test_byobnet"], "runs/both",
        ...     steps=2, side=32,
        ... )
        >>> [run.folder.name for run in runs]
        ['fashion-mini-student', 'test_byobnet']
    """
    if isinstance(students, str) or not students:
        raise InputError(f"students: wanted a list of names, got {students!r}")
    # The first student stands for all while the options are checked.
    named = {"data": data, "teacher": teacher, "student": students[0], "out": out}
    with python_words(Distill), counted_from_here():
        call = read_call("distill", Distill, named | options)
        assert isinstance(call.options, Distill)
        found = run_students(call.options, students, call.sources)
    return [Outcome(each.folder, each.metrics, each.page) for each in found]


@with_options(Train, "train")
def train(
    data: Images | None = None,
    student: Model | None = None,
    out: str | Path | None = None,
    *,
    on_event: OnEvent | None = None,
    **options: Any,
) -> Outcome:
    """Trains a network on labels alone, with the views and the loop of `distill`; takes its options.

    Examples:
        >>> funmatch.train("fashion-mini", "fashion-mini-student", "runs/labels", steps=2).metrics["split"]
        'test'
    """
    return _train("train", Train, given({"data": data, "student": student, "out": out}) | options, on_event)


@with_options(Finetune, "finetune")
def finetune(
    data: Images | None = None,
    model: Model | None = None,
    out: str | Path | None = None,
    *,
    on_event: OnEvent | None = None,
    **options: Any,
) -> Outcome:
    """Trains a network with pretrained weights on labels by BiT-HyperRule; takes the options of `train`.

    Examples:
        >>> run = funmatch.finetune("fashion-mini", "fashion-mini-teacher", "runs/tuned", steps=2, batch=16, side=32)
        >>> run.metrics["step"]
        2
    """
    return _train("finetune", Finetune, given({"data": data, "model": model, "out": out}) | options, on_event)


@with_options(Head, "head")
def head(
    data: Images | None = None, model: Model | None = None, out: str | Path | None = None, **options: Any
) -> Result:
    """Fits a head to the features of a frozen backbone, which are computed once; the result is a model.

    Args:
        data: images with labels; as for `distill`.
        model: the backbone: any model, with a head, which is dropped, or without one.
        out: the folder of the new model; the same call goes on where it was stopped.
        **options: `kind="linear"`, `"knn"` or `"means"`, `C=[0.01, 0.1]`, …

    Returns:
        the folder, which stands for the model as an argument of the other functions, and the metrics: `top1`, `tried`,
        `chosen`, `kind`, …

    Raises:
        funmatch.InputError: an argument or an input is invalid; the message names it and what to do.

    Examples:
        >>> found = funmatch.head("fashion-mini", "fashion-mini-teacher", "runs/head", C=[0.01, 0.1])
        >>> found.metrics["kind"], sorted(row["value"] for row in found.metrics["tried"])
        ('linear', [0.01, 0.1])
    """
    return run_call("head", Head, given({"data": data, "model": model, "out": out}) | options)


@with_options(Distill, "distill")
def recipe(name: str, *, on_event: OnEvent | None = None, **options: Any) -> Outcome:
    """Runs a published recipe, such as `pet37-fast`; options override those of the recipe.

    Examples:
        >>> run = funmatch.recipe(
        ...     "pet37-fast", data="fashion-mini", teacher="fashion-mini-teacher", student="fashion-mini-student",
        ...     out="runs/recipe", steps=2, side=32, resize=None, eval_resize=None, dry_run=True,
        ... )
        >>> run.metrics["options"]["steps"]
        {'value': 2, 'source': 'Python'}
    """
    verb = recipes.find(f"{name}").verb
    return _train(verb, TAUGHT[verb], options | {"recipe": name}, on_event)


@with_options(TABLES["prepare"], "prepare")
def prepare(data: Images | None = None, **options: Any) -> dict[str, Any]:
    """Downloads, checks and decodes images, or writes them as shards.

    Returns:
        `splits`, `classes`, `kinds`, `leaks`, `unreadable`, …, and for shards `shards`, their paths.

    Examples:
        >>> funmatch.prepare("fashion-mini")["splits"]["val"]
        {'pictures': 500, 'labelled': True, 'classes': 10}
    """
    return run_call("prepare", TABLES["prepare"], given({"data": data}) | options).to_json()


@with_options(SEARCHED["distill"], "tune distill")
def tune(
    what: str, out: str | Path | None = None, *, space: Mapping[str, Any] | Sequence[str] = (), **options: Any
) -> Tuned:
    """Searches options of a command (train, finetune, distill) or of a recipe; selects by validation only.

    Args:
        what: the command, or the name of a recipe.
        out: the folder of the search; the same call resumes it, or shares the work from another process.
        space: values of each option, as on the command line: `{"lr": "log:1e-5..3e-3", "temperature": [1, 2, 5]}`.
        **options: of the search (`trials=20, executions=2, sampler="tpe", …`) and of the runs (`data`, `teacher`, …).

    Raises:
        funmatch.InputError: an argument or an input is invalid; the message names it and what to do.
        funmatch.errors.WorkFailed: all trials failed.

    Examples:
        >>> search = funmatch.tune(
        ...     "train", "runs/search", space={"lr": [1e-3, 3e-3]}, trials=1, data="fashion-mini",
        ...     student="fashion-mini-student", steps=2,
        ... )
        >>> sorted(search.knobs)
        ['lr']
    """
    if what not in SEARCHED and what not in recipes.RECIPES:
        raise unknown("command or recipe", f"{what}", [*SEARCHED, *recipes.RECIPES])
    named = {"out": out, "space": space_words(space), "recipe": None if what in SEARCHED else what}
    verb = what if what in SEARCHED else recipes.RECIPES[what].verb
    found = run_call("tune", SEARCHED[verb], options | given(named), subject=verb)
    return Tuned(found.folder, found.metrics, found.page)


@with_options(TABLES["study"], "study")
def study(name: str | Path | None = None, out: str | Path | None = None, **options: Any) -> dict[str, Any]:
    """Runs a table of runs with several seeds, and plots their results.

    Args:
        name: a built-in study (consistency, patience, …), or a study file (.toml).
        out: its folder; the same call resumes it and skips finished runs.

    Returns:
        `study`, `runs`, `finished`, `failed`, `seconds`, `report`, `table`.

    Raises:
        funmatch.InputError: all problems of the file.
        funmatch.errors.WorkFailed: runs failed.

    Examples:
        >>> sorted(funmatch.study())[:2]
        ['consistency', 'features']
    """
    return run_call("study", TABLES["study"], given({"name": name, "out": out}) | options).to_json()


def _train(verb: str, table: type[Train], arguments: Mapping[str, Any], on_event: OnEvent | None) -> Outcome:
    if on_event is not None and not callable(on_event):
        raise InputError(f"on_event: wanted a function of (event, step, values), got {type(on_event).__name__}")
    found = run_call(verb, table, arguments, objects=given({"on_event": on_event}))
    return Outcome(found.folder, found.metrics, found.page)
