"""Heartbeats: who is silent is warned of, named and ends the run; who works does not."""

import os
import socket
from datetime import timedelta

import pytest
import torch.distributed as dist

from funmatch.runtime import heartbeat
from funmatch.runtime.heartbeat import Heartbeat

NOBODY = 2**22 + 1
"""No process has this id: Linux gives none above 2²²."""


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """A clock that stands still."""
    now = [1000.0]
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(heartbeat.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    return now


@pytest.fixture
def store(monkeypatch) -> dist.Store:
    words = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    for name, value in words.items():
        monkeypatch.setenv(name, str(value))
    ended = []
    monkeypatch.setattr(heartbeat.os, "_exit", ended.append)
    return dist.TCPStore("127.0.0.1", 0, 1, is_master=True, timeout=timedelta(seconds=5))


def listen_for(heart: Heartbeat, clock: list[float], seconds: int, beat: str | None = None) -> None:
    for second in range(seconds):
        clock[0] += 1
        if beat:
            heart.store.set("beat-1", f"{clock[0] + second} {beat}")
        heart.listen()


def test_a_silent_process_is_warned_of_and_then_ends_the_run(store, clock, capsys):
    heart = Heartbeat(store, 120)
    listen_for(heart, clock, 500, f"57 elsewhere {NOBODY}")
    assert not capsys.readouterr().err, "it works, however long that takes"
    listen_for(heart, clock, 62)
    warning = "WARNING: rank 1 has not answered for 61 s; its last step was 57; the run ends after 120 s\n"
    assert capsys.readouterr().err == warning, "once"
    listen_for(heart, clock, 60)
    said = "rank 1 has not answered for 121 s; its last step was 57; the run has ended, run the same command again to"
    assert said in capsys.readouterr().err


def test_a_job_that_was_suspended_as_a_whole_continues(store, clock, capsys):
    heart = Heartbeat(store, 120)
    listen_for(heart, clock, 5, f"3 elsewhere {NOBODY}")
    clock[0] += 86400
    listen_for(heart, clock, 50)
    listen_for(heart, clock, 5, f"4 elsewhere {NOBODY}")
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("beat", "said"),
    [
        (f"8 57 {socket.gethostname()} {NOBODY}", "rank 1 has ended; its last step was 57"),
        (f"8 57 elsewhere {NOBODY}", "rank 1 has ended; its last step was 57"),
        (f"ended 57 {socket.gethostname()} {os.getpid()}", "another process of this run has ended"),
    ],
    ids=["no such process", "on another machine", "has said so"],
)
def test_a_process_that_has_ended_is_named(store, clock, beat, said):
    heart = Heartbeat(store, 120)
    heart.store.set("beat-1", beat)
    assert heart.find_ended() == said
    assert clock[0] < 1010
