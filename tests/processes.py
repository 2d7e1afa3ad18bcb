"""Processes that tests look at from outside."""

from __future__ import annotations

import os


def is_alive(pid: int) -> bool:
    """Whether a process is there, if only to be waited for."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
