"""Keeps a run in a folder: its options and facts, its metrics, its result."""

import json
import math
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from funmatch.config import TAUGHT
from funmatch.errors import InputError
from funmatch.runtime import env
from funmatch.runtime.disk.files import write_atomically
from funmatch.runtime.disk.json_files import Damaged, read_record, seal
from funmatch.runtime.disk.partials import remove_partials
from funmatch.runtime.disk.records import RUN_RECORD, RUN_SHAPE, RecordFolder
from funmatch.runtime.log import info
from funmatch.training.run import compare
from funmatch.training.run.metrics_log import RECORDED_TEACHER, MetricsLog
from funmatch.training.run.places import saved_step

CHECKPOINTS = "checkpoints"
"""The folder of a run that holds its checkpoints."""
FORMAT = 1
"""Format number of run folders, in their `config.json`. Version 0.1.0 wrote none, which is read as 1."""
FACTS = {
    **{f"{name}?": str | None for name in compare.COMPARED_FACTS},
    "views?": str, "answers?": str, "teacher_forms?": [RECORDED_TEACHER | {"beside_fp32?": dict}],
    "pictures?": dict[str, int], "classes?": list[str], "parameters?": int, "overridden?": dict[str, list],
    "changes?": [{"step": int, "option": str, "from": Any, "to": Any}],
    "machine?": str, "versions?": dict[str, str],
}  # fmt: skip
SHAPE = RUN_SHAPE | {"knobs": {"steps?": int, "teacher?": list[str] | str | None}, "facts": FACTS}
SCORES = dict.fromkeys(
    ("top1", "agreement", "kl", "ece", "top5?", "agreement5?", "balanced?", "knn?", "cosine?", "map?", "f1_micro?",
     "f1_macro?"),
    float | None,
)  # fmt: skip
RESULT_FILE = "result.json"
RESULT = SCORES | {
    "step": int, "seconds": float, "split": str, "pictures": int, "held_out_of?": int, "parameters": int,
    "best_step?": int | None, "best_score?": float | None, "top1_antialias?": float | None, "ema?": SCORES,
    "teacher?": {"name": str, "top1": float | None, "map?": float | None},
    "predicted_classes?": int, "constant?": float,
    "chance?": float, "map_antialias?": float | None,
}  # fmt: skip
"""What `result.json` holds, if it is undamaged."""
EVALUATION = "evaluation.html"
"""The page that `funmatch evaluate` writes into a run's folder."""
STUDENTS = ("student", "student-ema")
"""The folders of a finished run's students."""


@dataclass(frozen=True)
class Run:
    """A run's folder and its contents.

    Attributes:
        folder: the folder with `config.json`, `metrics.jsonl`, checkpoints, and at the end `student/`, `result.json`
            and `report.html`.
    """

    folder: Path

    @property
    def record(self) -> RecordFolder:
        """The folder, as one that has a record."""
        return RecordFolder(self.folder, RUN_RECORD, "run", SHAPE, number=FORMAT, closed=True)

    @property
    def config(self) -> dict[str, Any]:
        """`verb`, `knobs` (resolved, complete) and `facts` (data, teacher, versions).

        Raises:
            InputError: it is damaged, or of a newer format.
        """
        config = self.record.read()
        if problem := _misfit_of_options(config):
            raise Damaged(f"{self.record.path} is damaged ({problem})")
        return config

    @property
    def result(self) -> dict[str, Any] | None:
        """The metrics of a finished run, None before; `NewerFormat` if a newer version wrote them."""
        try:
            return read_record(self.folder / RESULT_FILE, RESULT, FORMAT, "choose another --out")
        except (OSError, Damaged):
            return None  # a damaged result is computed again from the last checkpoint

    @property
    def metrics(self) -> MetricsLog:
        return MetricsLog(self.folder / "metrics.jsonl")

    @property
    def checkpoints(self) -> Path:
        return self.folder / CHECKPOINTS

    @property
    def student(self) -> Path:
        return self.folder / "student"

    def with_changes(self, then: dict[str, Any], now: Mapping[str, Any]) -> dict[str, Any] | None:
        """Returns the record of the run that resumes with other values of options that it may change; None for none.

        Its facts say which, and from which step on.
        """
        changes = compare.accepted_changes(then, now)
        if not changes:
            return None
        step = saved_step(self.checkpoints)
        info(f"{self.folder}: from step {step} on, {', '.join(map(str, changes))}")
        # By the old names of the record's parts, which stay.
        knobs = then["knobs"] | {each.option: each.after for each in changes}
        lines = [{"step": step, "option": each.option, "from": each.before, "to": each.after} for each in changes]
        return then | {
            "knobs": knobs,
            "facts": then["facts"] | {"changes": [*then["facts"].get("changes", []), *lines]},
        }

    def finish(self, metrics: dict[str, Any]) -> None:
        """Writes `result.json`, by which the run counts as finished."""
        # Last of all: whatever a kill left out before it is made again when the run resumes.
        write_atomically(self.folder / RESULT_FILE, json.dumps(seal(finite(metrics)), indent=2))


