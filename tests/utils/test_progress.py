"""What is said of a long loop."""

import sys

import pytest

from gkd_d2.utils import progress
from gkd_d2.utils.progress import duration, track


@pytest.fixture
def clock(monkeypatch):
    """A list whose one number is the time in seconds."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_few_lines(clock, capsys):
    """Of 100 items that take 10 s each: the first, every third, and the last."""
    given = []
    for item in track(range(100), total=100, title="images"):
        given.append(item)
        clock[0] += 10
    assert given == list(range(100))
    output = capsys.readouterr()
    lines = output.err.splitlines()
    assert lines[:2] == ["images: 1 of 100, 16 min left", "images: 4 of 100, 16 min left"]
    assert lines[-2:] == ["images: 97 of 100, 30 s left", "images: 100 of 100, in 17 min"]
    assert len(lines) == 34
    assert output.out == ""


def test_a_quick_loop_is_silent(clock, capsys):
    for _ in track(range(4), total=4, title="images"):
        clock[0] += 1
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(track("ab", total=2, title="images")) == ["a", "b"]
    output = capsys.readouterr().err
    assert "images: 100%" in output and "2/2" in output and "\r" in output


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (89.4, "89 s"), (90, "2 min"), (2400, "40 min"), (5400, "1 h 30 min"), (12000, "3 h 20 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
