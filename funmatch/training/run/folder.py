"""A run is a folder: what it was asked, what it recorded, what it came to."""

import json
import math
import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from funmatch.config import TAUGHT, UNCOMPARED
from funmatch.errors import InputError
from funmatch.runtime import distributed, env
from funmatch.runtime.files import try_lock_file, write_atomically
from funmatch.training.run.metrics_log import MetricsLog

TOLD = {
    "data": "the data's content",
    "teacher": "the teacher's content",
    "student": "the student's content",
    "teacher_function": "the teacher's normalisation or architecture",
    "rounded": "the teacher's answers, as --tape rounds them",
}
"""Facts that are compared when a run goes on."""


@dataclass(frozen=True)
class Run:
    """A run's folder and what lies in it.

    Attributes:
        folder: holding `config.json`, `metrics.jsonl`, `checkpoints/`, and at the end `student/`, `result.json` and
            `report.html`.
    """

    folder: Path

    @property
    def config(self) -> dict[str, Any]:
        """`verb`, `knobs` (resolved, complete) and `facts` (data, teacher, versions)."""
        path = self.folder / "config.json"
        try:
            config = json.loads(path.read_text())
            if all(isinstance(config[part], dict) for part in ("knobs", "facts")) and config["verb"]:
                return config
        except (ValueError, KeyError, TypeError):
            pass
        raise InputError(f"{path} is not the configuration of a run, or is damaged")

    @property
    def result(self) -> dict[str, Any] | None:
        """The figures of a finished run, None before."""
        path = self.folder / "result.json"
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError):
            return None  # a damaged result is made again from the last checkpoint

    @property
    def metrics(self) -> MetricsLog:
        return MetricsLog(self.folder / "metrics.jsonl")

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def student(self) -> Path:
        return self.folder / "student"

    def finish(self, figures: dict[str, Any]) -> None:
        """Records that the run is over: the last thing that is written."""
        write_atomically(self.folder / "result.json", json.dumps(finite(figures), indent=2))


def find_run(folder: Path) -> Run:
    """The run in a folder, or an `InputError` that says what is there instead."""
    folder = folder.expanduser()
    if not folder.is_dir():
        raise InputError(f"no run folder {folder}")
    if not (folder / "config.json").is_file():
        inside = sorted(path.parent for path in folder.glob("*/config.json") if path.parent.name != "student")
        hint = f"; did you mean {', '.join(map(str, inside[:3]))}?" if inside else ""
        raise InputError(f"{folder} is not a run folder: it has no config.json of a run{hint}")
    run = Run(folder)
    _ = run.config  # raises where it is damaged
    return run


