"""Times of calls, side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from gkd_d2.utils.progress import track


def milliseconds(
    calls: Sequence[Callable[[], object]], *, repeats: int, warm_up: int = 2, device: str = "cpu"
) -> list[float]:
    """The median time of every call, the calls taking turns. Shows its progress.

    Args:
        calls: what is timed.
        repeats: turns that count.
        warm_up: turns before them.
        device: that the calls give work to; the clock is read once it has done all of it.
    """
    times: list[list[float]] = [[] for _ in calls]
    turns = warm_up + repeats
    for turn in track(range(turns), total=turns, title="turns of the time's measurement"):
        for call, measured in zip(calls, times):
            begin = _now(device)
            call()
            elapsed = _now(device) - begin
            if turn >= warm_up:
                measured.append(1e3 * elapsed)
    return [statistics.median(measured) for measured in times]


def _now(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()
