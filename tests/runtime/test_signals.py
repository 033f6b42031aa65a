"""Signals end a run between two steps, however they arrive, and other commands in one line."""

import os
import signal
import subprocess
import sys

import pytest

from funmatch.runtime import signals

BOTH = {signal.SIGINT, signal.SIGTERM}


def send_together() -> None:
    """Sends both signals so that both have arrived before Python handles either."""
    # In C, without a bytecode between them; the handlers run when the call returns.
    signal.pthread_sigmask(signal.SIG_BLOCK, BOTH)
    for number in BOTH:
        os.kill(os.getpid(), number)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, BOTH)


def test_both_signals_at_once_are_one_request(capsys):
    # An error in a handler that Python cannot raise is a warning here, and so fails the test.
    before = [signal.getsignal(number) for number in BOTH]
    with signals.catch_signals() as requests:
        send_together()
    assert requests.stop in BOTH
    assert capsys.readouterr().err.splitlines() == ["finishing this step, then saving; press Ctrl-C again to quit now"]
    assert [signal.getsignal(number) for number in BOTH] == before


@pytest.fixture
def python_handles_ctrl_c():
    """Python's own handler, also in a process that was started in the background, where Ctrl-C is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("python_handles_ctrl_c")
def test_second_ctrl_c_acts_at_once():
    with signals.catch_signals() as requests:
        signal.raise_signal(signal.SIGINT)
        assert requests.stop == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_later_sigterm_ends_the_process(first):
    code = f"""
import signal
from funmatch.runtime import signals
signals.TOGETHER_SECONDS = 0.0
with signals.catch_signals():
    signal.raise_signal({int(first)})
    signal.raise_signal(signal.SIGTERM)
    print("still here")
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGTERM
    assert not ended.stdout
    assert "Traceback" not in ended.stderr


@pytest.fixture(params=["SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
def number(request):
    """A signal that ends a program by default; afterwards it is handled as before."""
    which = signal.Signals[request.param]
    before = signal.signal(which, signal.SIG_DFL)
    yield which
    signal.signal(which, before)


def test_other_signals_stop_a_run_too(number):
    with signals.catch_signals() as requests:
        signal.raise_signal(number)
        assert requests.stop == number
    assert signal.getsignal(number) is signal.SIG_DFL


def test_ignored_and_foreign_handlers_stay(number):
    """nohup ignores SIGHUP, so that a run outlives its terminal; a program around us may use signals itself."""
    for handler in (signal.SIG_IGN, lambda *_: None):
        signal.signal(number, handler)
        with signals.catch_signals() as requests:
            signal.raise_signal(number)
        assert not requests.stop
        assert signal.getsignal(number) is handler


def test_processor_time_that_is_over_is_one_request(monkeypatch):
    """The system sends SIGXCPU again each second until the run has saved."""
    monkeypatch.setattr(signals, "TOGETHER_SECONDS", 0.0)
    before = signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    with signals.catch_signals() as requests:
        for _ in range(3):
            signal.raise_signal(signal.SIGXCPU)
    assert requests.stop == signal.SIGXCPU
    signal.signal(signal.SIGXCPU, before)


def test_signals_for_saving_do_not_stop(capsys):
    before = signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    with signals.catch_signals(["usr1"]) as requests:
        for _ in range(2):
            signal.raise_signal(signal.SIGUSR1)
        assert (requests.saves, requests.stop) == (2, 0)
        signal.raise_signal(signal.SIGTERM)
        assert requests.stop == signal.SIGTERM
    assert capsys.readouterr().err.startswith("saving after this step\nsaving after this step\nfinishing this step")
    signal.signal(signal.SIGUSR1, before)


def end_of(code: str) -> tuple[int, str]:
    """Exit code and messages of a program that sends itself signals."""
    head = "import signal, sys, time\nfrom funmatch.runtime import signals\nsignals.exit_on_signals()\n"
    ended = subprocess.run([sys.executable, "-c", head + code], capture_output=True, text=True, check=False)
    return ended.returncode, ended.stderr


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_program_that_starts_ends_at_once(name):
    # In an import, whose library would make an error of its own of any exception.
    code = f"""
signal.signal(signal.SIGINT, signals._exit)  # also where the tests run in a shell's background
class Importing:
    def find_spec(self, *_): signal.raise_signal(signal.{name})
sys.meta_path.insert(0, Importing())
try: import funmatch.no_such_module
finally: print("not reached", file=sys.stderr)
"""
    assert end_of(code) == (128 + signal.Signals[name], "stopped\n")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_work_is_interrupted_by_an_exception_and_ended_by_a_second_signal(name):
    code = f"""
signal.signal(signal.SIGINT, signals._exit)
signals.raise_on_signals()
class Importing:
    def find_spec(self, *_): signal.raise_signal(signal.{name})
sys.meta_path.insert(0, Importing())
try: import funmatch.no_such_module
except ImportError: sys.meta_path.pop(0); print("imported first", file=sys.stderr)
try: time.sleep(60)
except signals.Interrupted as stopped: print(stopped, stopped.exit_code, file=sys.stderr)
signal.raise_signal(signal.{name})
print("not reached", file=sys.stderr)
"""
    number = 128 + signal.Signals[name]
    assert end_of(code) == (number, f"imported first\nstopped {number}\nstopped\n")
