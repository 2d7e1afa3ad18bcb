"""What each distillation loss does to the student: its value and the size of its gradient, level by level."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from detectron2.utils.events import get_event_storage
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
        whole = self.detection_norm
        if whole > 0:
            scalars.update({f"gkd_ratio/{term}": self.norm(term) / whole for term, _ in self.norms})
        return scalars

    @property
    def detection_norm(self) -> float:
        """2-norm of the gradient of the student's own losses over all levels together."""
        return math.hypot(*self.detection.values())

    def norm(self, term: str) -> float:
        """2-norm of a loss's gradient over all levels together."""
        return math.hypot(*(norm for (name, _), norm in self.norms.items() if name == term))

    def times(self, factors: Mapping[str, float]) -> TermReport:
        """What would be measured of losses that are multiplied by factors.

        Args:
            factors: name of a loss -> factor, >= 0.
        """
        return dataclasses.replace(
            self,
            values={(term, level): factors[term] * value for (term, level), value in self.values.items()},
            norms={(term, level): factors[term] * norm for (term, level), norm in self.norms.items()},
        )


def pooled(reports: Sequence[TermReport]) -> TermReport:
    """What would be measured of a batch that was measured in equal parts: mean losses, and the norms of all gradients.

    Args:
        reports: of the parts, which one process computes one after the other or several at once; at least one.
    """

    def mean(name: str) -> dict:
        return {key: sum(getattr(report, name)[key] for report in reports) / len(reports) for key in reports[0].values}

    def whole(name: str) -> dict:
        # Each part's losses enter the step as their mean does, with a part of the weight.
        keys = getattr(reports[0], name)
        return {key: math.hypot(*(getattr(report, name)[key] for report in reports)) / len(reports) for key in keys}

    return TermReport(
        values=mean("values"),
        norms=whole("norms"),
        detection=whole("detection"),
        boxes=sum(report.boxes for report in reports),
        factor=reports[0].factor,
    )


def measure_terms(
    losses: Callable[[list[Tensor]], Iterable[dict[str, Tensor]]],
    features: dict[str, Tensor],
    detection_grad: list[Tensor],
    *,
    terms: dict[str, str],
    scale: float,
    boxes: int,
    factor: float,
) -> TermReport:
    """Measure each loss at each level by itself, outside the graph of the step.

    The losses are given features of float32 at least: at a weight of 1, or at a gradient scaler's scale, a gradient may
    be too large for half precision.

    Args:
        losses: features N,C,H,W of all levels -> the weighted losses of each level by itself.
        features: level name -> N,C,H,W of the student.
        detection_grad: of its own losses with respect to them, times ``scale``.
        terms: key of a loss -> its name in the report.
        scale: of ``detection_grad``; the report holds its norms without it.
        boxes: as in the report.
        factor: as in the report.
    """
    values, norms = {}, {}
    leaves = [
        feature.detach().to(torch.promote_types(feature.dtype, torch.float32)).requires_grad_()
        for feature in features.values()
    ]
    for level, leaf, level_losses in zip(features, leaves, losses(leaves)):
        for key, term in terms.items():
            values[term, level] = level_losses[key].detach()
            norms[term, level] = _norm(_gradient(level_losses[key], leaf))
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
    """Measures each loss of a distiller at each level, in the iterations that it is asked to.

    The losses are measured by the method's own weights: see :meth:`gkd_d2.GKDDistiller.method_losses`.
    """

    needs_student_grad = True

    def __init__(self):
        self._iteration = -1
        self._reports: list[TermReport] = []

    def ask(self, iteration: int) -> None:
        """Measure the batch of an iteration; to be called before it, by whoever wants to know."""
        if iteration != self._iteration:
            self._iteration = iteration
            self._reports = []

    @property
    def report(self) -> TermReport | None:
        """Of the last iteration that was asked for, all its parts together; None where it was not measured."""
        return pooled(self._reports) if self._reports else None

    def due(self) -> bool:
        return get_event_storage().iter == self._iteration

    def __call__(self, distiller: GKDDistiller, seen: Observation) -> None:
        with torch.autocast(distiller.device.type, enabled=False):
            report = measure_terms(
                lambda student: (
                    distiller.method_losses([level])
                    for level in distiller.levels(dataclasses.replace(seen, student=student))
                ),
                dict(zip(distiller.student_features, seen.student)),
                seen.student_grad,
                terms=distiller.method.active(),
                scale=seen.scale,
                boxes=sum(len(boxes) for boxes in seen.boxes),
                factor=distiller.warmup_factor(),
            )
        self._reports.append(report)


def weight_for_ratio(weight: float, ratio: float, wanted: float) -> float:
    """The weight at which a loss's gradient has a wanted ratio to the detection loss's, to two digits.

    Args:
        weight: with which ``ratio`` was measured.
        ratio: as in ``gkd_ratio/<loss>``; finite and above 0.
        wanted: the ratio to have instead, >= 0.
    """
    return float(f"{weight * wanted / ratio:.1e}")


def _gradient(loss: Tensor, leaf: Tensor) -> Tensor:
    """That of a loss, which may be a constant, as one of objects in a batch without any."""
    gradient = None
    if loss.requires_grad:
        (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True, allow_unused=True)
    return torch.zeros_like(leaf) if gradient is None else gradient


def _norm(gradient: Tensor) -> Tensor:
    return torch.linalg.vector_norm(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32))
