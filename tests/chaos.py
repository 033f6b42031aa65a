"""Kills commands at random moments and checks that the same commands end as if nothing had happened.

    python tests/chaos.py --kills 200 --seed 0
    python tests/chaos.py --kind wsd --kills 20

Half of the kills come after a random share of the command's processor time, the others in the first moment after that
in which something half-written lies in its folder. All processes of the command are killed at once (SIGKILL). Then the
same command is started again, until it ends. What it has left must be that of the uninterrupted commands: the same
files, with the same bytes but for times and places, and nothing else.

Commands run in forked processes that find the libraries loaded, since loading them takes seconds and writes nothing.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from forked import ForkedProcess, load_libraries, skip_plots, start_command
from PIL import Image

SMALL = [
    "--data", "fashion-mini", "--teacher", "fashion-mini-teacher", "--student", "fashion-mini-student", "--batch", "8",
    "--save-every", "10", "--eval-every", "20", "--log-every", "5",
]  # fmt: skip
STUDY = """
title = "Chaos"
seeds = [0, 1]
[common]
data = "fashion-mini"
teacher = "fashion-mini-teacher"
student = "fashion-mini-student"
batch = 8
save_every = 10
[[run]]
name = "short"
steps = 20
[[run]]
name = "long"
steps = 30
"""
MOST_KILLS = 3
"""Kills of a command before it is left alone, at most."""
TIMED = {
    "seconds", "images_per_second", "run", "checksum", "measured", "date", "started", "machine", "log_bytes", "log_crc",
    "id", "seconds_features", "seconds_fit",
}  # fmt: skip
"""Keys of values that differ between two runs of the same command."""
DRAWN = (".html", ".svg", ".log", ".sqlite3", ".db", ".txt", ".md")
"""Endings of files that hold times; that they are there is enough."""


@dataclass(frozen=True)
class Kind:
    """Commands to kill.

    Attributes:
        commands: the words of each, given the folder for what they write.
        prepare: makes what they read, in a folder that all tries share; returns it.
        own_cache: whether each try has a cache of its own, which counts among what the commands leave.
        processes: processes of one command that train together.
    """

    commands: Callable[[Path, Path], list[list[str]]]
    prepare: Callable[[Path], object] = lambda _shared: None
    own_cache: bool = False
    processes: int = 1


def distill(*more: str) -> Callable[[Path, Path], list[list[str]]]:
    """Returns the command of a distillation with further options, in which FOLDER stands for the folder."""

    def commands(folder: Path, _shared: Path) -> list[list[str]]:
        words = [word.replace("FOLDER", str(folder)) for word in more]
        return [["-m", "funmatch", "distill", *SMALL, *words, "--out", str(folder / "run")]]

    return commands


def wsd(folder: Path, _shared: Path) -> list[list[str]]:
    """A run that is extended by a second command."""
    words = ["-m", "funmatch", "distill", *SMALL, "--schedule", "wsd", "--ema", "0.99", "--out", str(folder / "run")]
    return [[*words, "--steps", "40"], [*words, "--steps", "60"]]


def tune(folder: Path, _shared: Path) -> list[list[str]]:
    words = [
        "--steps",
        "20",
        "--space",
        "lr=1e-3,3e-3",
        "--trials",
        "2",
        "--out",
        str(folder / "search"),
    ]
    return [["-m", "funmatch", "tune", "distill", *SMALL, *words]]


def study(folder: Path, shared: Path) -> list[list[str]]:
    return [["-m", "funmatch", "study", str(shared / "study.toml"), "--jobs", "2", "--out", str(folder / "study")]]


def write_images(shared: Path) -> None:
    """Writes 240 photographs' worth of noise in two classes."""
    rng = np.random.default_rng(0)
    for number in range(240):
        place = shared / "images" / ("train" if number < 200 else "test") / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (90, 120, 3), np.uint8)).save(place / f"{number}.png")


def finish_run(shared: Path) -> None:
    """Makes a finished run."""
    call(["-m", "funmatch", "distill", *SMALL, "--steps", "20", "--out", str(shared / "run")], environment(None))


def copied(*words: str) -> Callable[[Path, Path], list[list[str]]]:
    """Returns a command about a copy of the finished run, for which RUN stands, in FOLDER."""

    def commands(folder: Path, shared: Path) -> list[list[str]]:
        if not (folder / "run").exists():
            shutil.copytree(shared / "run", folder / "run")
        return [["-m", "funmatch", *(word.replace("FOLDER", str(folder)) for word in words)]]

    return commands


