"""Writes the records of a run, and passes each to the user's `on_event`."""

from collections.abc import Callable
from typing import Any

from funmatch.runtime import env
from funmatch.training.run.metrics_log import MetricsLog

OnEvent = Callable[[str, int, dict[str, Any]], object]
"""Called with each record of `metrics.jsonl`: event, step, values."""
ON_EVENT = "on_event"
"""The name under which it is among the objects that were given from Python."""


class Recorder:
    """Writes records into `metrics.jsonl` and passes them to `on_event`, both on the main process alone.

    Attributes:
        failure: what `on_event` raised. It is called no more, and the trainer ends the run after saving.
    """

    def __init__(self, log: MetricsLog, on_event: OnEvent | None) -> None:
        self.log, self.on_event = log, on_event
        self.failure: Exception | None = None

    def write(self, event: str, step: int, values: dict[str, Any]) -> None:
        """Adds a record."""
        self.log.write(event, step, **values)
        if self.on_event is None or self.failure or not env.is_main_process():
            return
        try:
            # A copy, since the user may keep it or change it.
            self.on_event(event, step, dict(values))
        except Exception as error:  # the user's code can raise anything
            # Kept, not raised: as after Ctrl-C, all processes save first, between two steps.
            self.failure = error

    def raise_failure(self, saved: str) -> None:
        """Raises what `on_event` raised, if it did.

        Args:
            saved: what of the run is saved, for a note below the traceback.
        """
        if self.failure:
            self.failure.add_note(f"funmatch: on_event failed; {saved}; make the same call again to resume")
            raise self.failure
