"""The progress display, in a terminal and in a log."""

from __future__ import annotations

import io
import re
import sys

import pytest

from gtl.cli.bar import Bar

DETAIL = "loss 0.1234  8.00 images/s"


class Screen(io.StringIO):
    """What a command prints to, which is a terminal or is none."""

    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What time it is, in seconds, for all who ask; to be moved on by a test."""
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_now_and_then_with_the_time_left(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Screen(is_terminal=False)
    monkeypatch.setattr(sys, "stderr", log)
    bar = Bar()
    bar("model", 0, 0, "builtin:tiny")
    for step in range(100, 201):  # a run that goes on after 100 steps, and makes one in two seconds
        bar("train", step, 200, DETAIL)
        clock[0] += 2
    bar("look", 0, 0, "step 200  val_loss 0.5")
    bar.close()
    lines = log.getvalue().splitlines()
    assert lines[:4] == [
        "model builtin:tiny",
        f"train 100/200 {DETAIL}",  # nothing to judge by yet
        f"train 106/200 {DETAIL}  3 min left",
        f"train 112/200 {DETAIL}  3 min left",
    ]
    assert lines[-3:] == [
        f"train 196/200 {DETAIL}  8.0 s left",
        f"train 200/200 {DETAIL}",
        "look step 200  val_loss 0.5",
    ]
    assert len(lines) == 1 + 1 + 16 + 1 + 1


def test_a_rate_is_of_its_own_phase(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    log = Screen(is_terminal=False)
    monkeypatch.setattr(sys, "stderr", log)
    bar = Bar()
    for phase, seconds in (("encode", 20), ("train", 1200)):
        bar(phase, 0, 4)
        clock[0] += seconds
        bar(phase, 1, 4)
    assert log.getvalue().splitlines() == [
        "encode 0/4", "encode 1/4  1 min left", "train 0/4", "train 1/4  1 h 00 min left",
    ]  # fmt: skip


def test_a_terminal_shows_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    screen = Screen(is_terminal=True)
    monkeypatch.setattr(sys, "stderr", screen)
    bar = Bar()
    bar("model", 0, 0, "builtin:tiny")
    for step in range(1, 5):
        bar("train", step, 8, DETAIL)
    bar.close()
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    assert "builtin:tiny" in shown
    last = re.split(r"[\r\n]+", shown.rstrip())[-1]
    assert re.fullmatch(rf"train +\S+ +4/8 {re.escape(DETAIL)} (\d:\d\d:\d\d|-:--:--) *", last), last
    assert bar._live is None
