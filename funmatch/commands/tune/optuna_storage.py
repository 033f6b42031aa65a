"""Wraps Optuna for searches: storage of a study, sampling of a trial's values, pruning.

The values of trial n are a function of the seed and of n (TPE's also of the finished trials): it does not matter which
process samples them, when, or how often.
"""

import os
import time
import warnings
import zlib
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy import create_engine
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from funmatch.commands.tune.space import Space, Value, combinations
from funmatch.errors import InputError, first_line
from funmatch.runtime.disk.locks import FileLock, try_lock_file

PATIENCE_SECONDS = 20.0
"""Time to wait for a storage that is locked by another process."""


BEGINS = b'{"op_code"'
"""First bytes of a journal."""


class Lock:
    """Locks the journal while a line is appended. The operating system releases the lock of a killed process."""

    def __init__(self, journal: Path) -> None:
        self.journal = journal
        self.held: FileLock | None = None

    def acquire(self) -> bool:
        # Not the wall clock, which may be set while we wait.
        until = time.monotonic() + PATIENCE_SECONDS
        while (held := try_lock_file(self.journal)) is None:
            if time.monotonic() > until:
                raise InputError(f"{self.journal} has been locked by another process for {PATIENCE_SECONDS:.0f} s")
            time.sleep(0.005)
        self.held = held
        # Under the lock: without it the line could be one that another process is still writing.
        _repair(self.journal)
        return True

    def release(self) -> None:
        if self.held:
            self.held.close()
        self.held = None


def _repair(journal: Path) -> None:
    """Removes an incomplete last line of a killed process, which would corrupt the next line."""
    with open(journal, "r+b") as file:
        end = file.seek(0, os.SEEK_END)
        if not end:
            return
        file.seek(end - 1)
        if file.read(1) == b"\n":
            return
        # The whole file: it is read only after a crash, and lines have no limit.
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


@contextmanager
def working_trials(place: str) -> Generator[None]:
    """Silences Optuna, and turns errors of the storage into an `InputError` that names it."""
    # Restored at the end: in a notebook the user may use Optuna, too.
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            # Optuna warns of its experimental parts; users of funmatch did not choose them.
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        raise InputError(f"the storage {display_url(place)} cannot be used: {_reason(error)}") from None
    finally:
        optuna.logging.set_verbosity(before)


def _reason(error: BaseException) -> str:
    """Returns the database's own message in one line."""
    # SQLAlchemy and Optuna wrap it several times, in text that is about their own code.
    deepest = error
    while deepest.__cause__ is not None or getattr(deepest, "orig", None) is not None:
        deepest = deepest.__cause__ or vars(deepest)["orig"]
    reason = " ".join(str(deepest).split())
    return f"{reason} (another program has locked it)" if "is locked" in reason else reason or type(deepest).__name__


def is_url(place: str) -> bool:
    """Whether a storage is a database URL, not a journal file."""
    return "://" in place


def display_url(place: str) -> str:
    """Returns the name of a storage without its password."""
    try:
        # Hidden, since the record, messages and pages show this name.
        return make_url(place).render_as_string(hide_password=True) if is_url(place) else place
    except SQLAlchemyError:
        # Not a URL that can be parsed, but it may still hold a password.
        return place.split("@")[-1]


def storage_at(place: str) -> BaseStorage:
    """Opens a storage: a journal file, or a database by its URL.

    Raises:
        InputError: it cannot be reached, or is not a storage of Optuna.
    """
    if not is_url(place):
        return _journal(Path(place))
    try:
        return RDBStorage(place, engine_kwargs={"connect_args": _patience(place)})
    except ImportError as error:
        raise InputError(_no_driver(place, error)) from None
    # Optuna's answer to tables of another version of its schema.
    except RuntimeError as error:
        raise InputError(
            f"the storage {display_url(place)} was written by another version of Optuna: {first_line(error)}"
        ) from None


def check_reachable(place: str) -> None:
    """Raises `InputError` if a database cannot be reached, before anything is written."""
    try:
        # No pool, which would keep the connection open after the check.
        create_engine(place, connect_args=_patience(place), poolclass=NullPool).connect().close()
    except ImportError as error:
        raise InputError(_no_driver(place, error)) from None
    except SQLAlchemyError as error:
        raise InputError(f"the storage {display_url(place)} cannot be reached: {_reason(error)}") from None


def _patience(place: str) -> dict[str, Any]:
    """Returns the driver's own argument for the time to wait."""
    if place.startswith("sqlite"):
        return {"timeout": PATIENCE_SECONDS}
    return {"connect_timeout": int(PATIENCE_SECONDS)} if place.startswith(("postgresql", "mysql")) else {}


def _no_driver(place: str, error: ImportError) -> str:
    hint = " (pip install 'psycopg[binary]', and use postgresql+psycopg://…)" if place.startswith("postgres") else ""
    return f"the storage {display_url(place)} needs a library that is not installed: {error}{hint}"


