"""The clock that divides a step's time, by hand."""

import time

import pytest

from gkd_d2.analysis.benchmark.phases import PhaseClock


def test_time_belongs_to_the_innermost_phase(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = PhaseClock("cpu")

    def spend(seconds):
        now[0] += seconds

    def whole(seconds):
        spend(seconds)
        inner(4 * seconds)
        spend(seconds)
        return "done"

    inner = clock.during("inner", spend)
    outer = clock.during("outer", whole)
    clock.switch("before")
    spend(0.001)
    assert outer(0.002) == "done"
    spend(0.003)
    clock.switch("after")
    spend(0.005)
    assert clock.finish() == pytest.approx({"before": 4.0, "outer": 4.0, "inner": 8.0, "after": 5.0})
    # What lies between two steps belongs to none.
    spend(1.0)
    clock.switch("after")
    spend(0.006)
    assert clock.finish() == pytest.approx({"after": 6.0})
