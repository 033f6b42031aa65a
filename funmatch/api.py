"""The verbs for Python: plain arguments in, a finished run out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union

from funmatch.commands.verbs import run_students, run_verb
from funmatch.config import SEARCHED, Distill, Evaluate, Finetune, Prepare, Study, Train, recipes
from funmatch.errors import InputError, unknown
from funmatch.reports.result import Result

if TYPE_CHECKING:  # torch takes seconds to import, and most words on a command line need none
    from torch import nn

    from funmatch.models.classifier import Classifier


class _Finished(Result):
    """A result that has a folder and a page, with the names that its parts had first."""

    folder: Path
    page: Path

    @property
    def figures(self) -> dict[str, Any]:
        """The metrics."""
        return self.metrics

    @property
    def report(self) -> Path:
        """The HTML page."""
        return self.page


class Outcome(_Finished):
    """A finished run.

    Attributes:
        folder: the run folder.
        metrics: what `result.json` holds: `top1`, `top5`, `agreement`, `kl`, `ece`, `step`, `split`, `seconds`, …;
            None stands for a value that could not be computed. Also called `figures`.
        page: the HTML page. Also called `report`.
    """

    @property
    def student(self) -> Path:
        """The folder of the student; `timm.create_model(f"local-dir:{student}", pretrained=True)` loads it."""
        return self.folder / "student"

    @property
    def top1(self) -> float | None:
        """Share of the split's images whose first class is right, in [0, 1]."""
        return self.metrics["top1"]

    @property
    def agreement(self) -> float | None:
        """Share of the split's images on which the student's first class is the teacher's, in [0, 1]."""
        return self.metrics["agreement"]

    @property
    def kl(self) -> float | None:
        """KL divergence of the student from the teacher at temperature 1, in nats, the mean over the split."""
        return self.metrics["kl"]


class Tuned(_Finished):
    """A finished search.

    Attributes:
        folder: the folder of the search.
        metrics: what its `result.json` holds: `trials`, `best`, `value`, `knobs`, `best_run`, `importance`, `test`,
            `seen`, `command`, … Also called `figures`.
        page: the HTML page. Also called `report`.
    """

    @property
    def knobs(self) -> dict[str, Any]:
        """The values of the best trial."""
        return self.metrics["knobs"]

    @property
    def best_run(self) -> Path:
        """The run folder of the best trial's first execution."""
        return Path(self.metrics["best_run"])


Images: TypeAlias = str | Path | Sequence[str | Path]
"""A data set as the command line takes it, or several."""


Model: TypeAlias = Union[str, Path, "nn.Module"]
"""A model as the command line names it, or a module: a `Classifier`, one of timm's, or any that takes (n, 3, side,
side) in [0, 1] and gives (n, classes)."""


def distill_several(
    data: Images, teacher: str | Sequence[str], students: Sequence[str], out: str | Path, **knobs: Any
) -> list[Outcome]:
    """Teaches several students of the same teacher beside each other: views are made, and the teacher is asked, once.

    Args:
        students: timm names, each taught in a run folder of its name within `out`.
        **knobs: of all, as `distill` takes them.

    Raises:
        funmatch.InputError: as `distill` does; or a student came to no end, while the others did.
    """
    config = Distill.checked(data=data, teacher=teacher, student=students[0], out=Path(out), **knobs)
    return [Outcome(each.folder, each.metrics, each.page) for each in run_students(config, students)]


def distill(data: Images, teacher: Model | Sequence[Model], student: Model, out: str | Path, **knobs: Any) -> Outcome:
    """Teaches a student to be the same function as a teacher, or as several, in a run folder.

    Args:
        data: a folder of images, a name of the catalog, or a source with its prefix, e.g. `tfrecord:…`, `hf:…`; several
            are joined.
        teacher: a run folder, a timm name (with `teacher_weights`), a BiT `.npz`, a module, …, or several of these. A
            module is copied and stays as it is.
        student: any timm name, or a module, whose copy is taught.
        out: the run folder; the same call again goes on where the run stands.
        **knobs: any other of `funmatch.config.Distill`, e.g. `steps=3000, temperature=2.0, student_kwargs={...}`.

    Raises:
        funmatch.InputError: what was wanted, what came, and what to do.
    """
    teachers = list(teacher) if isinstance(teacher, list | tuple) else [teacher]
    given: dict[str, nn.Module] = {}
    names = tuple(_named(each, given) for each in teachers)  # pyrefly: ignore[bad-argument-type]
    config = Distill.checked(data=data, teacher=names, student=_named(student, given), out=Path(out), **knobs)
    return _run("distill", config, given)


def train(data: Images, student: Model, out: str | Path, **knobs: Any) -> Outcome:
    """Trains a network on labels alone, with the views and the loop of `distill`; knobs of `funmatch.config.Train`."""
    given: dict[str, nn.Module] = {}
    config = Train.checked(data=data, student=_named(student, given), out=Path(out), **knobs)
    return _run("train", config, given)


def finetune(data: Images, model: Model, out: str | Path, **knobs: Any) -> Outcome:
    """Teaches a network with pretrained weights the labels, by BiT-HyperRule; knobs of `funmatch.config.Finetune`."""
    given: dict[str, nn.Module] = {}
    config = Finetune.checked(data=data, student=_named(model, given), out=Path(out), **knobs)
    return _run("finetune", config, given)


