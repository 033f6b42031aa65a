"""Notices a process of a run that hangs or has ended, by heartbeats through the store in which the processes met.

A thread beats, so a process that indexes images or evaluates for hours while the others wait for it is not taken for
one that hangs: only a stopped process, or a machine that is gone, is silent.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from funmatch.runtime import env

BEAT_SECONDS = 1.0
"""Time between two heartbeats."""
PAUSE_SECONDS = 10.0
"""A thread that was not run for this long was stopped itself, with its whole job perhaps; it counts anew."""
WARN_SECONDS = 60.0
"""A process that is silent for so long is named, if this is less than half of the time after which the run ends."""
ENDED = "ended"
_step = 0


def note_step(step: int) -> None:
    """Notes the last step of this process, for the others' messages."""
    global _step
    _step = step


@dataclass
class Peer:
    """What is known of another process.

    Attributes:
        beat: its last heartbeat: a number, its last step, its machine and its process id; empty before the first.
        heard: when this was, by `time.monotonic()`.
    """

    beat: str
    heard: float
    warned: bool = False

    @property
    def step(self) -> int:
        """Its last step, which all processes take together: it has taken those of this process, too."""
        return max(_step, int(self.beat.split()[1]) if self.beat else 0)

    @property
    def is_gone(self) -> bool:
        """Whether it ran on this machine and has ended without a word."""
        if not self.beat or self.beat.startswith(ENDED):
            return False
        _, _, machine, process = self.beat.split()
        if machine != socket.gethostname() or not Path("/proc/self/stat").exists():
            return False
        try:
            # A process that was killed is a zombie (Z) until its parent has taken note.
            return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
        except FileNotFoundError:
            return True


class Heartbeat:
    """Beats for this process and listens to the others.

    Attributes:
        peers: the others by their ranks.
        lost: whether the store has failed to answer, as when the process that holds it has ended.
    """

    def __init__(self, store: dist.Store, timeout: float) -> None:
        """Begins to listen.

        Args:
            timeout: seconds of silence after which the run ends.
        """
        # A connection of its own: the main thread may wait on the other for as long as it likes.
        self.store, self.timeout = store.clone(), timeout
        self.store.set_timeout(timedelta(seconds=timeout))
        self.count, self.looked = 0, time.monotonic()
        others = (rank for rank in range(env.world_size()) if rank != env.rank())
        self.peers = {rank: Peer("", self.looked) for rank in others}
        self.lost, self.over = False, threading.Event()
        # Two, since a question to a store whose process is stopped is never answered.
        self.threads = [threading.Thread(target=work, daemon=True) for work in (self._run, self._watch)]

    def _run(self) -> None:
        while not self.over.wait(BEAT_SECONDS):
            try:
                self.beat()
                self.listen()
            except (RuntimeError, OSError):
                # The process with the store has ended: where that is rank 0, the main thread notices at once.
                self.lost = True
                return

    def _watch(self) -> None:
        before = time.monotonic()
        while not self.over.wait(BEAT_SECONDS) and not self.lost:
            now = time.monotonic()
            if now - before > PAUSE_SECONDS:
                self.looked = now
            before = now
            if now - self.looked > self.timeout:
                self.lost = True
                self.end(0, now - self.looked)

    def beat(self, word: str = "") -> None:
        """Tells the others that this process is alive."""
        self.count += 1
        self.store.set(f"beat-{env.rank()}", f"{word or self.count} {_step} {socket.gethostname()} {os.getpid()}")

    def listen(self) -> None:
        """Reads the heartbeats of the others, warns of silent ones, and ends the process after `timeout`."""
        now = time.monotonic()
        # At the beginning, since what follows may be what hangs.
        paused, self.looked = now - self.looked > PAUSE_SECONDS, now
        if paused:
            for peer in self.peers.values():
                peer.heard = now
        for rank, peer in self.peers.items():
            key = f"beat-{rank}"
            # A store that is ending may deny a key that was there.
            beat = self.store.get(key).decode() if self.store.check([key]) else peer.beat
            if beat != peer.beat or beat.startswith(ENDED):
                peer.beat, peer.heard, peer.warned = beat, now, False
            silent = now - peer.heard
            if silent > self.timeout:
                self.end(rank, silent)
            elif silent > min(WARN_SECONDS, self.timeout / 2) and not peer.warned:
                peer.warned = True
                if self._is_first(f"warned-{rank}-{peer.beat}"):
                    _say(f"WARNING: {self._silence(rank, silent)}; the run ends after {self.timeout:.0f} s")

    def end(self, rank: int, silent: float) -> None:
        """Ends this process, whose main thread waits for one that is silent."""
        if self._is_first("reported"):
            _say(f"funmatch: {self._silence(rank, silent)}; the run has ended, run the same command again to resume")
        os._exit(1)

    def _silence(self, rank: int, silent: float) -> str:
        # torchrun's agent holds the store in its own process.
        if self.lost and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return f"torchrun has not answered for {silent:.0f} s"
        return f"rank {rank} has not answered for {silent:.0f} s; its last step was {self.peers[rank].step}"

    def find_ended(self) -> str:
        """Returns a sentence about the process that has ended, after an operation with the others has failed."""
        until, before = time.monotonic() + 3 * BEAT_SECONDS, {}
        while time.monotonic() < until:
            # First what is known already: the store may have ended together with the process.
            if gone := [rank for rank, peer in self.peers.items() if peer.is_gone]:
                self.lost = self.lost or 0 in gone
                return self._ended(gone)
            self._listen_if_possible()
            before = before or {rank: peer.beat for rank, peer in self.peers.items() if peer.beat}
            if any(peer.beat.startswith(ENDED) for peer in self.peers.values()):
                return "another process of this run has ended"  # it has said why
            time.sleep(BEAT_SECONDS / 10)
        # On another machine the only sign is silence.
        silent = [rank for rank, beat in before.items() if self.peers[rank].beat == beat]
        return self._ended(silent) if silent else "another process of this run has ended"

    def _listen_if_possible(self) -> None:
        # Once only after a failure: PyTorch prints pages about each.
        if not self.lost:
            try:
                self.listen()
            except (RuntimeError, OSError):
                self.lost = True

    def _ended(self, ranks: list[int]) -> str:
        return " and ".join(f"rank {rank} has ended; its last step was {self.peers[rank].step}" for rank in ranks)

    def _is_first(self, key: str) -> bool:
        try:
            return self.lost or self.store.add(key, 1) == 1
        except RuntimeError:
            return True  # a message said twice is better than none


@contextmanager
def beating(store: dist.Store, timeout: float) -> Generator[Heartbeat]:
    """Lets the processes hear of each other while the block runs."""
    heart = Heartbeat(store, timeout)
    note_step(0)
    for thread in heart.threads:
        thread.start()
    try:
        yield heart
    finally:
        heart.over.set()
        for thread in heart.threads:
            thread.join(2 * BEAT_SECONDS)
        # So that the others do not wait for the next beat of a process that has failed, or finished first.
        if not heart.threads[0].is_alive() and not heart.lost:
            with suppress(RuntimeError, OSError):
                heart.beat(ENDED)


def _say(message: str) -> None:
    # Not `info`, which only the main process prints: it may be the one that hangs.
    print(message, file=sys.stderr, flush=True)