def _journal(path: Path) -> JournalStorage:
    if path.is_file():
        with open(path, "rb") as file:
            found = file.read(len(BEGINS))
        # An empty or shorter file is a journal whose first line was cut off.
        if not BEGINS.startswith(found):
            raise InputError(f"{path} is not a journal of Optuna; choose another --storage")
    try:
        return JournalStorage(JournalFileBackend(str(path), lock_obj=Lock(path)))  # pyrefly: ignore
    # What Optuna raises for lines that are not entries of its own.
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        # An `InputError` is a ValueError: that of a lock is passed on.
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not a journal of Optuna, or is damaged: {first_line(error)}") from None


class SeededSampler(optuna.samplers.BaseSampler):
    """Samples the values of trial n from the seed and n, with one of Optuna's samplers created for this trial alone.

    Optuna creates a sampler once per process: two processes with the same seed would sample the same values, and a
    process that is killed and restarted would sample others.
    """

    def __init__(self, way: str, seed: int, space: Space, first: Mapping[str, Value] | None) -> None:
        """Creates a sampler.

        Args:
            way: random, grid or tpe.
            first: the values of trial 0, or None to sample them too.
        """
        self.way, self.seed, self.space, self.first = way, seed, space, first
        # Shuffled, so that a grid that is stopped early has tried values of every option.
        self.order = np.random.default_rng(seed).permutation(combinations(space)) if way == "grid" else None

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, BaseDistribution]:
        # Values of random and grid trials are independent of each other, so there is nothing relative to infer.
        if self.way != "tpe" or (self.first and trial.number == 0):
            return {}
        return self._sampler(trial.number).infer_relative_search_space(study, trial)

    def sample_relative(self, study: Any, trial: Any, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        return self._sampler(trial.number).sample_relative(study, trial, search_space) if search_space else {}

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: BaseDistribution) -> Any:
        if self.order is not None:
            return self._at(int(self.order[trial.number]))[param_name]
        if self.first and trial.number == 0:
            return self.first[param_name]
        return self._sampler(trial.number, param_name).sample_independent(study, trial, param_name, param_distribution)

    def _sampler(self, number: int, name: str = "") -> optuna.samplers.BaseSampler:
        # A CRC, since Python's `hash` of a text differs from process to process.
        seed = int(np.random.SeedSequence([self.seed, number, zlib.crc32(name.encode())]).generate_state(1)[0])
        # The seed of a value holds its option's name, so that adding an option leaves the others' values as they are.
        if self.way == "tpe":
            return optuna.samplers.TPESampler(seed=seed)
        return optuna.samplers.RandomSampler(seed=seed)

    def _at(self, place: int) -> dict[str, Value]:
        """Returns the combination at a position of the grid."""
        values = {}
        for name, span in self.space.items():
            place, which = divmod(place, len(span.choices))
            values[name] = span.choices[which]
        return values


def pruner_of(name: str, evaluations: int) -> optuna.pruners.BasePruner:
    """Creates a pruner.

    Args:
        evaluations: number of evaluations in a run; 0 if unknown before it starts.
    """
    if name == "asha":
        # One evaluation is the unit: `_report` counts them.
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
    if name == "hyperband":
        # "auto" takes the length from the trials that have ended.
        most = max(2, evaluations) if evaluations else "auto"
        return optuna.pruners.HyperbandPruner(min_resource=1, max_resource=most, reduction_factor=3)
    return optuna.pruners.NopPruner()


def suggest(trial: optuna.Trial, space: Space) -> dict[str, Value]:
    """Returns the values of a trial: those in the storage, or newly sampled ones."""
    values: dict[str, Value] = {}
    # The space is sorted, so the order on the command line changes no value.
    for name, span in space.items():
        if span.choices:
            values[name] = trial.suggest_categorical(name, span.choices)
        elif span.whole:
            values[name] = trial.suggest_int(name, int(span.low), int(span.high), log=span.log)
        else:
            values[name] = trial.suggest_float(name, span.low, span.high, log=span.log)
    return values


def resume_trial(study: optuna.Study, number: int) -> optuna.Trial:
    """Continues a trial of the storage, as if it had just been created."""
    # Optuna has no public way to continue a trial that another process began.
    frozen = study.get_trials(deepcopy=False)[number]
    return optuna.Trial(study, frozen._trial_id)


def importance(study: optuna.Study) -> dict[str, float]:
    """Estimates the importance of each option (PED-ANOVA), largest first; {} with too few finished trials."""
    finished = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    # PED-ANOVA compares the best trials with all: it needs a few, and differences between them.
    if len(finished) < 4 or len({trial.value for trial in finished}) < 2:
        return {}
    return dict(optuna.importance.get_param_importances(study))
