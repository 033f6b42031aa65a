"""Ctrl-C and SIGTERM end a run between two steps, however they arrive."""

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
    with signals.catch_signals() as caught:
        send_together()
    assert len(caught) == 1
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
    with signals.catch_signals() as caught:
        signal.raise_signal(signal.SIGINT)
        assert caught == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_later_sigterm_ends_the_process(first):
    code = f"""
import signal
from funmatch.runtime import signals
signals.TOGETHER_SECONDS = 0.0
with signals.catch_signals() as caught:
    signal.raise_signal({int(first)})
    signal.raise_signal(signal.SIGTERM)
    print("still here")
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGTERM
    assert not ended.stdout
    assert "Traceback" not in ended.stderr
