"""Carries out commands in forked processes, which find all libraries loaded: a fresh process takes seconds for that."""

import importlib
import os
import pkgutil
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from functools import cache
from typing import Any

import funmatch
from funmatch import cli
from funmatch.models import names

FIRST_WORDS = ["-m", "funmatch"]
"""Words before the command's own, which a forked process leaves out."""


@cache
def load_libraries() -> None:
    """Imports what commands import, once for all forked processes."""
    for module in pkgutil.walk_packages(funmatch.__path__, "funmatch."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    names.timm_names()
    cli.parse(["report", "a-run"])


def code_of(words: list[str]) -> int:
    """Carries out a command in this process; returns its exit code."""
    try:
        cli.main(words)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def skip_plots() -> None:
    """Leaves out the curves of pages: they take a third of a second, and are drawn in memory."""
    from funmatch.reports import run_plots

    run_plots.plot = lambda *_: "<svg/>"


class ForkedProcess:
    """A command in a forked process; as much of `subprocess.Popen` as is needed.

    Attributes:
        pid: the process.
        returncode: its exit code, negative for a signal; None while it runs.
        seconds: of processor time that it and its children took, once it has ended.
    """

    def __init__(self, work: Callable[[], int], output: Any) -> None:
        load_libraries()
        sys.stdout.flush()
        sys.stderr.flush()
        self.returncode: int | None = None
        self.seconds = 0.0
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                _leave_parent(output.fileno())
                code = work()
                sys.stdout.flush()
                sys.stderr.flush()
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)

    def poll(self) -> int | None:
        return self._look(os.WNOHANG)

    def wait(self) -> int:
        code = self._look(0)
        assert code is not None
        return code

    def terminate(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)

    def _look(self, how: int) -> int | None:
        if self.returncode is None:
            done, status, usage = os.wait4(self.pid, how)
            if done:
                self.returncode, self.seconds = os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
        return self.returncode


class StudyProcess(ForkedProcess):
    """Stands for `subprocess.Popen` in a study, which starts each run by it."""

    def __init__(self, words: list[str], *, stdout: Any, env: dict[str, str], preexec_fn: Any, **_: Any) -> None:
        def work() -> int:
            os.environ.update(env)
            preexec_fn()
            return code_of(words[1 + len(FIRST_WORDS) :])

        super().__init__(work, stdout)


def start_command(words: list[str], env: dict[str, str], output: Any, *, processes: int = 1) -> ForkedProcess:
    """Starts a command in one process, or in several that train together, as torchrun starts them."""

    def work() -> int:
        from funmatch.commands.study import runner

        runner.subprocess = type("Forked", (), {"Popen": StudyProcess, "DEVNULL": None})  # type: ignore[misc]
        os.environ.update(env)
        own = words[len(FIRST_WORDS) :]
        return code_of(own) if processes == 1 else _code_of_ranks(own, output, processes)

    return ForkedProcess(work, output)


def _code_of_ranks(words: list[str], output: Any, processes: int) -> int:
    """Carries out a command in several processes; returns the first exit code that is not 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}

    def rank(number: int) -> ForkedProcess:
        def work() -> int:
            os.environ.update(shared, RANK=str(number), LOCAL_RANK=str(number))
            return code_of(words)

        return ForkedProcess(work, output)

    return next((code for each in [rank(number) for number in range(processes)] if (code := each.wait())), 0)


def _leave_parent(output: int) -> None:
    """Makes a forked process one of its own: its output, its session, and no handler of signals that it inherited."""
    os.setsid()
    for number in (1, 2):
        os.dup2(output, number)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w") for number in (1, 2))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