KINDS = {
    "plain": Kind(distill("--steps", "60")),
    "ema": Kind(distill("--steps", "60", "--ema", "0.99", "--keep", "best")),
    "tape": Kind(distill("--steps", "40", "--tape", "FOLDER/tape")),
    "wsd": Kind(wsd),
    "students": Kind(distill("--steps", "30", "--student", "resnet10t", "--side", "32")),
    "processes": Kind(distill("--steps", "40"), processes=2),
    "tune": Kind(tune),
    "study": Kind(study, lambda shared: (shared / "study.toml").write_text(STUDY)),
    "prepare": Kind(
        lambda _folder, shared: [["-m", "funmatch", "prepare", str(shared / "images")]], write_images, own_cache=True
    ),
    "shards": Kind(
        lambda folder, shared: [
            ["-m", "funmatch", "prepare", str(shared / "images"), "--to", "tfrecord", "--out", str(folder / "shards")]
        ],
        write_images,
    ),
    "export": Kind(copied("export", "FOLDER/run", "--format", "timm", "--out", "FOLDER/exported"), finish_run),
    "report": Kind(copied("report", "FOLDER/run"), finish_run),
}  # fmt: skip


def environment(cache: Path | None) -> dict[str, str]:
    """Returns the environment of a command: one thread, and a cache."""
    extra = {"FUNMATCH_CACHE": str(cache)} if cache else {}
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent), **extra}


def start(words: list[str], env: dict[str, str], processes: int = 1) -> ForkedProcess:
    output = tempfile.TemporaryFile()
    process = start_command(words, env, output, processes=processes)
    process.output = output  # type: ignore[attr-defined]
    return process


def call(words: list[str], env: dict[str, str], processes: int = 1) -> float:
    """Carries out a command to its end; returns its processor time in seconds.

    Raises:
        RuntimeError: it failed; the message is what it printed last.
    """
    process = start(words, env, processes)
    if process.wait():
        raise RuntimeError(f"exit {process.returncode}: {said(process)}")
    return process.seconds


def said(process: ForkedProcess) -> str:
    """Returns the end of what a process printed."""
    process.output.seek(0)  # type: ignore[attr-defined]
    return process.output.read().decode(errors="replace")[-1500:]  # type: ignore[attr-defined]


def descendants(pid: int) -> Iterator[int]:
    """Yields a process and all that it started, whichever session they are in."""
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            yield from descendants(int(child))


def kill(process: ForkedProcess) -> None:
    """Kills a process and all that it started."""
    try:
        pids = [*descendants(process.pid)]
    except OSError:
        pids = [process.pid]
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()
    # Those that were started meanwhile end with their parent, by themselves.
    deadline = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def processor_seconds(pid: int) -> float:
    """Returns the processor time of a process and all that it started, those that have ended too."""
    ticks = 0
    for each in descendants(pid):
        fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
        ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def wait_and_kill(process: ForkedProcess, rng: random.Random, seconds: float, folders: list[Path]) -> bool:
    """Kills a process after a random share of its time, or when something half-written is there.

    Args:
        process: the process.
        rng: decides.
        seconds: its processor time; that of the clock depends on what else the machine does.
        folders: where something half-written may be.

    Returns:
        whether it was alive.
    """
    share = rng.uniform(0.0, seconds)
    aimed = rng.random() < 0.5
    due = False
    while process.poll() is None:
        with contextlib.suppress(OSError):  # a child of it has just ended
            due = due or processor_seconds(process.pid) > share
        if due:
            if not aimed:
                time.sleep(rng.uniform(0, 0.01))  # processor time is counted in ticks of that length
                break
            if any(path for folder in folders for path in half_written(folder)):
                time.sleep(rng.uniform(0, 0.002))
                break
        # Half-written things lie there for milliseconds.
        time.sleep(0.0005 if due else 0.005)
    if process.poll() is not None:
        return False
    kill(process)
    return True


def half_written(folder: Path) -> Iterator[Path]:
    """Yields what lies half-written in a folder: in it, and two levels below."""
    for pattern in ("*.partial", ".*.partial", "*/.*.partial", "*/*/.*.partial"):
        yield from folder.glob(pattern)


