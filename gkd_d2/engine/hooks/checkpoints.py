"""Hooks that save: every so many iterations, and where SIGTERM asks a run to end."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from detectron2.engine.hooks import HookBase
from detectron2.engine.train_loop import TrainerBase
from detectron2.utils import comm

from gkd_d2.engine.sigterm import EXIT_BY_SIGTERM, SigtermWatch
from gkd_d2.engine.train_step import TrainStep


class PeriodicSaver(HookBase):
    """Saves a checkpoint every so many iterations and at the end.

    It is called in all processes: what only one of them knows is part of a checkpoint, which Detectron2's
    PeriodicCheckpointer, called in the main process alone, can't gather.

    Args:
        period: in iterations.
        max_to_keep: of the checkpoints that it has saved before the end, only so many of the last ones are kept; None:
            all.

    Raises:
        ValueError: one of them is below 1.
    """

    def __init__(self, period: int, max_to_keep: int | None = None):
        if period < 1:
            raise ValueError(f"SOLVER.CHECKPOINT_PERIOD is {period}, but must be >= 1")
        if max_to_keep is not None and max_to_keep < 1:
            raise ValueError(f"train.checkpointer.max_to_keep is {max_to_keep}, but must be >= 1")
        self._period = period
        self._max_to_keep = max_to_keep
        self._saved: list[str] = []

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done >= self.trainer.max_iter:
            self.trainer.save("model_final")
        elif done % self._period == 0:
            name = f"model_{self.trainer.iter:07d}"
            self.trainer.save(name)
            self._saved.append(name)
            self._remove_old()

    def _remove_old(self) -> None:
        if self._max_to_keep is None:
            return
        old, self._saved = self._saved[: -self._max_to_keep], self._saved[-self._max_to_keep :]
        for name in old:
            if comm.is_main_process():
                Path(self.trainer.checkpointer.save_dir, f"{name}.pth").unlink(missing_ok=True)


class SaveOnSigterm(HookBase):
    """On SIGTERM, which Slurm sends before a time limit, finishes the iteration, saves and ends the process.

    Where the iteration does not end within GRACE_SECONDS of :mod:`gkd_d2.engine.sigterm`, as in the middle of an
    evaluation or waiting for a process that is gone, the process ends without saving; the same where the checkpoint is
    not written within as many again.

    Attributes:
        watch: over the signal; to be released after the training.

    Raises:
        SystemExit: with EXIT_BY_SIGTERM, in all processes, when the checkpoint is written.
    """

    def __init__(self):
        self.watch = SigtermWatch()

    def before_train(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            logging.getLogger(__name__).warning(
                "Training runs in another thread than the main one, where Python handles no signals: SIGTERM will end "
                "the process without saving"
            )
            return
        self.watch.start()

    def after_step(self) -> None:
        # One process may get the signal an iteration before another.
        if not any(comm.all_gather(self.watch.asked)):
            return
        self.watch.extend()
        done = self.trainer.iter + 1 >= self.trainer.max_iter
        name = "model_final" if done else f"model_{self.trainer.iter:07d}"
        if saves_in_all_processes(self.trainer):
            self.trainer.save(name)
        else:
            self.trainer.checkpointer.save(name, iteration=self.trainer.iter)
        comm.synchronize()
        logging.getLogger(__name__).warning(
            "Stopped by SIGTERM after iteration %d; its state is saved: go on with --resume", self.trainer.iter
        )
        raise SystemExit(EXIT_BY_SIGTERM)


class EndOfWatch(HookBase):
    """The last hook: what others do after the training, such as the last evaluation, is not waited for, either."""

    def __init__(self, on_sigterm: SaveOnSigterm):
        self._watch = on_sigterm.watch

    def after_train(self) -> None:
        self._watch.release()


def release_sigterm(trainer: TrainerBase) -> None:
    """Leave SIGTERM to whoever handled it before a training, also where a hook failed ahead of the one that does so."""
    for hook in trainer._hooks:
        if isinstance(hook, SaveOnSigterm):
            hook.watch.release()


def save_stopped(trainer: TrainerBase) -> str:
    """Save the state of a run that a hook is about to stop, where that works; to be called in all processes.

    Returns:
        What to say of it at the end of the error's message.
    """
    if not saves_in_all_processes(trainer):
        return "A resumed run continues from the last checkpoint"
    trainer.save("model_stopped", resumable=False)
    return "The state is saved as model_stopped.pth; --resume continues from the checkpoint before it"


def saves_in_all_processes(trainer: TrainerBase) -> bool:
    """Whether it is gkd_d2's own trainer, which saves in all processes; Detectron2's saves in the main one alone."""
    return isinstance(trainer._trainer, TrainStep)
