"""The parts of a training step, and a clock that divides its time among them."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable

import torch

from gkd_d2.modeling.distiller import GKDDistiller

TEACHER_FORWARD, TEACHER_GRADIENT = "teacher forward", "teacher gradient"
STUDENT_FORWARD, HEADS_GRADIENT = "student forward", "heads' gradient"
LOSSES, BACKWARD, OPTIMIZER = "distillation losses", "backward", "optimizer"
# Of a distilled step, and of the student's own.
PHASES = (TEACHER_FORWARD, TEACHER_GRADIENT, STUDENT_FORWARD, HEADS_GRADIENT, LOSSES, BACKWARD, OPTIMIZER)
PLAIN_PHASES = (STUDENT_FORWARD, BACKWARD, OPTIMIZER)


class PhaseClock:
    """Divides the time on the device's own clock among phases, in milliseconds.

    Args:
        device: "cpu" or "cuda".
    """

    def __init__(self, device: str):
        self._cuda = device == "cuda"
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []

    def switch(self, phase: str) -> str:
        """A phase begins; returns the one that it ends or interrupts."""
        mark = time.perf_counter()
        if self._cuda:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        previous = self._marks[-1][0] if self._marks else ""
        self._marks.append((phase, mark))
        return previous

    def during(self, phase: str, function: Callable) -> Callable:
        """``function``, whose time belongs to ``phase`` but for what inner calls claim."""

        @functools.wraps(function)
        def timed(*args, **kwargs):
            outer = self.switch(phase)
            result = function(*args, **kwargs)
            self.switch(outer)
            return result

        return timed

    def finish(self) -> dict[str, float]:
        """Phase -> its time since the last call."""
        self.switch("")
        marks, self._marks = self._marks, []
        times: dict[str, float] = {}
        if self._cuda:
            marks[-1][1].synchronize()
        for (phase, begin), (_, end) in itertools.pairwise(marks):
            elapsed = begin.elapsed_time(end) if self._cuda else 1e3 * (end - begin)
            times[phase] = times.get(phase, 0.0) + elapsed
        return times


def claim_phases(distiller: GKDDistiller, clock: PhaseClock) -> None:
    """Let the distiller's parts tell the clock when they work; what is left to the outer ones are gradients."""
    teacher = distiller._teacher
    for owner, method, phase in (
        (teacher, "observe", TEACHER_GRADIENT),
        (teacher, "responses", TEACHER_FORWARD),
        (teacher.split, "features", TEACHER_FORWARD),
        (teacher.split, "losses", TEACHER_FORWARD),
        (distiller, "observe", HEADS_GRADIENT),
        (distiller._split, "features", STUDENT_FORWARD),
        (distiller._split, "losses", STUDENT_FORWARD),
        (distiller, "distil", LOSSES),
    ):
        setattr(owner, method, clock.during(phase, getattr(owner, method)))
