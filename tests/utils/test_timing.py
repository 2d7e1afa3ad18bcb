"""Times against clocks of the test's own."""

import time

from gkd_d2.utils.timing import milliseconds


def test_times_are_medians_of_turns_after_a_warm_up():
    log = []

    def sleeper(name, seconds):
        def sleep():
            log.append(name)
            time.sleep(seconds.pop(0))

        return sleep

    slow, fast = sleeper("slow", [0.5, 0.02, 0.5, 0.02]), sleeper("fast", [0.0, 0.005, 0.005, 0.005])
    times = milliseconds([slow, fast], repeats=3, warm_up=1)
    assert log == ["slow", "fast"] * 4
    assert 20 <= times[0] < 150
    assert 5 <= times[1] < 100
