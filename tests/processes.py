"""Processes that tests look at from outside."""

from __future__ import annotations

import os
import time

# Seconds after which a test gives up on what hangs: far more than anything takes, for others may use the cores, too.
PATIENCE = 300


def is_alive(pid: int) -> bool:
    """Whether a process is there, if only to be waited for."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(condition) -> None:
    """Wait until a function of no arguments returns something true."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "what was waited for did not come"
        time.sleep(0.02)
