"""gkd: gradient maps and bounding-box-aware multi-grained feature imitation, the method this project is named after."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from detectron2.config import CfgNode

from gkd_d2.losses.losses import describe_implementation, distillation_losses
from gkd_d2.losses.options import LOSS_KEYS, LossOptions, LossWeights, check_implementation
from gkd_d2.methods.method import METHOD_REGISTRY, Method, Term, widened
from gkd_d2.methods.relation import RelationLoss
from gkd_d2.utils.text import did_you_mean

RELATION = "loss_bmfi_relation"
# Default ratios of the four losses: docs/loss_weights.md says why.
_RATIOS = {"gradient": 0.3, "box": 1.0, "attention": 0.0, "image": 0.3}


class GKD(Method):
    """The four losses of :func:`gkd_d2.losses.distillation_losses`, docs/method.md, and the relation loss:

        loss_bmfi_relation = w * sum over levels of the loss of RelationLoss

    Source: "Gradient-Guided Knowledge Distillation for Object Detectors", arXiv 2303.04240; the relation loss as in its
    authors' code: see :class:`gkd_d2.methods.relation.RelationLoss`.

    Args:
        weights: of the four losses; or a mapping, as a LazyConfig has it, from names of :class:`LossWeights` to the
            weights that differ from its defaults.
        relation: weight of the relation loss.
        implementation: see :func:`gkd_d2.losses.distillation_losses`.
        options: those of :class:`gkd_d2.losses.LossOptions`.

    Raises:
        ValueError: an option is unknown or out of range.
    """

    def __init__(
        self,
        weights: LossWeights | Mapping[str, float] = LossWeights(),
        *,
        relation: float = 0.0,
        implementation: str = "auto",
        **options: str | float,
    ):
        loss_options = _loss_options(options)
        weights = weights if isinstance(weights, LossWeights) else _from_mapping(weights)
        terms = {
            key: Term(name, getattr(weights, name), f"GKD.LOSS_WEIGHTS.{name.upper()}", ratio=_RATIOS[name])
            for name, key in LOSS_KEYS.items()
        }
        super().__init__({**terms, RELATION: Term("relation", relation, "GKD.LOSS_WEIGHTS.RELATION", ratio=0.0)})
        self.options = loss_options
        self.relation = RelationLoss({})
        self.map_options = self.options
        self._implementation = implementation
        self._settle_weights()

    def weigh_by_ratio(self, ratios):
        super().weigh_by_ratio(ratios)
        self._settle_weights()

    def check_options(self):
        try:
            check_implementation(self._implementation, self.options, self.weights)
        except ValueError as error:
            # Its message begins with the name.
            raise ValueError(f"GKD.{str(error).replace('implementation', 'IMPLEMENTATION', 1)}") from error
        unused = self.options.without_effect(self.weights)
        if unused and self:
            raise ValueError(
                f"GKD has {', '.join(unused)}, which changes no loss: it weights the cells in the losses of boxes and "
                "image, with GKD.WEIGHTING gradient or attention_gradient. Leave it out, or give these losses a "
                f"{'ratio' if self.by_ratio else 'weight'}"
            )

    def _settle_weights(self) -> None:
        """Find out what the weights of the terms need."""
        self.weights = LossWeights(**{name: self.terms[key].weight for name, key in LOSS_KEYS.items()})
        self.needs_student_grad = self.options.need_student_grad(self.weights)
        self.needs_teacher_grad = self.options.need_teacher_grad(self.weights)
        self.needs_cell_grads = self.options.need_cell_grads(self.weights)

    def describe(self):
        options = self.options
        limits = [f"floor {options.importance_floor:g}"] if options.importance_floor else []
        limits += [f"cap {options.importance_cap:g}"] if options.importance_cap else []
        region = {"image": "over the image", "boxes": "in the boxes"}[options.map_region]
        return ", ".join(
            [f"weighting {options.weighting}", f"maps {region}", f"importance {options.importance}", *limits]
        )

    def implementation(self, device):
        described = describe_implementation(self._implementation, self.options, self.weights, device)
        return f"{described}; the relation loss by PyTorch" if RELATION in self.active() else described

    def build_parameters(self, channels):
        if RELATION in self.active():
            self.relation = RelationLoss(channels)

    def forward(self, levels, factor=1.0):
        losses = self._four_losses(levels, factor) if self.weights else {}
        if RELATION in self.active():
            # Without the gradients, which would be widened too.
            features = [dataclasses.replace(level, student_grad=None, teacher_grad=None) for level in levels]
            relation = sum(self.relation(widened(level)) for level in features)
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


def _from_mapping(weights: Mapping[str, float]) -> LossWeights:
    """The default weights with those in their places that ``weights`` names."""
    unknown = [name for name in weights if name not in LOSS_KEYS]
    if unknown:
        raise ValueError(
            f"the weights of GKD have {unknown[0]!r}, but their names are {', '.join(LOSS_KEYS)}; the weight of the "
            "relation loss is the argument relation"
        )
    return LossWeights(**weights)


def _loss_options(options: Mapping[str, str | float]) -> LossOptions:
    known = [field.name for field in dataclasses.fields(LossOptions)]
    for name in options:
        if name not in known:
            raise ValueError(f"GKD has no option {name!r}{did_you_mean(name, known)}")
    return LossOptions(**options)


@METHOD_REGISTRY.register()
def gkd(cfg: CfgNode) -> GKD:
    """The options stand in GKD itself.

    Raises:
        ValueError: an option is unknown or out of range.
    """
    weights = {key.lower(): value for key, value in cfg.GKD.LOSS_WEIGHTS.items()}
    relation = weights.pop("relation")
    options = {field.name: cfg.GKD[field.name.upper()] for field in dataclasses.fields(LossOptions)}
    try:
        method = GKD(weights, relation=relation, implementation=cfg.GKD.IMPLEMENTATION, **options)
    except ValueError as error:
        # A message about an option begins with its name.
        name, _, rest = str(error).partition(" ")
        if name in options:
            raise ValueError(f"GKD.{name.upper()} {rest}") from error
        raise
    return method
