"""The hooks of a distillation, and their place among a trainer's own."""

from __future__ import annotations

from detectron2.engine import AMPTrainer, DefaultTrainer
from detectron2.engine.hooks import EvalHook, HookBase, PeriodicCheckpointer, PeriodicWriter

from gkd_d2.engine.hooks.checkpoints import EndOfWatch, PeriodicSaver, SaveOnSigterm
from gkd_d2.engine.hooks.gradient_scale import GradientScale
from gkd_d2.engine.hooks.pictures import PeriodicPicture
from gkd_d2.engine.hooks.watch import LossWatch
from gkd_d2.modeling.distiller import GKDDistiller


def add_distillation_hooks(trainer: DefaultTrainer) -> None:
    """Give a trainer what a distillation needs of it and hooks can do, ahead of what saves, evaluates and writes.

    These are :class:`SaveOnSigterm` and, where the model is a GKDDistiller with a loss, :class:`LossWatch`,
    :class:`PeriodicPicture` and, for Detectron2's AMPTrainer, :class:`GradientScale`. To be called in all processes,
    before ``train``; a second call adds nothing.

    Args:
        trainer: Detectron2's DefaultTrainer or a class derived from it.

    Raises:
        ValueError: a key of GKD.WATCH_* or GKD.VIS_PERIOD is out of range.
    """
    if any(isinstance(hook, SaveOnSigterm) for hook in trainer._hooks):
        return
    added: list[HookBase] = []
    distiller = next((module for module in trainer.model.modules() if isinstance(module, GKDDistiller)), None)
    if distiller is not None:
        keys = trainer.cfg.GKD
        pictures = PeriodicPicture(distiller, keys.VIS_PERIOD)
        if distiller.method:
            if isinstance(trainer._trainer, AMPTrainer):
                added.append(GradientScale(distiller))
            added.append(pictures)
            added.append(LossWatch(distiller, keys.WATCH_PERIOD, keys.WATCH_PATIENCE, keys.WATCH_MAX_RATIO))
    on_sigterm = SaveOnSigterm()
    added.append(on_sigterm)
    trainer.register_hooks(added)
    # No checkpoint is to be resumed of a run that is stopped; an evaluation takes long and may fail; and a writer that
    # ran before would never see the scalars of its iteration.
    later = (PeriodicCheckpointer, PeriodicSaver, EvalHook, PeriodicWriter)
    others = trainer._hooks[: -len(added)]
    place = min((i for i, hook in enumerate(others) if isinstance(hook, later)), default=len(others))
    trainer._hooks = [*others[:place], *added, *others[place:]]
    trainer.register_hooks([EndOfWatch(on_sigterm)])
