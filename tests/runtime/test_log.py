"""The progress bar asks for what it shows only when it draws."""

import re

import pytest
from rich.console import Console

from funmatch.runtime import log
from funmatch.runtime.text import format_rate


@pytest.fixture(name="clock")
def clock_set_by_hand(monkeypatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    return now


def test_plain_line_shows_note_rate_and_time_left(clock, capsys):
    asked = []

    def note() -> str:
        asked.append(clock[0])
        return f"loss {len(asked)}"

    with log.ProgressBar("train", 100) as bar:
        for step in range(1, 41):
            clock[0] = 0.5 * step
            bar.update(step, note)
    # Forty steps in twenty seconds, a line every ten.
    assert asked == [10.0, 20.0], "a note may wait for the device, so it is not asked for at every step"
    assert capsys.readouterr().err.splitlines() == [
        "train 20/100 loss 1 2.0/s, 0:40 left",
        "train 40/100 loss 2 2.0/s, 0:30 left",
    ]


def test_bar_on_a_terminal_has_a_note_from_the_first_step_on(clock, monkeypatch):
    monkeypatch.setattr(log.err, "_force_terminal", True)
    bar, asked = log.ProgressBar("train", 100), []
    for step in range(1, 31):
        clock[0] = 0.1 * step
        bar.update(step, lambda: asked.append(clock[0]) or "loss 1")
    assert len(asked) == 3
    assert asked[0] == 0.1
    assert bar.columns.tasks[0].fields["note"].startswith("loss 1 ")
    assert bar.columns.tasks[0].completed == 30


def test_slow_steps_have_a_rate():
    assert [format_rate(rate) for rate in (0.123, 2.34, 1234.5)] == ["0.12/s", "2.3/s", "1,234/s"]


@pytest.mark.parametrize("width", [60, 80, 200])
def test_time_left_is_shown_on_a_narrow_terminal(clock, monkeypatch, width):
    monkeypatch.setattr(log, "err", Console(width=width, force_terminal=True))
    bar = log.ProgressBar("finetune", 1000)
    for step in range(1, 31):
        clock[0] = float(step)
        bar.update(step, lambda: "loss 1.2345, top1 12.3 % and more than this")
    with log.err.capture() as shown:
        log.err.print(bar.columns)
    (line,) = re.sub(r"\x1b\[[0-9;]*m", "", shown.get()).splitlines()
    assert "30/1000" in line
    assert ("loss 1.2345, top1 12.3" if width > 60 else "loss 1") in line
    assert re.search(r"\d+:\d\d:\d\d left (-:--:--|\d+:\d\d:\d\d)$", line), line


def test_before_the_first_is_done_no_time_left_is_claimed(clock, capsys):
    with log.ProgressBar("study", 9, 3) as bar:
        clock[0] = 11.0
        bar.update(3, "first (0)")
        clock[0] = 22.0
        bar.update(4, "second (0)")
    assert capsys.readouterr().err.splitlines() == [
        "study 3/9 first (0)",
        "study 4/9 second (0) 0.05/s, 1:50 left",
    ]
