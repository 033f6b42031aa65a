"""Knows the runs of a study under way: which are over, at work, waiting or failed, and which can begin."""

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from funmatch.commands.study.spec import RunSpec, StudySpec
from funmatch.runtime.time_limit import StartTime, TimeLimit
from funmatch.training.run import folder as run_folder


@dataclass
class StudyRunner:
    """A study under way.

    Attributes:
        plan: its runs.
        folder: the folder of the study.
        jobs: number of runs at a time.
        tapes: stored teachers' logits that several runs share, by the places of the runs.
        at_work: processes, and the runs that they carry out.
        failed: places of runs that ended without a result, and why.
        limit: when all must be saved.
        started: time that runs take besides their steps.
        began: when runs were started, by their places.
        stopped: number of runs that saved and stopped shortly before the limit.
    """

    plan: StudySpec
    folder: Path
    jobs: int
    tapes: Mapping[str, Path] = field(default_factory=dict)
    at_work: dict[subprocess.Popen, RunSpec] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    limit: TimeLimit = field(default_factory=TimeLimit)
    started: StartTime = field(default_factory=StartTime)
    began: dict[str, float] = field(default_factory=dict)
    stopped: int = 0

    def at(self, entry: RunSpec) -> Path:
        """A run's folder."""
        return self.folder / "runs" / entry.place

    def done(self, entry: RunSpec) -> bool:
        """Whether a run is over; a damaged result is computed again from its last checkpoint."""
        return run_folder.Run(self.at(entry)).result is not None

    def waiting(self) -> list[RunSpec]:
        """Runs that are neither over nor at work."""
        busy = {entry.place for entry in self.at_work.values()} | self.failed.keys()
        return [entry for entry in self.plan.entries if entry.place not in busy and not self.done(entry)]

    @property
    def out_of_time(self) -> bool:
        """Whether no run may begin any more: it could not take a step before the limit."""
        return bool(self.stopped) or self.limit.left < self.started.seconds + self.limit.first

    def ready(self) -> list[RunSpec]:
        """Waiting runs that can begin: what they need is there, and no other process is using them, such as one that a
        killed study left behind. Sorted by seed, so that a study which is stopped half-way can be compared."""
        done = {entry.place for entry in self.plan.entries if self.done(entry)}
        able = [
            each
            for each in self.waiting()
            if done.issuperset(each.needs) and not run_folder.Run(self.at(each)).record.in_use
        ]
        return sorted(able, key=lambda entry: entry.seed)
