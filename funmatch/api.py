"""The verbs for Python: plain arguments in, a finished run out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from funmatch.config import Distill, Evaluate, Train


@dataclass(frozen=True)
class Outcome:
    """A finished run.

    Attributes:
        folder: of the run; `folder / "student"` loads with `timm.create_model("local-dir:…", pretrained=True)`.
        figures: what `result.json` holds: `top1`, `top5`, `agreement`, `kl`, `ece`, `step`, `split`, `seconds`, …;
            None where a figure could not be known.
        report: the HTML page.
    """

    folder: Path
    figures: dict[str, Any]
    report: Path

    @property
    def top1(self) -> float | None:
        """Share of the split's pictures whose first class is right, in [0, 1]."""
        return self.figures["top1"]

    @property
    def agreement(self) -> float | None:
        """Share of the split's pictures on which the student's first class is the teacher's, in [0, 1]."""
        return self.figures["agreement"]


Pictures = str | Path | Sequence[str | Path]
"""A data set as the command line takes it, or several."""


def distill(data: Pictures, teacher: str | Path, student: str, out: str | Path, **knobs: Any) -> Outcome:
    """Teaches a student to be the same function as a teacher, in a run folder.

    Args:
        data: a folder of pictures, a name of the catalog, or `tfrecord:…`, `wds:…`, `hf:…`; several are joined.
        teacher: a run folder, a timm name (with `teacher_weights`), or `fashion-mini-teacher`.
        student: any timm name, or `fashion-mini-student`.
        out: the run folder; the same call again goes on where the run stands.
        **knobs: any other of `funmatch.config.Distill`, e.g. `steps=3000, temperature=2.0, student_kwargs={...}`.

    Raises:
        funmatch.InputError: what was wanted, what came, and what to do.
    """
    from funmatch.tasks import distill as task

    return _carried_out(task, Distill.checked(data=data, teacher=str(teacher), student=student, out=Path(out), **knobs))


def train(data: Pictures, student: str, out: str | Path, **knobs: Any) -> Outcome:
    """Trains a network on labels alone, with the views and the loop of `distill`; knobs of `funmatch.config.Train`."""
    from funmatch.tasks import train as task

    return _carried_out(task, Train.checked(data=data, student=student, out=Path(out), **knobs))


def evaluate(model: str | Path, **knobs: Any) -> dict[str, Any]:
    """Judges a run or a model on a split; knobs of `funmatch.config.Evaluate`.

    Returns:
        `top1`, `top5`, `agreement`, `kl`, `ece`, `split`, `pictures`, `parameters`, `step`, `run`, …
    """
    from funmatch.tasks import evaluate as task

    return task.run(Evaluate.checked(model=str(model), **knobs))


def _carried_out(task: Any, config: Train) -> Outcome:
    from funmatch import report

    figures = task.run(config)
    folder = config.out.expanduser()
    return Outcome(folder, figures, report.of_finished(folder))
