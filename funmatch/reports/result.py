"""Defines the result of a command: its folder, its metrics and its HTML page."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from funmatch.reports.display import html_table

HEADLINES = ("top1", "agreement", "kl", "value", "best", "trials", "runs", "finished", "step")
"""Metrics in the one-line summary, in this order, if present."""


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
    """Formats a value for one line; four digits are enough to compare."""
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
