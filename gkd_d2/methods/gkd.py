"""gkd: gradient maps and bounding-box-aware multi-grained feature imitation, the method this project is named after."""

from __future__ import annotations

import dataclasses

from detectron2.config import CfgNode

from gkd_d2.losses.losses import describe_implementation, distillation_losses
from gkd_d2.losses.options import LOSS_KEYS, LossOptions, LossWeights, check_implementation
from gkd_d2.methods.method import METHOD_REGISTRY, Method, Term, widened
from gkd_d2.methods.relation import RelationLoss

RELATION = "loss_bmfi_relation"


class GKD(Method):
    """The four losses of :func:`gkd_d2.losses.distillation_losses`, docs/method.md, and the relation loss:

        loss_bmfi_relation = w * sum over levels of the loss of RelationLoss

    Source: "Gradient-Guided Knowledge Distillation for Object Detectors", arXiv 2303.04240; the relation loss as in its
    authors' code: see :class:`gkd_d2.methods.relation.RelationLoss`.

    Args:
        weights: of the four losses; default: those of LossWeights.
        relation: weight of the relation loss.
        implementation: see :func:`gkd_d2.losses.distillation_losses`.
        options: those of :class:`gkd_d2.losses.LossOptions`.

    Raises:
        ValueError: an option is unknown or out of range.
    """

    def __init__(
        self,
        weights: LossWeights | None = None,
        *,
        relation: float = 0.0,
        implementation: str = "auto",
        **options: str | float,
    ):
        loss_options = LossOptions(**options)
        check_implementation(implementation, loss_options)
        weights = LossWeights() if weights is None else weights
        terms = {
            key: Term(name, getattr(weights, name), f"GKD.LOSS_WEIGHTS.{name.upper()}")
            for name, key in LOSS_KEYS.items()
        }
        super().__init__({**terms, RELATION: Term("relation", relation, "GKD.LOSS_WEIGHTS.RELATION")})
        self.weights = weights
        self.options = loss_options
        self.relation = RelationLoss({})
        self.needs_student_grad = self.options.need_student_grad(self.weights)
        self.needs_teacher_grad = self.options.need_teacher_grad(self.weights)
        self.needs_cell_grads = self.options.need_cell_grads(self.weights)
        self.map_options = self.options
        self._implementation = implementation

    def implementation(self, device):
        described = describe_implementation(self._implementation, self.options, device)
        return f"{described}; the relation loss by PyTorch" if RELATION in self.active() else described

    def build_parameters(self, channels):
        if RELATION in self.active():
            self.relation = RelationLoss(channels)

    def forward(self, levels, factor=1.0):
        losses = self._four_losses(levels, factor) if self.weights else {}
        if RELATION in self.active():
            relation = sum(self.relation(widened(level)) for level in levels)
            losses[RELATION] = factor * self.terms[RELATION].weight * relation
        return losses

    def _four_losses(self, levels, factor):
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
    weights = {key.lower(): value for key, value in cfg.GKD.LOSS_WEIGHTS.items()}
    relation = weights.pop("relation")
    return GKD(
        LossWeights(**weights),
        relation=relation,
        temperature=cfg.GKD.TEMPERATURE,
        weighting=cfg.GKD.WEIGHTING,
        rectifier=cfg.GKD.RECTIFIER,
        map_region=cfg.GKD.MAP_REGION,
        importance=cfg.GKD.IMPORTANCE,
        importance_floor=cfg.GKD.IMPORTANCE_FLOOR,
        importance_cap=cfg.GKD.IMPORTANCE_CAP,
        implementation=cfg.GKD.IMPLEMENTATION,
    )
