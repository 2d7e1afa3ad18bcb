"""Turns and peaks of memory by hand."""

import torch

from gkd_d2.analysis.benchmark.timing import Rounds, peak_bytes, take_turns


def test_subjects_take_turns_and_the_warm_up_does_not_count():
    calls = []

    def subject(name):
        def run(turn):
            calls.append(f"{name}{turn}")
            return turn, 10 * turn

        return run

    found = take_turns({name: subject(name) for name in "ab"}, Rounds(timed=2, warm_up=1))
    assert calls == ["a0", "b0", "a1", "b1", "a2", "b2"]
    assert found == {"a": [[1, 2], [10, 20]], "b": [[1, 2], [10, 20]]}


def test_the_peak_is_what_is_held_at_a_time():
    before = torch.zeros(1_000_000)

    def run():
        one = before + 1
        two = one + 1
        del one
        return two[:10] + 1

    # Two million numbers at a time, the first million not counted; then one million and a few.
    assert 8_000_000 <= peak_bytes(run, "cpu") < 8_100_000