def contents(folder: Path) -> dict[str, str]:
    """Returns a digest of each file in a folder, without times and places."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = str(path.relative_to(folder))
            found[name] = "" if path.suffix in DRAWN else hashlib.sha256(plain(path, folder)).hexdigest()
    return found


def plain(path: Path, folder: Path) -> bytes:
    """Returns the content of a file without times and places."""
    content = path.read_bytes().replace(str(folder).encode(), b"FOLDER")
    if path.name in ("checksums.json", "SHA256SUMS"):
        return b""  # of files that are compared themselves
    if path.suffix not in (".json", ".jsonl"):
        return content
    lines = content.decode().splitlines() if path.suffix == ".jsonl" else [content.decode()]
    return "\n".join(json.dumps(untimed(json.loads(line)), sort_keys=True) for line in lines if line).encode()


def untimed(value: object) -> object:
    """Returns a JSON value without what differs between two runs of the same command."""
    if isinstance(value, dict):
        return {key: untimed(each) for key, each in value.items() if key not in TIMED}
    return [untimed(each) for each in value] if isinstance(value, list) else value


@dataclass
class Chaos:
    """Tries of one kind.

    Attributes:
        kind: the commands.
        place: a folder for everything.
        rng: decides when to kill.
    """

    kind: Kind
    place: Path
    rng: random.Random

    def __post_init__(self) -> None:
        self.shared = self.place / "shared"
        self.shared.mkdir(parents=True)
        self.kind.prepare(self.shared)
        self.expected, self.seconds = self.uninterrupted()

    def folder(self, name: str) -> Path:
        folder = self.place / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def env(self, folder: Path) -> dict[str, str]:
        return environment(folder / "cache" if self.kind.own_cache else None)

    def uninterrupted(self) -> tuple[dict[str, str], list[float]]:
        """Runs the commands once; returns what they leave, and the processor time of each."""
        folder = self.folder("try")  # the same name for all: paths are recorded
        commands = self.kind.commands(folder, self.shared)
        seconds = [call(words, self.env(folder), self.kind.processes) for words in commands]
        return contents(folder), seconds

    def attempt(self) -> tuple[int, str]:
        """Kills the commands a few times; returns the number of kills, and what is wrong in the end."""
        folder, kills = self.folder("try"), 0
        try:
            for words, seconds in zip(self.kind.commands(folder, self.shared), self.seconds, strict=True):
                for _ in range(self.rng.randint(1, MOST_KILLS)):
                    process = start(words, self.env(folder), self.kind.processes)
                    if not wait_and_kill(process, self.rng, seconds, [folder]):
                        if process.returncode:
                            return kills, f"refused: {said(process)}"
                        break
                    kills += 1
                call(words, self.env(folder), self.kind.processes)
        except RuntimeError as error:
            return kills, f"refused: {error}"
        return kills, self.differences(contents(folder))

    def differences(self, found: dict[str, str]) -> str:
        # Without the lock and begin files, which are empty and stay.
        names = {name for name in found.keys() ^ self.expected.keys() if not re.search(r"\.(lock|begin)$", name)}
        changed = [name for name in found.keys() & self.expected.keys() if found[name] != self.expected[name]]
        left = [f"left over: {name}" for name in sorted(names & found.keys())]
        missing = [f"missing: {name}" for name in sorted(names - found.keys())]
        return "; ".join([*left, *missing, *(f"differs: {name}" for name in sorted(changed))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="kills in all")
    parser.add_argument("--kind", choices=sorted(KINDS), action="append", help="only these commands")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    kinds = options.kind or list(KINDS)
    wrong = 0
    load_libraries()
    skip_plots()
    print("| commands | kills | series | ended the same | else |\n|---|---|---|---|---|")
    for number, name in enumerate(kinds):
        with tempfile.TemporaryDirectory(prefix="funmatch-chaos-") as place:
            chaos = Chaos(KINDS[name], Path(place) / name, random.Random(f"{options.seed}-{name}"))
            wanted = options.kills * (number + 1) // len(kinds) - options.kills * number // len(kinds)
            kills, series, problems = 0, 0, Counter[str]()
            while kills < wanted:
                more, problem = chaos.attempt()
                kills, series = kills + more, series + 1
                if problem:
                    problems[problem] += 1
            wrong += sum(problems.values())
            told = "; ".join(f"{count} × {problem}" for problem, count in problems.items()).replace("\n", " ")
            print(f"| {name} | {kills} | {series} | {series - sum(problems.values())} | {told or '–'} |", flush=True)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
