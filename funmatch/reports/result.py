"""Holds what a verb returns: the folder it wrote, its metrics, and its page."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from funmatch.reports.display import html_table

HEADLINES = ("top1", "agreement", "kl", "value", "best", "trials", "runs", "finished", "step")
"""Metrics that a one-line summary holds, in this order, where there are any."""


@dataclass(frozen=True, repr=False)
class Result:
    """The result of a verb.

    Attributes:
        folder: the run folder, or the folder of a search, a study or a demonstration; None where the verb keeps none.
        metrics: what `--json` prints, but for the page. None stands for a value that could not be computed.
        page: the HTML page, if the verb writes one.
    """

    folder: Path | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    page: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """The metrics, with the page under `report`: the object that `--json` prints."""
        return self.metrics | ({"report": str(self.page)} if self.page else {})

    def __repr__(self) -> str:
        known = {name: self.metrics.get(name) for name in HEADLINES}
        parts = [repr(str(self.folder))] if self.folder else []
        parts += [f"{name}={_plain(value)}" for name, value in known.items() if isinstance(value, int | float)]
        return f"{type(self).__name__}({', '.join(parts)})"

    def _repr_html_(self) -> str:
        rows = [["folder", str(self.folder)]] if self.folder else []
        rows += [
            [name, _plain(value)] for name, value in self.metrics.items() if isinstance(value, str | int | float | None)
        ]
        rows += [["report", str(self.page)]] if self.page else []
        return html_table(["", ""], rows)


def _plain(value: Any) -> str:
    """A value as a line shows it: four digits are enough to compare."""
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
