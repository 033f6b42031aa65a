"""Ends commands at every place where they write, and checks that the same commands end as if nothing had happened.

    python tests/write_sites.py --kind plain --kind tape
    python tests/write_sites.py --every        # each call, not only the first and the last of a line of code

A command runs in a forked process in which the functions that change a disk are watched. One try ends the process
before, another after one of these calls, at once, as SIGKILL does: no `finally` runs, nothing buffered is written. Then
the same commands are started again, to their end. What they leave must be that of the undisturbed commands: the same
files, with the same content but for times and places, no folder more, and none of them refused.

Files that libraries write by themselves, as safetensors does, count with the calls around them.
"""

import argparse
import builtins
import ctypes
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chaos import STUDY, contents, write_images
from forked import code_of, load_libraries, skip_plots
from make_images import write_few

CALLS = (
    "replace", "rename", "unlink", "remove", "rmdir", "mkdir", "fsync", "truncate", "symlink", "link", "pwrite",
)  # fmt: skip
"""Functions of `os` that change a disk; pathlib, shutil and tempfile call these too."""
FRAMES = 6
"""Frames of funmatch that tell one call from another."""
SECONDS = 120
"""A command may take at most; one that hangs counts as refused."""
KILLED = 137
FEWEST = write_few(1, training_images=2)
SMALLEST = [
    "--data", FEWEST, "--student", "fashion-mini-student", "--batch", "4", "--save-every", "2", "--eval-every", "2",
    "--log-every", "1",
]  # fmt: skip
TINY = [*SMALLEST, "--teacher", "fashion-mini-teacher", "--steps", "4"]
Words = list[str]
Site = tuple[str, ...]
"""The name of a call, and the lines of funmatch that lead to it, the innermost first."""


@dataclass(frozen=True, order=True)
class Place:
    """One call of a series of commands.

    Attributes:
        site: what is called, and from where.
        number: of the calls there, in the order in which they come.
        after: whether the process ends after it, not before.
    """

    site: Site
    number: int = 0
    after: bool = False

    def __str__(self) -> str:
        when = "after" if self.after else "before"
        return f"{when} {self.site[0]} number {self.number} at {' < '.join(self.site[1:4])}"


@dataclass
class Watch:
    """Counts the calls that change a disk, and ends the process at one of them.

    Attributes:
        wanted: whether to end at a place.
        seen: calls by site.
    """

    wanted: Callable[[Place], bool]
    seen: Counter[Site] = field(default_factory=Counter)
    lock: Any = field(default_factory=threading.Lock)

    def install(self) -> None:
        for name in CALLS:
            setattr(os, name, self._watched(name, getattr(os, name)))
        opened = io.open
        builtins.open = io.open = self._watched(
            "open", opened, lambda _path, mode="r", *_: any(c in mode for c in "wax+")
        )
        os.open = self._watched("create", os.open, lambda _path, flags, *_: bool(flags & os.O_CREAT))

    def _watched(
        self, name: str, function: Callable[..., Any], changes: Callable[..., bool] = lambda *_: True
    ) -> Callable[..., Any]:
        def watched(*arguments: Any, **options: Any) -> Any:
            given = (*arguments, options["mode"]) if "mode" in options and name == "open" else arguments
            site = _site(name) if changes(*given) else None
            if site is None:
                return function(*arguments, **options)
            with self.lock:
                number = self.seen[site]
                self.seen[site] += 1
            self._end(Place(site, number))
            result = function(*arguments, **options)
            self._end(Place(site, number, after=True))
            return result

        return watched

    def _end(self, place: Place) -> None:
        if self.wanted(place):
            os._exit(KILLED)


def _site(name: str) -> Site | None:
    """Returns the site of a call; None if it is not one of funmatch's, as Python's own when it imports a module."""
    found, frame = [], sys._getframe(2)
    while frame is not None and len(found) < FRAMES:
        where = frame.f_code.co_filename
        if "/funmatch/" in where:
            found.append(f"{where.rpartition('/funmatch/')[2]}:{frame.f_lineno}")
        elif where.startswith("<frozen importlib"):
            return None
        frame = frame.f_back
    return (name, *found) if found else None


