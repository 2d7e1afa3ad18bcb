"""The hooks of a distillation, and their place among a trainer's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from detectron2.config import CfgNode
from detectron2.engine import AMPTrainer
from detectron2.engine.hooks import EvalHook, HookBase, PeriodicCheckpointer, PeriodicWriter
from detectron2.engine.train_loop import TrainerBase

from gkd_d2.engine.hooks.calibration import Calibration
from gkd_d2.engine.hooks.checkpoints import EndOfWatch, PeriodicSaver, SaveOnSigterm, saves_in_all_processes
from gkd_d2.engine.hooks.gradient_scale import GradientScale
from gkd_d2.engine.hooks.pictures import PeriodicPicture
from gkd_d2.engine.hooks.watch import LossWatch
from gkd_d2.modeling.distiller import GKDDistiller


@dataclasses.dataclass(frozen=True)
class HookOptions:
    """How often a distillation is looked at.

    Attributes:
        vis_period: GKD.VIS_PERIOD.
        watch_period: GKD.WATCH_PERIOD.
        watch_patience: GKD.WATCH_PATIENCE.
        watch_max_ratio: GKD.WATCH_MAX_RATIO.
        balance_start: the first iteration that is measured under GKD.BALANCE calibrate.
        balance_iters: GKD.BALANCE_ITERS.
        balance_max: GKD.BALANCE_MAX.
        place: what a key of yacs is called in the run's config.
    """

    vis_period: int = 0
    watch_period: int = 20
    watch_patience: int = 20
    watch_max_ratio: float = 10.0
    balance_start: int = 0
    balance_iters: int = 64
    balance_max: float = 5.0
    place: Callable[[str], str] = str


def add_distillation_hooks(trainer: TrainerBase, options: HookOptions | None = None) -> None:
    """Give a trainer what a distillation needs of it and hooks can do, ahead of what saves, evaluates and writes.

    These are :class:`SaveOnSigterm` and, where the model is a GKDDistiller with a loss, :class:`LossWatch`,
    :class:`PeriodicPicture`, for Detectron2's AMPTrainer :class:`GradientScale`, and for weights by ratios
    :class:`Calibration`. To be called in all processes, before ``resume_or_load`` and ``train``; a second call adds
    nothing.

    Args:
        trainer: Detectron2's DefaultTrainer or a class derived from it, or another ExactTrainer.
        options: by default those of the trainer's config of yacs.

    Raises:
        ValueError: a key of GKD.WATCH_*, GKD.BALANCE_* or GKD.VIS_PERIOD is out of range; MODEL_EMA.ENABLED is set,
            which a trainer of Detectron2 ignores; or weights are to be calibrated, and the trainer has been resumed.
    """
    if any(isinstance(hook, SaveOnSigterm) for hook in trainer._hooks):
        return
    if _asks_for_ema(trainer) and not saves_in_all_processes(trainer):
        raise ValueError(
            "MODEL_EMA.ENABLED is True, but this trainer keeps no average of the weights: train with "
            "gkd_d2.engine.trainer.Trainer, as tools/train_net.py does, or set it to False"
        )
    added: list[HookBase] = []
    distiller = next((module for module in trainer.model.modules() if isinstance(module, GKDDistiller)), None)
    if distiller is not None:
        options = options or _options_of(trainer.cfg)
        pictures = PeriodicPicture(distiller, options.vis_period)
        if distiller.method:
            if isinstance(trainer._trainer, AMPTrainer):
                added.append(GradientScale(distiller))
            added.append(pictures)
            watch = LossWatch(distiller, options.watch_period, options.watch_patience, options.watch_max_ratio)
            added.append(watch)
            if distiller.method.by_ratio:
                if trainer.start_iter > 0:
                    raise ValueError(
                        "GKD.BALANCE is calibrate, but the trainer has loaded its checkpoint already, and the state of "
                        "the calibration is lost: call add_distillation_hooks before resume_or_load"
                    )
                # After the watch, which judges the iteration by the weights that it had.
                added.append(
                    Calibration(
                        distiller,
                        watch.measurement,
                        start=options.balance_start,
                        iters=options.balance_iters,
                        limit=options.balance_max,
                        period=options.watch_period,
                        place=options.place,
                    )
                )
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


def _options_of(cfg: CfgNode) -> HookOptions:
    keys = cfg.GKD
    return HookOptions(
        vis_period=keys.VIS_PERIOD,
        watch_period=keys.WATCH_PERIOD,
        watch_patience=keys.WATCH_PATIENCE,
        watch_max_ratio=keys.WATCH_MAX_RATIO,
        # Heads of its own know nothing before, and what they ask of the features is not what it will be.
        balance_start=0 if keys.STUDENT.INIT_FROM_TEACHER else cfg.SOLVER.WARMUP_ITERS,
        balance_iters=keys.BALANCE_ITERS,
        balance_max=keys.BALANCE_MAX,
    )


def _asks_for_ema(trainer: TrainerBase) -> bool:
    """Whether its config is one of yacs, of this project's keys, in which MODEL_EMA.ENABLED is set."""
    cfg = getattr(trainer, "cfg", None)
    return isinstance(cfg, CfgNode) and "MODEL_EMA" in cfg and cfg.MODEL_EMA.ENABLED
