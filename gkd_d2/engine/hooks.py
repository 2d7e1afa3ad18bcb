"""Hooks of a long run: checkpoints, the end that a signal asks for, and the watch over the distillation losses."""

from __future__ import annotations

import logging
import math
import os
import signal
import threading

import numpy as np
from detectron2.engine.hooks import HookBase
from detectron2.utils import comm

from gkd_d2.distiller import GKDDistiller
from gkd_d2.watch import TermReport

# What a shell reports of a process that SIGTERM ended.
EXIT_BY_SIGTERM = 128 + signal.SIGTERM
# For the iteration that is under way; Slurm's own limit is half of it by default.
GRACE_SECONDS = 60


class PeriodicSaver(HookBase):
    """Saves a checkpoint every so many iterations and at the end.

    It is called in all processes: what only one of them knows is part of a checkpoint, which Detectron2's
    PeriodicCheckpointer, called in the main process alone, can't gather.

    Args:
        period: in iterations.

    Raises:
        ValueError: it is below 1.
    """

    def __init__(self, period: int):
        if period < 1:
            raise ValueError(f"SOLVER.CHECKPOINT_PERIOD is {period}, but must be >= 1")
        self._period = period

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done >= self.trainer.max_iter:
            self.trainer.save("model_final")
        elif done % self._period == 0:
            self.trainer.save(f"model_{self.trainer.iter:07d}")


class SaveOnSigterm(HookBase):
    """On SIGTERM, which Slurm sends before a time limit, finishes the iteration, saves and ends the process.

    Where the iteration does not end within GRACE_SECONDS, as in the middle of an evaluation or waiting for a process
    that died, the process ends without saving.

    Raises:
        SystemExit: with EXIT_BY_SIGTERM, in all processes, when the checkpoint is written.
    """

    def __init__(self):
        self._asked = False
        self._deadline = threading.Timer(GRACE_SECONDS, os._exit, (EXIT_BY_SIGTERM,))
        self._deadline.daemon = True
        self._previous = signal.SIG_DFL

    def before_train(self) -> None:
        self._previous = signal.signal(signal.SIGTERM, self._ask)

    def after_step(self) -> None:
        # One process may get the signal an iteration before another.
        if not any(comm.all_gather(self._asked)):
            return
        self._deadline.cancel()
        if self.trainer.iter + 1 < self.trainer.max_iter:
            self.trainer.save(f"model_{self.trainer.iter:07d}")
        comm.synchronize()
        logging.getLogger(__name__).warning(
            "Stopped by SIGTERM after iteration %d; its state is saved: go on with --resume", self.trainer.iter
        )
        raise SystemExit(EXIT_BY_SIGTERM)

    def after_train(self) -> None:
        self._deadline.cancel()
        signal.signal(signal.SIGTERM, self._previous)

    def _ask(self, number: int, frame) -> None:
        if not self._asked:
            self._asked = True
            self._deadline.start()


class DeadLossError(RuntimeError):
    """A distillation loss teaches nothing, or something infinite."""


class LossWatch(HookBase):
    """Measures each distillation loss at each level every so many iterations, and stops a run whose loss is dead.

    The scalars of :meth:`gkd_d2.watch.TermReport.scalars` go to the EventStorage, averaged over the processes. A loss
    whose gradient at a level is exactly 0 in all processes, or not finite in one, is from then on measured in every
    iteration.

    Args:
        distiller: whose losses are watched; some weight is above 0.
        period: in iterations.
        patience: number of iterations in a row with such a gradient that stop the run.

    Raises:
        ValueError: ``period`` or ``patience`` is below 1.
        DeadLossError: in :meth:`after_step`, in all processes; the state is saved as model_stopped.pth.
    """

    def __init__(self, distiller: GKDDistiller, period: int, patience: int):
        for key, value in (("GKD.WATCH_PERIOD", period), ("GKD.WATCH_PATIENCE", patience)):
            if value < 1:
                raise ValueError(f"{key} is {value}, but must be >= 1")
        self._distiller = distiller
        self._period = period
        self._patience = patience
        # (loss, level) -> iterations in a row.
        self._dead: dict[tuple[str, str], int] = {}

    def before_step(self) -> None:
        first = self.trainer.iter == self.trainer.start_iter
        self._distiller.watch = first or bool(self._dead) or (self.trainer.iter + 1) % self._period == 0

    def after_step(self) -> None:
        if not self._distiller.watch:
            return
        reports: list[TermReport] = comm.all_gather(self._distiller.watched)
        scalars = [report.scalars() for report in reports]
        for name in scalars[0]:
            values = [row[name] for row in scalars if name in row]
            self.trainer.storage.put_scalar(name, float(np.mean(values)), smoothing_hint=False)
        faults = {key: _fault([report.norms[key] for report in reports]) for key in reports[0].norms}
        self._dead = {key: self._dead.get(key, 0) + 1 for key, fault in faults.items() if fault}
        for (loss, level), count in self._dead.items():
            if count >= self._patience:
                self._stop(loss, level, faults[loss, level])

    def _stop(self, loss: str, level: str, fault: str) -> None:
        self.trainer.save("model_stopped", resumable=False)
        (key,) = (term.key for term in self._distiller.method.terms.values() if term.name == loss)
        raise DeadLossError(
            f"the gradient of the {loss} loss ({key}) at the student's {level} was {fault} "
            f"in the last {self._patience} iterations, up to iteration {self.trainer.iter}: it teaches nothing there. "
            f"Take {level} out of GKD.FEATURES, set the weight to 0.0, or look at the data: without boxes a loss of "
            "objects has no gradient. The state is saved as model_stopped.pth, --resume goes on from the checkpoint "
            "before it"
        )


def _fault(norms: list[float]) -> str:
    """What is wrong with a loss's gradient, of which every process measured the norm; or nothing."""
    if not all(map(math.isfinite, norms)):
        return "not finite"
    return "" if any(norms) else "exactly 0"