def recipe(name: str, **knobs: Any) -> Outcome:
    """Carries out a published recipe, such as `pet37-fast`; knobs of its verb's table count before its own."""
    chosen = recipes.find(name)
    given: dict[str, nn.Module] = {}
    _name_all(knobs, given)
    return _run(chosen.verb, chosen.table(**knobs), given)


def prepare(data: Images, **knobs: Any) -> dict[str, Any]:
    """Fetches, checks and decodes images, or writes them as shards; knobs of `funmatch.config.Prepare`.

    Returns:
        `splits`, `classes`, `kinds`, `leaks`, `unreadable`, …, and of shards `shards`, their paths.
    """
    return run_verb("prepare", Prepare.checked(data=data, **knobs)).to_json()


def tune(what: str, out: str | Path, *, space: Mapping[str, Any] | Sequence[str] = (), **knobs: Any) -> Tuned:
    """Searches knobs of a verb (train, finetune, distill) or of a recipe, chosen by validation alone.

    Args:
        what: the verb, or the name of a recipe.
        out: the folder of the study; the same call again goes on, in another process it helps.
        space: knob to values, as the command line has them: `{"lr": "log:1e-5..3e-3", "temperature": [1, 2, 5]}`.
        **knobs: of the search (`trials=20, executions=2, sampler="tpe", …`) and of the runs (`data`, `teacher`, …).

    Raises:
        funmatch.InputError: what was wanted, what came, and what to do.
        funmatch.errors.WorkFailed: all trials failed.
    """
    if what not in SEARCHED and what not in recipes.RECIPES:
        raise unknown("verb or recipe", what, [*SEARCHED, *recipes.RECIPES])
    if isinstance(space, Mapping):
        space = [f"{name}={_listed(values)}" for name, values in space.items()]
    given: dict[str, nn.Module] = {}
    _name_all(knobs, given)
    own = {} if what in SEARCHED else recipes.find(what).over(knobs)
    verb = what if what in SEARCHED else recipes.find(what).verb
    config = SEARCHED[verb].checked(**own | knobs | {"out": Path(out), "space": tuple(space)})
    found = run_verb("tune", config, given)
    return Tuned(found.folder, found.metrics, found.page)


def study(name: str | Path, out: str | Path | None = None, **knobs: Any) -> dict[str, Any]:
    """Carries out a table of runs with several seeds, and draws what came of it; knobs of `funmatch.config.Study`.

    Args:
        name: of a study that comes with the package (consistency, patience, …), or a file of your own (.toml).
        out: its folder; the same call again goes on and repeats no finished run.
        **knobs: `seeds=(0, 1, 2), jobs=2, only=("same/*",), set=("epochs=10",)`.

    Returns:
        `study`, `runs`, `finished`, `failed`, `seconds`, `report`, `table`.

    Raises:
        funmatch.InputError: every problem of the file.
        funmatch.errors.WorkFailed: runs failed.
    """
    return run_verb("study", Study.checked(name=str(name), out=Path(out) if out else None, **knobs)).to_json()


def _listed(values: Any) -> str:
    """The values of a knob as the command line has them."""
    return ",".join(map(str, values)) if isinstance(values, list | tuple) else str(values)


def evaluate(model: Model, **knobs: Any) -> dict[str, Any]:
    """Judges a run or a model on a split; knobs of `funmatch.config.Evaluate`.

    Returns:
        `top1`, `top5`, `agreement`, `kl`, `ece`, `split`, `pictures`, `parameters`, `step`, `run`, …
    """
    given: dict[str, nn.Module] = {}
    return run_verb("evaluate", Evaluate.checked(model=_named(model, given), **knobs), given).to_json()


def load(model: Model, **knobs: Any) -> Classifier:
    """The classifier that a name stands for; arguments of `funmatch.models.load.load`."""
    from funmatch.models.load import load as loaded

    knobs.setdefault("pretrained", True)
    return loaded(str(model) if isinstance(model, str | Path) else model, **knobs)


def _name_all(knobs: dict[str, Any], given: dict[str, nn.Module]) -> None:
    """Puts names in the place of the models among some knobs."""
    for knob in knobs.keys() & {"teacher", "student"}:
        several = knobs[knob] if isinstance(knobs[knob], list | tuple) else [knobs[knob]]
        named = tuple(_named(each, given) for each in several)
        knobs[knob] = named if knob == "teacher" else named[0]


def _named(model: Model, given: dict[str, nn.Module]) -> str:
    """The name of a model; that of a module is made up, and `given` holds the module by it."""
    if isinstance(model, str | Path):
        return str(model)
    if not callable(getattr(model, "state_dict", None)):
        raise InputError(f"a model is a name or a torch.nn.Module, got {type(model).__name__}")
    name = f"python:{type(model).__name__}"
    if name in given and given[name] is not model:
        name += f"-{len(given)}"
    given[name] = model
    return name


def _run(verb: str, config: Train, given: dict[str, nn.Module]) -> Outcome:
    found = run_verb(verb, config, given)
    return Outcome(found.folder, found.metrics, found.page)