class InlineProcess:
    """Stands for the process of a study's run: a forked one that is not watched, and ends with the study's own."""

    def __init__(self, words: Words, *, stdout: Any, **_: Any) -> None:
        self.pid = os.fork()
        if self.pid == 0:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)
            watching.wanted = lambda _place: False
            for number in (1, 2):
                os.dup2(stdout.fileno(), number)
            os._exit(code_of(words[3:]))
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self.wait()

    def terminate(self) -> None: ...

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode


watching = Watch(lambda _place: False)


def carry_out(words: Words, env: dict[str, str], wanted: Callable[[Place], bool]) -> tuple[int, Counter[Site], str]:
    """Carries out a command in a forked process.

    Returns:
        its exit code, the calls that it came to (none where it was ended), and what it printed.
    """
    load_libraries()
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as sites:
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            try:
                for number in (1, 2):
                    os.dup2(said.fileno(), number)
                sys.stdout, sys.stderr = (os.fdopen(os.dup(n), "w") for n in (1, 2))
                os.environ.update(env)
                _prepare_child()
                watching.wanted = wanted
                watching.install()
                code = code_of(words)
                watching.wanted = lambda _place: False
                sites.write(json.dumps([[*site, count] for site, count in watching.seen.items()]).encode())
                sites.flush()
            except BaseException as error:
                os.write(2, f"{type(error).__name__}: {error}".encode())
                code = 1
            os._exit(code)
        code = _wait(pid)
        said.seek(0)
        sites.seek(0)
        found = Counter({tuple(site): count for *site, count in json.loads(sites.read() or b"[]")})
        return code, found, said.read().decode(errors="replace")[-1500:]


def _prepare_child() -> None:
    """Leaves out what takes time and writes nothing: curves; and starts a study's runs in forked processes."""
    from funmatch.commands.study import runner
    from funmatch.training.teachers import predictions

    skip_plots()
    predictions.LEAST_SECONDS = 0.0  # else the time decides what is left
    runner.subprocess = type("Inline", (), {"Popen": InlineProcess, "DEVNULL": subprocess.DEVNULL})
    runner.POLL_SECONDS = 0.0


def _wait(pid: int) -> int:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return 1


@dataclass(frozen=True)
class Kind:
    """Commands to end.

    Attributes:
        commands: the words of each, given the folder for what they write, and one that all tries share.
        prepare: makes what they read.
        begin: makes what they change, in a new folder.
    """

    commands: Callable[[Path, Path], list[Words]]
    prepare: Callable[[Path], object] = lambda _shared: None
    begin: Callable[[Path, Path], object] = lambda _folder, _shared: None


def one(*words: str) -> Callable[[Path, Path], list[Words]]:
    """Returns a command in which OUT stands for the folder, and IN for the shared one."""
    return lambda out, shared: [[word.replace("OUT", str(out)).replace("IN/", f"{shared}/") for word in words]]


def series(*commands: Callable[[Path, Path], list[Words]]) -> Callable[[Path, Path], list[Words]]:
    return lambda out, shared: [words for each in commands for words in each(out, shared)]


def finish_run(shared: Path) -> None:
    """Makes a finished run."""
    code, _, said = carry_out(["distill", *TINY, "--out", str(shared / "run")], {}, lambda _place: False)
    assert code == 0, said


def copy_run(folder: Path, shared: Path) -> None:
    shutil.copytree(shared / "run", folder / "run", copy_function=shutil.copy2)


def some_images(shared: Path) -> None:
    """Keeps a tenth of the images of noise."""
    write_images(shared)
    for path in (shared / "images").rglob("*.png"):
        if int(path.stem) % 10 > 1:
            path.unlink()


