"""What each distillation loss does to the student: its value and the size of its gradient, level by level."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class TermReport:
    """One measurement of L levels and T losses.

    Attributes:
        values: (loss, level) -> its weighted value; a loss of the step is the sum over its levels.
        norms: (loss, level) -> 2-norm of its gradient with respect to the student's feature of that level.
        detection: level -> 2-norm of the gradient of the student's own losses, as its heads give it.
    """

    values: dict[tuple[str, str], float]
    norms: dict[tuple[str, str], float]
    detection: dict[str, float]

    def scalars(self) -> dict[str, float]:
        """What is logged: ``gkd_value/<loss>/<level>``, ``gkd_ratio/<loss>/<level>`` and ``gkd_ratio/<loss>``.

        A ratio is the norm of the loss's gradient over that of the detection loss; without a level, over all levels
        together. A ratio to a detection gradient of 0 is left out.
        """
        scalars = {f"gkd_value/{term}/{level}": value for (term, level), value in self.values.items()}
        squares = {term: 0.0 for term, _ in self.norms}
        for (term, level), norm in self.norms.items():
            squares[term] += norm**2
            if self.detection[level] > 0:
                scalars[f"gkd_ratio/{term}/{level}"] = norm / self.detection[level]
        whole = math.sqrt(sum(norm**2 for norm in self.detection.values()))
        if whole > 0:
            scalars.update({f"gkd_ratio/{term}": math.sqrt(square) / whole for term, square in squares.items()})
        return scalars


def measure_terms(
    losses: Callable[[int, Tensor], dict[str, Tensor]],
    features: dict[str, Tensor],
    detection_grad: list[Tensor],
    *,
    terms: dict[str, str],
    scale: float,
) -> TermReport:
    """Measure each loss at each level by itself, outside the graph of the step.

    Args:
        losses: number and feature N,C,H,W of a level -> the weighted losses of this level.
        features: level name -> N,C,H,W of the student.
        detection_grad: of its own losses with respect to them, times ``scale``.
        terms: key of a loss -> its name in the report.
        scale: of the gradients while they are computed; the report holds them without it.
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
    )


def _norm(gradient: Tensor) -> Tensor:
    return torch.linalg.vector_norm(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32))
