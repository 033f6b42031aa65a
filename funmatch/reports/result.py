"""Defines the result of a command: its folder, its metrics and its HTML page; and that of a run and of a search."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from funmatch.reports.display import html_table

if TYPE_CHECKING:  # importing torch takes seconds, and a result can be looked at without it
    from funmatch.models.classifier import Classifier

    PlainPath = Path
else:
    # `Path` itself cannot have subclasses before Python 3.12; that of this system can.
    PlainPath = type(Path())

# Of all commands' metrics the few that fit on a line.
HEADLINES = ("top1", "map", "agreement", "kl", "value", "best", "trials", "runs", "finished", "step")
"""Metrics in the one-line summary, in this order, if present."""

GLANCE = (*HEADLINES, "split", "seconds")
"""Metrics in the table of a notebook; of commands without any of these, all."""


@dataclass(frozen=True, repr=False)
class Result:
    """The result of a command.

    Attributes:
        folder: the run folder, or the folder of a search, study or demo; None for commands that keep none.
        metrics: what `--json` prints, except the page. None stands for a value that could not be computed.
        page: the HTML page, for commands that write one.
    """

    folder: Path | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    page: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """The metrics, with the page under `report`: the object that `--json` prints."""
        # Without a key for commands that write no page, rather than with null.
        return self.metrics | ({"report": str(self.page)} if self.page else {})

    def __repr__(self) -> str:
        known = {name: self.metrics.get(name) for name in HEADLINES}
        parts = [repr(str(self.folder))] if self.folder else []
        # Numbers only: `best` of a search without a finished trial is None.
        parts += [f"{name}={_plain(value)}" for name, value in known.items() if isinstance(value, int | float)]
        return f"{type(self).__name__}({', '.join(parts)})"

    # Inline colours are left out: those of the notebook's theme fit it, light or dark.
    def _repr_html_(self) -> str:
        rows = [["folder", str(self.folder)]] if self.folder else []
        # Lists and tables are left out: a cell is for a glance, and `metrics` has them.
        plain = {name: value for name, value in self.metrics.items() if isinstance(value, str | int | float | None)}
        few = {name: plain[name] for name in GLANCE if name in plain}
        rows += [[name, _plain(value)] for name, value in (few or plain).items()]
        rows += [["report", str(self.page)]] if self.page else []
        return html_table(["", ""], rows)


class StudentFolder(PlainPath):
    """The folder of a trained student, which is loaded when it is called: `run.student()`."""

    # Python 3.11 keeps paths without a dictionary, and so does this.
    __slots__ = ()

    def __call__(self) -> "Classifier":
        """Loads the student, in evaluation mode: images (n, 3, side, side) in [0, 1] to logits (n, classes).

        Raises:
            InputError: the folder is gone or damaged.
        """
        from funmatch.models.load import load

        return load(str(self)).eval()


class _Finished(Result):
    """A result that has a folder and a page, with other names for its parts."""

    # For type checkers: a finished run has both. No dataclass, so these are not new fields.
    folder: Path
    page: Path

    # Kept for scripts that read `figures` and `report`.
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
    def student(self) -> StudentFolder:
        """The folder of the student, in timm's layout; `run.student()` loads it as a classifier."""
        return StudentFolder(self.folder / "student")

    @property
    def top1(self) -> float | None:
        """Share of the split's images whose first class is right, in [0, 1]."""
        return self.metrics.get("top1")

    @property
    def agreement(self) -> float | None:
        """Share of the split's images on which the student's first class is the teacher's, in [0, 1]."""
        return self.metrics.get("agreement")

    @property
    def kl(self) -> float | None:
        """KL divergence of the student from the teacher at temperature 1, in nats, the mean over the split."""
        return self.metrics.get("kl")


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


def _plain(value: Any) -> str:
    """Formats a value for one line; four digits are enough to compare."""
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
