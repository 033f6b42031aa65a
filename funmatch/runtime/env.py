"""Who this process is among those that torchrun started: read from the environment, without torch."""

import os
import time

from funmatch.runtime import env

BEGAN = time.monotonic()
SAID = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells each process; where one is missing, this process is alone."""


def rank() -> int:
    """Which process this is, of 0 … `world()` − 1."""
    return _told("RANK", 0)


def world() -> int:
    """How many processes teach one student together."""
    return _told("WORLD_SIZE", 1)


def local_rank() -> int:
    """Which process of this machine this is: the number of its accelerator."""
    return _told("LOCAL_RANK", 0)


def local_world() -> int:
    """How many of the processes share this machine."""
    return _told("LOCAL_WORLD_SIZE", world())


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return rank() == 0


def alive() -> float:
    """Seconds since this program began."""
    return time.monotonic() - BEGAN


def _told(name: str, alone: int) -> int:
    return int(os.environ.get(name, alone)) if all(word in os.environ for word in SAID) else alone


def mark_told(error: BaseException, *, elsewhere: bool) -> None:
    """Marks an error as one that another process of the run tells, or that nobody else does."""
    vars(error)["told_elsewhere"] = elsewhere


def told_elsewhere(error: BaseException) -> bool:
    """Whether another process of the run tells this error: one that is not marked is met by all, so the first does."""
    return vars(error).get("told_elsewhere", not env.is_first())