def write_study(shared: Path) -> None:
    text = STUDY.replace('"fashion-mini"', json.dumps(FEWEST)).replace("= 30", "= 4").replace("= 20", "= 2")
    (shared / "study.toml").write_text(text.replace("save_every = 10", "save_every = 2\neval_every = 2"))


WSD = ["distill", *TINY, "--schedule", "wsd", "--ema", "0.9", "--out", "OUT/run"]
RUN = ["distill", *TINY, "--ema", "0.9", "--keep", "best", "--out", "OUT/run"]
KINDS = {
    "plain": Kind(one(*RUN)),
    "labels": Kind(one("train", *SMALLEST, "--steps", "2", "--val", "none", "--out", "OUT/run")),
    "wsd": Kind(series(one(*WSD), one(*WSD, "--steps", "8"))),
    "students": Kind(one("distill", *TINY, "--student", "fashion-mini-teacher", "--out", "OUT/runs")),
    "tape": Kind(one("distill", *TINY, "--tape", "OUT/tape", "--out", "OUT/run")),
    "fixed": Kind(one("distill", *TINY, "--strategy", "fix/cc", "--out", "OUT/run")),
    "head": Kind(one("head", "--data", FEWEST, "--model", "fashion-mini-teacher", "--C", "0.1", "--out", "OUT/head")),
    "tune": Kind(one("tune", "distill", *TINY, "--space", "lr=1e-3,3e-3", "--trials", "2", "--out", "OUT/search")),
    "study": Kind(one("study", "IN/study.toml", "--jobs", "1", "--out", "OUT/study"), write_study),
    "prepare": Kind(
        series(one("prepare", "IN/images", "--val", "4"), one("prepare", "IN/images")), some_images
    ),
    "shards": Kind(
        one("prepare", "IN/images", "--to", "tfrecord", "--shard-size", "9", "--out", "OUT/shards"), some_images
    ),
    # With --overwrite, since the end may come after everything is done.
    "export": Kind(
        one("export", "OUT/run", "--format", "timm", "--out", "OUT/exported"), finish_run, copy_run
    ),
    "reports": Kind(
        series(
            one("report", "OUT/run"), one("evaluate", "OUT/run"),
            one("predict", "OUT/run", f"{FEWEST}/test", "--overwrite", "--out", "OUT/rows.csv"),
        ), finish_run, copy_run,
    ),
}  # fmt: skip


