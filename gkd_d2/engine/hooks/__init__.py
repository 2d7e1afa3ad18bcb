"""Hooks for Detectron2's trainers: checkpoints, weights of losses, the watch over them, pictures, float16's scale."""

from gkd_d2.engine.hooks.calibration import Calibration, CalibrationError
from gkd_d2.engine.hooks.checkpoints import PeriodicSaver, SaveOnSigterm, release_sigterm
from gkd_d2.engine.hooks.distillation import HookOptions, add_distillation_hooks
from gkd_d2.engine.hooks.first_lines import FirstLines
from gkd_d2.engine.hooks.gradient_scale import GradientScale
from gkd_d2.engine.hooks.pictures import PeriodicPicture
from gkd_d2.engine.hooks.watch import DeadLossError, LossWatch

__all__ = [
    "Calibration",
    "CalibrationError",
    "DeadLossError",
    "FirstLines",
    "GradientScale",
    "HookOptions",
    "LossWatch",
    "PeriodicPicture",
    "PeriodicSaver",
    "SaveOnSigterm",
    "add_distillation_hooks",
    "release_sigterm",
]
