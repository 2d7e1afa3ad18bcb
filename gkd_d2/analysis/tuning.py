"""How large the distillation losses' gradients are beside the detection loss's, and weights for wanted ratios."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Collection, Iterable

import numpy as np
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage

from gkd_d2.methods import build_method
from gkd_d2.modeling.distiller import GKDDistiller
from gkd_d2.modeling.measure import Measurement, TermReport, weight_for_ratio
from gkd_d2.utils.random_streams import mix_seed, seed_everything
from gkd_d2.utils.text import counted

# What a ratio is measured with: its gradient is proportional to a loss's weight.
UNIT = 1.0


@dataclasses.dataclass(frozen=True)
class Ratio:
    """The gradient of one loss of weight 1 in proportion to the detection loss's, at the student's features.

    Attributes:
        median: over the batches, all levels together.
        low: the tenth percentile.
        high: the ninetieth percentile.
        levels: level name -> median at this level.
    """

    median: float
    low: float
    high: float
    levels: dict[str, float]


def unit_weights(cfg: CfgNode, names: Collection[str]) -> CfgNode:
    """A copy of a distiller's config with some losses at weight 1, from the first iteration on, and the others at 0.

    Args:
        cfg: of the distiller.
        names: of the losses to measure.
    """
    method = build_method(cfg)
    cfg = cfg.clone()
    cfg.defrost()
    for term in method.terms.values():
        *path, name = term.key.split(".")
        functools.reduce(operator.getitem, path, cfg)[name] = UNIT if term.name in names else 0.0
    cfg.GKD.WARMUP_ITERS = 0
    # Batches are measured whole.
    cfg.SOLVER.ACCUMULATE_STEPS = 1
    cfg.freeze()
    return cfg


def measure_ratios(distiller: GKDDistiller, batches: Iterable[list[dict]], seed: int) -> dict[str, Ratio]:
    """Run a distiller on batches without training it, and measure its losses' gradients.

    Args:
        distiller: built from :func:`unit_weights`; left in training mode. Its weights stay, its BatchNorm statistics
            move as in training.
        batches: with ground truth.
        seed: of the random draws.

    Returns:
        Name of a loss -> its ratio.

    Raises:
        ValueError: there is no batch, or a loss has no gradient or none that is finite.
    """
    reports: list[TermReport] = []
    distiller.train()
    measurement = Measurement(distiller)
    before, distiller.listeners = distiller.listeners, [measurement]
    with EventStorage() as storage:
        for batch in batches:
            seed_everything(mix_seed(seed, storage.iter))
            distiller(batch)
            reports.append(measurement.report)
            storage.step()
    distiller.listeners = before
    if not reports:
        raise ValueError("there is no batch to measure the losses with")
    rows = [report.scalars() for report in reports]
    ratios = {}
    for term in distiller.method.active().values():
        whole = _values(rows, f"gkd_ratio/{term}")
        if not (len(whole) and np.isfinite(whole).all() and np.median(whole) > 0):
            raise ValueError(
                f"in {counted(len(rows), 'batch', 'batches')} the {term} loss had no gradient at the student's "
                "features, or one that is not finite, so that no weight can be proposed: look at the data, the teacher "
                "and the student's weights"
            )
        levels = {level: _values(rows, f"gkd_ratio/{term}/{level}") for level in distiller.student_features}
        ratios[term] = Ratio(
            median=float(np.median(whole)),
            low=float(np.percentile(whole, 10)),
            high=float(np.percentile(whole, 90)),
            levels={level: float(np.median(values)) for level, values in levels.items() if len(values)},
        )
    return ratios


def suggest_weights(ratios: dict[str, Ratio], wanted: dict[str, float]) -> dict[str, float]:
    """The weights at which the losses' gradients have wanted ratios to the detection loss's.

    Args:
        ratios: from :func:`measure_ratios`.
        wanted: name of a loss -> ratio, >= 0.

    Returns:
        Name of a loss -> weight, to two digits.
    """
    return {term: weight_for_ratio(UNIT, ratio.median, wanted[term]) for term, ratio in ratios.items()}


def _values(rows: list[dict[str, float]], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows if name in row])
