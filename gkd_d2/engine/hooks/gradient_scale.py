"""Float16 under Detectron2's own trainer."""

from __future__ import annotations

from detectron2.engine.hooks import HookBase

from gkd_d2.modeling.distiller import GKDDistiller


class GradientScale(HookBase):
    """Tells the distiller of the scale of Detectron2's AMPTrainer, whose small gradients would underflow otherwise.

    Args:
        distiller: that is trained in float16.
    """

    def __init__(self, distiller: GKDDistiller):
        self._distiller = distiller

    def before_step(self) -> None:
        self._distiller.gradient_scale = self.trainer._trainer.grad_scaler.get_scale()