def provenance_if_same(folder: Path, verb: str, knobs: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """The facts of the run in a folder, if it was asked the same; else nothing."""
    run = Run(folder.expanduser())
    if not (run.folder / "config.json").is_file():
        return {}
    try:
        config = run.config
    except InputError:
        return {}  # whoever opens the run will say so
    return {} if differences(config, record_of(verb, knobs, facts)) else config["facts"]


def options_of(folder: Path) -> dict[str, Any]:
    """What the run in a folder was begun with; nothing where there is none."""
    return _part_of(folder, "knobs")


def provenance_of(folder: Path) -> dict[str, Any]:
    """What was found when the run in a folder was begun; nothing where there is none."""
    return _part_of(folder, "facts")


def _part_of(folder: Path, name: str) -> dict[str, Any]:
    run = Run(folder.expanduser())
    try:
        return run.config[name] if (run.folder / "config.json").is_file() else {}
    except (InputError, KeyError):
        return {}  # whoever opens the run will say so


def result_if_same(folder: Path, verb: str, knobs: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any] | None:
    """The figures of the run in a folder, if it is over and was asked the same."""
    return Run(folder.expanduser()).result if provenance_if_same(folder, verb, knobs, facts) else None


def record_of(verb: str, knobs: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """What `config.json` holds of a run."""
    return json.loads(json.dumps({"verb": verb, "knobs": knobs, "facts": facts}, default=str))


@contextmanager
def open_run(folder: Path, verb: str, knobs: dict[str, Any], facts: dict[str, Any]) -> Generator[Run]:
    """Begins a run in a new folder, or goes on with the one that is there if it was asked the same.

    Of several processes the first does so, and holds the lock; the others wait for it.

    Args:
        knobs: resolved.
        facts: `data` and `teacher` fingerprints, compared; whatever else, kept.

    Raises:
        InputError: the folder holds something else, a run with another configuration, or one that is running.
    """
    folder = folder.expanduser()
    if not env.is_main_process():
        distributed.barrier()
        if not (folder / "config.json").is_file():
            raise InputError(f"process {env.rank()} does not see {folder}; --out must lie where all processes see it")
        yield Run(folder)
        return
    record = record_of(verb, knobs, facts)
    check_place(folder)
    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _begin(Run(folder), record)
    except BaseException:
        if created and not any(folder.iterdir()):
            folder.rmdir()
        raise
    lock = try_lock_file(folder / "config.json")
    if lock is None:
        raise InputError(f"another process is at work in {folder}")
    with lock:
        for partial in folder.glob(".*.partial"):
            partial.unlink(missing_ok=True)  # left by a process that was killed
        distributed.barrier()
        yield Run(folder)


def check_place(folder: Path, mark: str = "config.json", what: str = "run") -> None:
    """Raises `InputError` unless a run (a study) may begin or go on in a folder: it is new, or holds `mark`."""
    folder = folder.expanduser()
    try:
        str(folder.absolute()).encode()
    except UnicodeEncodeError:
        raise InputError(f"{str(folder)!r} is no name in UTF-8, which others could not load; another --out") from None
    strange = folder.is_dir() and any(not path.name.endswith((".partial", ".lock")) for path in folder.iterdir())
    if folder.is_file() or (strange and not (folder / mark).is_file()):
        raise InputError(f"{folder} exists and is no {what}; choose another --out")


def _begin(run: Run, record: dict[str, Any]) -> None:
    path = run.folder / "config.json"
    if not path.is_file():
        write_atomically(path, json.dumps(record, indent=2))
        return
    differing = differences(find_run(run.folder).config, record)
    if differing:
        lines = "\n  ".join(differing)
        longer = any(line.startswith("steps:") for line in differing) and record["knobs"].get("schedule") != "wsd"
        hint = "; only runs of --schedule wsd can be prolonged" if longer else ""
        raise InputError(
            f"{run.folder} holds a run with another configuration:\n  {lines}\n"
            f"choose another --out, or give the run's own values to go on with it{hint}"
        )


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What two configurations of a run do not agree on, a line each.

    A run that is older than a knob was made with what is its default now; a knob that is no more decides nothing.
    """
    table = TAUGHT.get(now["verb"])
    young = {name: field.get_default() for name, field in table.model_fields.items()} if table else {}
    found = [] if then["verb"] == now["verb"] else [f"it is a run of {then['verb']}, not {now['verb']}"]
    known = now["knobs"].keys() if table else then["knobs"].keys() | now["knobs"].keys()
    # An option may name another folder or file when the fact says that its content is the same.
    places = {name: opt.content for name, opt in table.opts() if opt.content} if table else {}
    known = known - {name for name, fact in places.items() if _moved(name, fact, then, now)}
    facts = {"data", "teacher", "student", "rounded"} | (TOLD.keys() & then["facts"].keys())
    for part, names in (("knobs", known - UNCOMPARED), ("facts", facts)):
        for name in sorted(names):
            default = young.get(name) if part == "knobs" else None
            before, after = then[part].get(name, default), now[part].get(name)
            if before != after:
                what = TOLD.get(name, name) if part == "facts" else name
                found.append(f"{what}: {before} in the run, {after} now")
    return found


def _moved(name: str, fact: str, then: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether a knob names two places at which the same lies."""
    before, after = then["facts"].get(fact), now["facts"].get(fact)
    values = [each for one in (then, now) for each in _listed(one["knobs"].get(name))]
    return after is not None and before == after and all(os.sep in value for value in values)


def _listed(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [str(each) for each in values if each is not None]


def finite(value: Any) -> Any:
    """The same figures with None for what is not a finite number, which JSON cannot hold."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
