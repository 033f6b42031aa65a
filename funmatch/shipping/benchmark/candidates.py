"""Keeps a format of a model, and everything that is found out about it."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from funmatch.errors import InputError, first_line
from funmatch.shipping.benchmark.formats import FORMATS, Machine, Prepared, Subject, open_file
from funmatch.shipping.benchmark.timing import Probe, Series
from funmatch.shipping.runtimes import require

OK, FAILED, MISSING_RUNTIME = "ok", "failed", "not installed"
"""The status of a format."""


@dataclass
class Candidate:
    """A format of a model, with everything that is found out about it.

    Attributes:
        subject: the model.
        format: its key in `FORMATS`; empty for a file.
        prepared: ready to compute, or None.
        status, reason: whether it could be measured, and why not.
        probe: the batch size with the most images per second.
        latency, throughput: times of calls with one image and with the best batch.
        scores: top-1 and agreement.
        memory: peak memory, bytes; None where it is unknown.
    """

    subject: Subject
    format: str
    prepared: Prepared | None = None
    status: str = OK
    reason: str | None = None
    probe: Probe | None = None
    latency: Series | None = None
    throughput: Series | None = None
    scores: dict[str, float | None] = field(default_factory=dict)
    memory: int | None = None

    @property
    def label(self) -> str:
        """Its name in tables, beside that of the model."""
        return FORMATS[self.format].label if self.format else self.subject.label

    @property
    def key(self) -> str:
        """Its name in messages."""
        return f"{self.subject.label}, {self.label}" if self.format else self.label

    def fail(self, error: BaseException, status: str = FAILED) -> None:
        """Notes why it could not be measured."""
        self.status, self.reason, self.prepared = status, first_line(error), None

    def prepare(self, machine: Machine) -> None:
        """Makes it ready to compute; the status says where that fails."""
        try:
            for module in FORMATS[self.format].needs if self.format else ():
                require(module)
        except InputError as error:
            self.fail(error, MISSING_RUNTIME)
            return
        try:
            make = FORMATS[self.format].make if self.format else open_file
            self.prepared = make(self.subject, machine)
        except Exception as error:  # exporters and runtimes raise whatever they like; the other formats still run
            self.fail(error)

    def call(self, images: int) -> Callable[[], object]:
        """Returns the function that is timed, with so many images."""
        assert self.prepared
        side, predict = self.subject.preprocessing.side, self.prepared.predict
        # Noise, not zeros: zeros are a special case for some kernels. The same for all formats.
        # Converted here: whoever passes bytes has them.
        views = self.prepared.as_input(np.random.default_rng(0).random((images, 3, side, side), np.float32))
        return lambda: predict(views)
