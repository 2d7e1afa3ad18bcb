"""What each distillation loss does to the student: its value and the size of its gradient, level by level."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from gkd_d2.modeling.distiller import GKDDistiller
from gkd_d2.modeling.observation import Listener, Observation


@dataclasses.dataclass(frozen=True)
class TermReport:
    """One measurement of L levels and T losses.

    Attributes:
        values: (loss, level) -> its weighted value; a loss of the step is the sum over its levels.
        norms: (loss, level) -> 2-norm of its gradient with respect to the student's feature of that level.
        detection: level -> 2-norm of the gradient of the student's own losses, as its heads give it.
        boxes: number of ground-truth boxes in the batch.
        factor: of the weights when it was measured, from the warm-up; in (0, 1].
    """

    values: dict[tuple[str, str], float]
    norms: dict[tuple[str, str], float]
    detection: dict[str, float]
    boxes: int
    factor: float

    def scalars(self) -> dict[str, float]:
        """What is logged: ``gkd_value/<loss>/<level>``, ``gkd_ratio/<loss>/<level>`` and ``gkd_ratio/<loss>``.

        A ratio is the norm of the loss's gradient over that of the detection loss; without a level, over all levels
        together. A ratio to a detection gradient of 0 is left out.
        """
        scalars = {f"gkd_value/{term}/{level}": value for (term, level), value in self.values.items()}
        for (term, level), norm in self.norms.items():
            if self.detection[level] > 0:
                scalars[f"gkd_ratio/{term}/{level}"] = norm / self.detection[level]
        whole = math.hypot(*self.detection.values())
        if whole > 0:
            scalars.update({f"gkd_ratio/{term}": self.norm(term) / whole for term, _ in self.norms})
        return scalars

    def norm(self, term: str) -> float:
        """2-norm of a loss's gradient over all levels together."""
        return math.hypot(*(norm for (name, _), norm in self.norms.items() if name == term))


def measure_terms(
    losses: Callable[[int, Tensor], dict[str, Tensor]],
    features: dict[str, Tensor],
    detection_grad: list[Tensor],
    *,
    terms: dict[str, str],
    scale: float,
    boxes: int,
    factor: float,
) -> TermReport:
    """Measure each loss at each level by itself, outside the graph of the step.

    Args:
        losses: number and feature N,C,H,W of a level -> the weighted losses of this level.
        features: level name -> N,C,H,W of the student.
        detection_grad: of its own losses with respect to them, times ``scale``.
        terms: key of a loss -> its name in the report.
        scale: of the gradients while they are computed; the report holds them without it.
        boxes: as in the report.
        factor: as in the report.
    """
    values, norms = {}, {}
    for index, (level, feature) in enumerate(features.items()):
        leaf = feature.detach().requires_grad_()
        level_losses = losses(index, leaf)
        for key, term in terms.items():
            (gradient,) = torch.autograd.grad(scale * level_losses[key], leaf, retain_graph=True)
            values[term, level] = level_losses[key].detach()
            norms[term, level] = _norm(gradient) / scale
    detection = {level: _norm(gradient) / scale for level, gradient in zip(features, detection_grad)}
    # One wait for the device, not one for every number.
    numbers = torch.stack([*values.values(), *norms.values(), *detection.values()]).tolist()
    count = len(values)
    return TermReport(
        values=dict(zip(values, numbers)),
        norms=dict(zip(norms, numbers[count:])),
        detection=dict(zip(detection, numbers[2 * count :])),
        boxes=boxes,
        factor=factor,
    )


class Measurement(Listener):
    """Measures each loss of a distiller at each level, in the batches that it is asked to.

    Attributes:
        wanted: whether the next batch is measured.
        report: of the last batch that was, or None.
    """

    needs_student_grad = True

    def __init__(self):
        self.wanted = True
        self.report: TermReport | None = None

    def due(self) -> bool:
        return self.wanted

    def __call__(self, distiller: GKDDistiller, seen: Observation) -> None:
        self.report = measure_terms(
            lambda level, feature: distiller.distil(seen, {level: feature}),
            dict(zip(distiller.student_features, seen.student)),
            seen.student_grad,
            terms=distiller.method.active(),
            scale=seen.scale,
            boxes=sum(len(boxes) for boxes in seen.boxes),
            factor=distiller.warmup_factor(),
        )


def weight_for_ratio(weight: float, ratio: float, wanted: float) -> float:
    """The weight at which a loss's gradient has a wanted ratio to the detection loss's, to two digits.

    Args:
        weight: with which ``ratio`` was measured.
        ratio: as in ``gkd_ratio/<loss>``; finite and above 0.
        wanted: the ratio to have instead, >= 0.
    """
    return float(f"{weight * wanted / ratio:.1e}")


def _norm(gradient: Tensor) -> Tensor:
    return torch.linalg.vector_norm(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32))
