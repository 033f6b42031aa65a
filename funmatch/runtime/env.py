"""Who this process is among those that torchrun started: read from the environment, without torch."""

import os
import time

from funmatch.runtime import env

STARTED = time.monotonic()
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells each process; where one is missing, this process is alone."""


def rank() -> int:
    """Which process this is, of 0 … `world()` − 1."""
    return _read("RANK", 0)


def world_size() -> int:
    """How many processes teach one student together."""
    return _read("WORLD_SIZE", 1)


def local_rank() -> int:
    """Which process of this machine this is: the number of its accelerator."""
    return _read("LOCAL_RANK", 0)


def local_world_size() -> int:
    """How many of the processes share this machine."""
    return _read("LOCAL_WORLD_SIZE", world_size())


def is_main_process() -> bool:
    """Whether this is the process that writes and speaks."""
    return rank() == 0


def seconds_since_start() -> float:
    """Seconds since this program began."""
    return time.monotonic() - STARTED


def _read(name: str, alone: int) -> int:
    return int(os.environ.get(name, alone)) if all(word in os.environ for word in TORCHRUN_VARIABLES) else alone


def mark_reported(error: BaseException, *, elsewhere: bool) -> None:
    """Marks an error as one that another process of the run tells, or that nobody else does."""
    vars(error)["told_elsewhere"] = elsewhere


def reported_elsewhere(error: BaseException) -> bool:
    """Whether another process of the run tells this error: one that is not marked is met by all, so the first does."""
    return vars(error).get("told_elsewhere", not env.is_main_process())
