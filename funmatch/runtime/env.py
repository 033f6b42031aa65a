"""Reads this process's rank and the number of processes from torchrun's environment variables, without torch."""

import os
import time

# Set on the first import, which is as near to the program's start as a library comes.
STARTED = time.monotonic()
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""The variables that torchrun sets; without all of them the process runs alone."""


def rank() -> int:
    """Returns this process's rank, in 0 … `world_size()` − 1."""
    return _read("RANK", 0)


def world_size() -> int:
    """Returns the number of processes that train one student together."""
    return _read("WORLD_SIZE", 1)


def local_rank() -> int:
    """Returns this process's rank among those of its machine, which is the index of its accelerator."""
    return _read("LOCAL_RANK", 0)


def local_world_size() -> int:
    """Returns the number of processes on this machine."""
    # torchrun sets it; started by hand, with the five variables above alone, all processes are on one machine.
    return _read("LOCAL_WORLD_SIZE", world_size())


def is_main_process() -> bool:
    """Returns whether this is the process that writes files and prints messages (rank 0)."""
    return rank() == 0


def seconds_since_start() -> float:
    """Returns the seconds since the program started."""
    return time.monotonic() - STARTED


def _read(name: str, default: int) -> int:
    # Cluster schedulers export RANK or WORLD_SIZE by themselves; only all of torchrun's together mean a group.
    return int(os.environ.get(name, default)) if all(word in os.environ for word in TORCHRUN_VARIABLES) else default


def mark_reported(error: BaseException, *, elsewhere: bool) -> None:
    """Marks an error as reported by another process of the run, or as reported by this one."""
    # In `vars`, not in a class of ours: any exception can end a run, and its type must stay as it is.
    vars(error)["reported_elsewhere"] = elsewhere


def reported_elsewhere(error: BaseException) -> bool:
    """Returns whether another process reports this error.

    An unmarked error is one that every process raises alike, such as a wrong option; the main process reports it.
    """
    return vars(error).get("reported_elsewhere", not is_main_process())
