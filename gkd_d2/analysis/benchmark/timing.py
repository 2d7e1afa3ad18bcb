"""Times and peaks of memory, on a CPU and on a GPU alike."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

from gkd_d2.utils.text import counted

_Quantity = TypeVar("_Quantity")
_Result = TypeVar("_Result")


@dataclasses.dataclass(frozen=True)
class Rounds:
    """How often everything is timed.

    Attributes:
        timed: rounds that count.
        warm_up: rounds before them.
    """

    timed: int
    warm_up: int


class Timer:
    """Times calls on the device's own clock, in milliseconds.

    Args:
        device: "cpu" or "cuda".

    Attributes:
        cuda: whether that is a GPU.
    """

    def __init__(self, device: str):
        self.cuda = device == "cuda"

    def __call__(self, run: Callable[[], _Result]) -> tuple[_Result, float]:
        """What ``run`` returns, and how long it took."""
        if self.cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # Half a millisecond in which the host enqueues what is timed, so that the device finds it ready.
            torch.cuda._sleep(1_000_000)
            start.record()
            result = run()
            end.record()
            end.synchronize()
            return result, start.elapsed_time(end)
        begin = time.perf_counter()
        result = run()
        return result, 1e3 * (time.perf_counter() - begin)


def take_turns(
    subjects: Mapping[str, Callable[[int], tuple[_Quantity, ...]]], rounds: Rounds
) -> dict[str, list[list[_Quantity]]]:
    """Measure several subjects side by side: each runs once a round, so that a busy machine favours none.

    Args:
        subjects: name -> function of the round's number that returns what it measured, always as many quantities.
        rounds: how many.

    Returns:
        Name -> for each quantity its values, one for each round that counts.
    """
    measured: dict[str, list[tuple[_Quantity, ...]]] = {name: [] for name in subjects}
    for turn in range(rounds.warm_up + rounds.timed):
        for name, run in subjects.items():
            quantities = run(turn)
            if turn >= rounds.warm_up:
                measured[name].append(quantities)
    return {name: [list(column) for column in zip(*rows)] for name, rows in measured.items()}


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """The most memory that torch's allocator holds during a call, beside what it held before.

    Args:
        run: the call.
        device: "cpu" or "cuda"; memory elsewhere is not counted.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    held = peak = 0
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return peak


def device_name(device: str, cpu: str = "CPU") -> str:
    """The GPU's name; for a CPU, which has none that torch knows, ``cpu`` with the number of threads."""
    return torch.cuda.get_device_name() if device == "cuda" else f"{cpu}, {counted(torch.get_num_threads(), 'thread')}"
