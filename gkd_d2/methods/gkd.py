"""gkd: gradient maps and bounding-box-aware multi-grained feature imitation, the method this project is named after."""

from __future__ import annotations

import dataclasses

from detectron2.config import CfgNode

from gkd_d2.losses.losses import describe_implementation, distillation_losses
from gkd_d2.losses.options import LOSS_KEYS, LossOptions, LossWeights, check_implementation
from gkd_d2.methods.method import METHOD_REGISTRY, Method, Term


class GKD(Method):
    """The four losses of :func:`gkd_d2.losses.distillation_losses`: docs/method.md.

    Source: "Gradient-Guided Knowledge Distillation for Object Detectors", arXiv 2303.04240.

    Args:
        weights: of the four losses; default: those of LossWeights.
        implementation: see :func:`gkd_d2.losses.distillation_losses`.
        options: those of :class:`gkd_d2.losses.LossOptions`.

    Raises:
        ValueError: an option is unknown or out of range.
    """

    def __init__(
        self,
        weights: LossWeights | None = None,
        *,
        implementation: str = "auto",
        **options: str | float,
    ):
        self.options = LossOptions(**options)
        check_implementation(implementation, self.options)
        self.weights = LossWeights() if weights is None else weights
        super().__init__(
            {
                key: Term(name, getattr(self.weights, name), f"GKD.LOSS_WEIGHTS.{name.upper()}")
                for name, key in LOSS_KEYS.items()
            }
        )
        self.needs_student_grad = self.options.need_student_grad(self.weights)
        self.needs_teacher_grad = self.options.need_teacher_grad(self.weights)
        self.needs_cell_grads = self.options.need_cell_grads(self.weights)
        self.rectifier = self.options.rectifier
        self._implementation = implementation

    def implementation(self, device):
        return describe_implementation(self._implementation, self.options, device)

    def __call__(self, levels, factor=1.0):
        # All levels at once: the extension works through them in one call.
        return distillation_losses(
            [level.student for level in levels],
            [level.teacher for level in levels],
            [level.student_grad for level in levels] if self.needs_student_grad else None,
            [level.teacher_grad for level in levels] if self.needs_teacher_grad else None,
            levels[0].boxes,
            levels[0].image_size,
            weights=self.weights.scaled(factor),
            implementation=self._implementation,
            **dataclasses.asdict(self.options),
        )


@METHOD_REGISTRY.register()
def gkd(cfg: CfgNode) -> GKD:
    """The options stand in GKD itself."""
    return GKD(
        LossWeights(**{key.lower(): value for key, value in cfg.GKD.LOSS_WEIGHTS.items()}),
        temperature=cfg.GKD.TEMPERATURE,
        weighting=cfg.GKD.WEIGHTING,
        rectifier=cfg.GKD.RECTIFIER,
        map_region=cfg.GKD.MAP_REGION,
        importance=cfg.GKD.IMPORTANCE,
        importance_floor=cfg.GKD.IMPORTANCE_FLOOR,
        importance_cap=cfg.GKD.IMPORTANCE_CAP,
        implementation=cfg.GKD.IMPLEMENTATION,
    )