@dataclass
class Tries:
    """Tries of one kind.

    Attributes:
        kind: the commands.
        place: a folder for everything.
    """

    kind: Kind
    place: Path

    def __post_init__(self) -> None:
        self.shared = self.place / "shared"
        self.shared.mkdir(parents=True)
        self.kind.prepare(self.shared)
        folder = self.begin()
        self.calls: list[Counter[Site]] = []
        for words in self.kind.commands(folder, self.shared):
            code, calls, said = carry_out(words, self.env(folder), lambda _place: False)
            assert code == 0, said
            self.calls.append(calls)
        self.expected = left_in(folder)

    def begin(self) -> Path:
        # The same name for all: paths are recorded.
        folder = self.place / "try"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        self.kind.begin(folder, self.shared)
        return folder

    def env(self, folder: Path) -> dict[str, str]:
        # A cache of its own, since caches are written to; but for the compiled kernels, which take a minute.
        (folder / "cache").mkdir(exist_ok=True)
        return {"FUNMATCH_CACHE": str(folder / "cache"), "FUNMATCH_NATIVE": "0"}

    def places(self, *, every: bool) -> Iterator[tuple[int, Place]]:
        """Yields the places to end at, with the numbers of their commands."""
        for command, calls in enumerate(self.calls):
            for site, count in sorted(calls.items()):
                for number in range(count) if every else sorted({0, count - 1}):
                    for after in (False, True):
                        yield command, Place(site, number, after)

    def attempt(self, command: int, place: Place) -> str:
        """Ends a command at a place, and starts it again; returns what is wrong in the end."""
        folder = self.begin()
        for number, words in enumerate(self.kind.commands(folder, self.shared)):
            if number == command:
                code, _, said = carry_out(words, self.env(folder), lambda each: each == place)
                if code not in (KILLED, 0):
                    return f"exit {code} before it came to the place: {said}"
            code, _, said = carry_out(words, self.env(folder), lambda _place: False)
            if code:
                return f"refused: {said}"
        return differences(self.expected, left_in(folder))

    def march(self, chosen: Callable[[Place], bool] = lambda _place: True, most: int = 1000) -> tuple[int, str]:
        """Ends one series of commands again and again, each time at the first place where none ended before.

        Args:
            chosen: tells at which places.
            most: ends of one command, at most.

        Returns:
            how often it ended, and what is wrong in the end.
        """
        folder, ends = self.begin(), set[Place]()
        for number, words in enumerate(self.kind.commands(folder, self.shared)):
            for _ in range(most):
                where = self.place / "ended"

                def is_new(each: Place, number: int = number, where: Path = where) -> bool:
                    if each.number or not chosen(each) or (new := Place(each.site, number, each.after)) in ends:
                        return False
                    where_text = json.dumps([*new.site, new.after])
                    try:
                        with unwatched_open(where, "x") as file:
                            file.write(where_text)
                    except FileExistsError:  # another thread ends the process just now
                        return False
                    return True

                where.unlink(missing_ok=True)
                code, _, said = carry_out(words, self.env(folder), is_new)
                if code != KILLED:
                    break
                *site, after = json.loads(where.read_text())
                ends.add(Place(tuple(site), number, after))
            if code:
                return len(ends), f"refused: {said}"
        return len(ends), differences(self.expected, left_in(folder))


unwatched_open = io.open


def left_in(folder: Path) -> dict[str, str]:
    """Returns digests of the files in a folder, and the names of its folders."""
    return contents(folder) | {f"{path.relative_to(folder)}/": "" for path in folder.rglob("*") if path.is_dir()}


def differences(expected: dict[str, str], found: dict[str, str]) -> str:
    """Describes what a series that was ended left otherwise than it should; empty for nothing."""
    # Without the lock and begin files, which are empty and stay.
    names = {name for name in found.keys() ^ expected.keys() if not name.endswith((".lock", ".begin"))}
    lines = [f"{'left over' if name in found else 'missing'}: {name}" for name in sorted(names)]
    changed = [name for name in found.keys() & expected.keys() if found[name] != expected[name]]
    return "; ".join([*lines, *(f"differs: {name}" for name in sorted(changed))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=sorted(KINDS), action="append", help="only these commands")
    parser.add_argument("--every", action="store_true", help="every call of a line of code, not the first and last")
    parser.add_argument("--march", action="store_true", help="one series, ended at each place in turn")
    options = parser.parse_args()
    wrong = 0
    print("| commands | calls | lines of code | ends | ended the same | else |\n|---|---|---|---|---|---|")
    for name in options.kind or list(KINDS):
        with tempfile.TemporaryDirectory(prefix="funmatch-sites-") as home:
            tries = Tries(KINDS[name], Path(home) / name)
            problems: dict[str, list[str]] = defaultdict(list)
            if options.march:
                ends, problem = tries.march()
                if problem:
                    problems[problem].append("march")
            else:
                ends = 0
                for command, place in tries.places(every=options.every):
                    ends += 1
                    if problem := tries.attempt(command, place):
                        problems[problem].append(str(place))
            bad = sum(map(len, problems.values()))
            wrong += bad
            calls, lines = sum(c.total() for c in tries.calls), len({(s[0], s[1]) for c in tries.calls for s in c})
            print(f"| {name} | {calls} | {lines} | {ends} | {ends - bad} | {'–' if not bad else 'below'} |", flush=True)
            for problem, places in problems.items():
                print(f"{problem}\n   " + "\n   ".join(places), file=sys.stderr, flush=True)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