def _misfit_of_options(config: dict[str, Any]) -> str | None:
    """Describes an option in a record whose value is not of its type; returns None if all are.

    Bounds are not checked: a value that was allowed when the run began stays readable.
    """
    table = TAUGHT.get(config["verb"])
    if table is None:
        return f"'verb' is {config['verb'][:40]!r}"
    # Options that are gone are left out: a run of an earlier version may have had more.
    options = {name: value for name, value in config["knobs"].items() if name in table.model_fields}
    # Strictly, since what is read is used as it stands; and as options are given, for the items of lists.
    checks: list[Callable[[], object]] = [
        lambda: table.model_validate_json(json.dumps(options), strict=True),
        lambda: table.model_validate(options),
    ]
    for check in checks:
        try:
            check()
        except ValidationError as error:
            for each in error.errors():
                is_list = each["type"] == "tuple_type" and isinstance(each["input"], list)
                if each["type"] not in ("missing", "value_error") and not is_list:
                    return f"{'.'.join(map(str, each['loc']))!r}: {each['msg']}"
    return None


def looks_like_run(path: Path) -> bool:
    """Returns whether a folder is that of a run, even if its record is damaged."""
    return Run(path).checkpoints.is_dir() or Run(path).metrics.path.is_file()


def is_needless(path: Path) -> bool:
    """Returns whether a file belongs to a checkpoint of a finished run, which nothing reads again."""
    return any(each.name == CHECKPOINTS and (each.parent / "result.json").is_file() for each in path.parents)


def find_run(folder: Path) -> Run:
    """Returns the run in a folder; raises `InputError` with near folders if it is none."""
    run = Run(folder.expanduser())
    if not run.folder.is_dir():
        raise InputError(f"no run folder {run.folder}")
    if not run.record.has_begun:
        # An exported student has a config.json too, timm's, but is no run.
        inside = sorted(path.parent for path in run.folder.glob(f"*/{RUN_RECORD}") if path.parent.name != "student")
        hint = f"; did you mean {', '.join(map(str, inside[:3]))}?" if inside else ""
        raise InputError(f"{run.folder} is not a run folder: it has no {RUN_RECORD} of a run{hint}")
    _ = run.config  # raises where it is damaged
    if run.result is None and (run.folder / RESULT_FILE).is_file():
        info(f"WARNING: {run.folder / RESULT_FILE} is damaged; start the command of the run again, which mends it")
    return run


def provenance_if_same(folder: Path, verb: str, options: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """Returns the facts of the run in a folder if it has the same record, else an empty dict."""
    run = Run(folder.expanduser())
    if not run.record.has_begun:
        return {}
    config = run.config
    return {} if compare.differences(config, record_of(verb, options, facts)) else config["facts"]


def options_of(folder: Path) -> dict[str, Any]:
    """Returns the options of the run in a folder; empty if there is none."""
    run = Run(folder.expanduser())
    return run.config["knobs"] if run.record.has_begun else {}


def began_without_validation(folder: Path) -> bool:
    """Returns whether a folder holds a run that has no `val`: nothing is held out for it when it resumes.

    Either its data has a validation split, or it is of a version that held nothing out unless that was requested.
    """
    options = options_of(folder)
    return bool(options) and options.get("val") is None


def provenance_of(folder: Path) -> dict[str, Any]:
    """Returns the facts that the run in a folder recorded when it began; empty if there is none."""
    run = Run(folder.expanduser())
    return run.config["facts"] if run.record.has_begun else {}


def record_of(verb: str, options: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """Returns what `config.json` holds of a run."""
    # As it reads back, tuples as lists: so it can be compared with the file.
    return json.loads(json.dumps({"verb": verb, "knobs": options, "facts": facts}, default=str))


@contextmanager
def open_run(folder: Path, verb: str, options: dict[str, Any], facts: dict[str, Any]) -> Generator[Run]:
    """Begins a run in a new folder, or resumes the one that is there if the same is requested.

    Of several processes the main one does so, and holds the lock; the others wait for it.

    Args:
        options: the resolved options.
        facts: those of `compare.COMPARED_FACTS` are compared with the record, all are kept in it.

    Raises:
        InputError: the folder holds something else, a run with other options, or one that another process is using.
    """
    from funmatch.runtime import distributed  # here, since whoever only looks at a run must not wait for torch

    run = Run(folder.expanduser())
    if not env.is_main_process():
        # The main process comes to its own barrier, below, only with the record written and the lock held.
        distributed.barrier()
        if not run.record.has_begun:
            raise InputError(f"process {env.rank()} does not see {folder}; --out must lie where all processes see it")
        yield run
        return
    with run.record.opened(record_of(verb, options, facts), partial(compare.compare, run.folder), run.with_changes):
        remove_partials(run.folder / "ends")
        distributed.barrier()
        yield run


def check_place(folder: Path) -> None:
    """Raises `InputError` unless a run may begin or resume in a folder."""
    record = Run(folder.expanduser()).record
    record.check_place()
    if record.has_begun:
        record.read()  # a damaged or newer one is refused now and not after an hour of decoding


def finite(value: Any) -> Any:
    """Returns the same metrics with None for numbers that are not finite, which JSON cannot hold."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
