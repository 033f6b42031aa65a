"""Runs cases of a target in this process, and watches what comes out, the time and the memory."""

import random
import resource
import signal
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path

from funmatch.errors import InputError, WorkFailed

CASE_SECONDS = 10.0
"""Processor time that a case may take."""
CASE_BYTES = 2**30
"""Memory that a case may add to the largest so far."""

Case = Callable[[random.Random], object]


@dataclass(frozen=True)
class Target:
    """A reader and its damaged inputs.

    Attributes:
        name: the name of `--target`.
        prepare: writes undamaged files into an empty folder; returns a function that damages and reads them once.
        is_fast: whether a case takes about a millisecond.
    """

    name: str
    prepare: Callable[[Path], Case]
    is_fast: bool = True


@dataclass
class Outcome:
    """What came of the cases of a target; `failures` are the places of tracebacks, with the seed of one case each."""

    cases: int = 0
    fine: int = 0
    refused: int = 0
    seconds: float = 0.0
    failures: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)


class TooSlow(BaseException):
    """A case took longer than it may; not an `Exception`, which readers may take for damage."""


def fuzz(target: Target, folder: Path, cases: int, seed: int) -> Outcome:
    """Runs cases of a target; each has its own seed, so that one can be repeated."""
    run, found, started = target.prepare(folder), Outcome(), time.process_time()
    for number in range(cases):
        _run_case(run, f"{target.name}-{seed}-{number}", found)
    found.seconds = time.process_time() - started
    return found


def _run_case(run: Case, name: str, found: Outcome) -> None:
    found.cases += 1
    peak = _peak()
    try:
        with _limited(), warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            run(random.Random(name))
        found.fine += 1
    except (InputError, WorkFailed):
        found.refused += 1
    except (Exception, TooSlow, SystemExit) as error:
        _note(found, error, name)
    if _peak() - peak > CASE_BYTES:
        _note(found, MemoryError(f"{(_peak() - peak) / 2**30:.1f} GiB"), name)


def _note(found: Outcome, error: BaseException, name: str) -> None:
    ours = [each for each in traceback.extract_tb(error.__traceback__) if "/funmatch/" in each.filename]
    at = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
    place = f"{type(error).__name__} {at}"
    found.failures[place] += 1
    found.examples.setdefault(place, f"{name}: {str(error)[:200]}")


@contextmanager
def _limited() -> Iterator[None]:
    def too_slow(*_: object) -> None:
        raise TooSlow(f"more than {CASE_SECONDS:g} s")

    before = signal.signal(signal.SIGVTALRM, too_slow)
    signal.setitimer(signal.ITIMER_VIRTUAL, CASE_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
