"""The table of benchmark."""

import re
from pathlib import Path
from typing import Annotated, ClassVar

from funmatch.config.distill import Distill
from funmatch.config.finished.evaluate import Evaluate
from funmatch.config.finished.model import WithImages
from funmatch.config.metadata import Changes, Group, Opt, Refers
from funmatch.config.options import like
from funmatch.config.teaching import Teaching
from funmatch.config.values import Integers, Names, Share
from funmatch.errors import unknown

PLACE = Changes.PLACE
FORMATS = ("eager", "compiled", "onnx", "onnx-int8", "openvino")
"""Formats of a model that are measured, in the order of tables."""
EXPORTED = (".onnx", ".xml", ".pt2")
"""Endings of files that a runtime opens: ONNX, OpenVINO, torch.export."""
NO_TEACHER = "none"
"""Value of --teacher by which a run is measured without its teacher."""


class Benchmark(WithImages, Teaching):
    """Measure size, latency, throughput, memory and accuracy of a run in every format, beside its teacher."""

    verbs: ClassVar[str] = "Use"
    examples: ClassVar[tuple[str, ...]] = (
        "funmatch benchmark runs/student --report benchmark.html",
        "funmatch benchmark runs/student student.onnx --threads 1 --formats eager,onnx",
    )

    models: Annotated[
        Names,
        Opt(group=Group.STUDENT, changes=Changes.STUDENT, positional=True, essential=True, refers=Refers.MEASURED,
            metavar="MODEL …"),
    ]  # fmt: skip
    """Run folders, any models that `distill --teacher` takes, or files of runtimes (.onnx, OpenVINO's .xml, .pt2)."""
    teacher: Annotated[Names, like(Distill, "teacher", usual="the run's", replaces=(), refers=Refers.MEASURED)] = ()
    """Teachers to measure beside the models and to compare their outputs with; none measures no teacher."""
    split: Annotated[str, like(Evaluate, "split")] = "auto"
    """Split for top-1 and agreement; auto is test, else val, else train."""
    images: Annotated[int, Opt(group=Group.DATA, changes=Changes.DATA, at_least=1, essential=True)] = 500
    """Images for top-1 and agreement, at most; evenly spread over the split."""
    formats: Annotated[Names, Opt(group=Group.STUDENT, changes=PLACE, essential=True, metavar=",".join(FORMATS))] = (
        FORMATS
    )
    """Formats to measure, separated by commas. Without it, those that are not installed are skipped."""
    threads: Annotated[
        int | None,
        Opt(group=Group.MACHINE, changes=PLACE, at_least=1, at_most=1024, essential=True,
            usual="the cores that this process may use"),
    ] = None  # fmt: skip
    """Threads of every runtime."""
    batches: Annotated[Integers, Opt(group=Group.MACHINE, changes=PLACE, at_least=1, at_most=10**5)] = (1, 8, 32, 128)
    """Batch sizes of which the one with the most images per second is taken for the throughput."""
    spread: Annotated[Share, Opt(group=Group.MACHINE, changes=PLACE, metavar="SHARE")] = "5%"
    """Time in rounds until the interquartile range of their medians is at most this share of the median, e.g. 5% or
    0.05."""
    max_seconds: Annotated[float, Opt(group=Group.MACHINE, changes=PLACE, above=0, metavar="SECONDS")] = 20.0
    """Time for each format, at most, whatever the spread is."""
    memory: Annotated[bool, Opt(group=Group.MACHINE, changes=PLACE)] = True
    """Measure the peak memory of each format, in a process of its own, which takes some seconds."""
    report: Annotated[
        Path | None, Opt(group=Group.OUTPUT, changes=PLACE, usual="none", essential=True, metavar="FILE.html")
    ] = None
    """Page to write, with a plot of accuracy against latency; the plot is also written beside it, as .svg."""

    @property
    def chosen_formats(self) -> tuple[str, ...]:
        """The formats, in the order of tables."""
        named = {part.strip() for each in self.formats for part in each.split(",")}
        return tuple(each for each in FORMATS if each in named)

    @property
    def largest_spread(self) -> float:
        """`spread` as a share of the median."""
        text = self.spread or ""
        return float(text.rstrip("%")) / (100 if text.endswith("%") else 1)

    @property
    def files(self) -> tuple[str, ...]:
        """Those of the models that are files of a runtime."""
        return tuple(each for each in self.models if Path(each).suffix.lower() in EXPORTED)

    def problems(self) -> list[str]:
        found = [] if self.models else ["give a run folder, a model, or a file (.onnx, .xml, .pt2)"]
        named = [part.strip() for each in self.formats for part in each.split(",")]
        found += [str(unknown("format", each, FORMATS)) for each in dict.fromkeys(named) if each not in FORMATS]
        if not named:
            found.append("formats is empty; leave it out for all")
        if not re.fullmatch(r"\d+(\.\d+)?%?", self.spread or "") or not 0 < self.largest_spread < 1:
            found.append(f"spread must be a share between 0 and 1, such as 5% or 0.05, got {self.spread!r}")
        if not self.batches:
            found.append("batches is empty; give at least one batch size")
        # Weights are of one model: with several it would be open whose they are.
        if self.weights and len(self.models) > 1:
            found.append("weights belong to a single model; benchmark the models one by one, or name folders")
        if self.report and self.report.suffix.lower() not in (".html", ".htm"):
            found.append(f"report must be an .html file, got {self.report}")
        return found + super().problems()
