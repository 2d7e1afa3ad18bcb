"""How large the distillation losses' gradients are beside the detection loss's, and weights for wanted ratios."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
import yaml
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage
from tabulate import tabulate

from gkd_d2.methods import Term, build_method
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


def wanted_ratios(method: str, terms: Sequence[Term], ratio: float, given: Mapping[str, float]) -> dict[str, float]:
    """The ratios that are asked for, of the losses that are on or named.

    Args:
        method: GKD.METHOD, for errors.
        terms: its losses.
        ratio: for every loss.
        given: name of a loss -> ratio instead.

    Returns:
        Name of a loss -> ratio.

    Raises:
        ValueError: ``given`` names a loss that is not among ``terms``, or no loss is left.
    """
    if not terms:
        raise ValueError(f"GKD.METHOD is {method}, which has no loss to weigh")
    names = [term.name for term in terms]
    unknown = [name for name in given if name not in names]
    if unknown:
        raise ValueError(f"--term names {', '.join(unknown)}, but the method's losses are {', '.join(names)}")
    wanted = {term.name: given.get(term.name, ratio) for term in terms if term.weight > 0 or term.name in given}
    if not wanted:
        raise ValueError(f"all weights of GKD.METHOD {method} are 0: name losses by --term {names[0]}=0.5")
    return wanted


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
    measurement = Measurement()
    distiller.listen(measurement)
    try:
        with EventStorage() as storage:
            for batch in batches:
                seed_everything(mix_seed(seed, storage.iter))
                measurement.ask(storage.iter)
                distiller(batch)
                reports.append(measurement.report)
                storage.step()
    finally:
        distiller.unlisten(measurement)
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


def ratio_table(terms: Iterable[Term], ratios: Mapping[str, Ratio], weights: Mapping[str, float]) -> str:
    """What was measured, at today's weights, and the weights that are proposed, as a Markdown table.

    Args:
        terms: a row each.
        ratios: from :func:`measure_ratios`.
        weights: from :func:`suggest_weights`.
    """
    rows = []
    for term in terms:
        now, found = term.weight, ratios[term.name]
        levels = " ".join(f"{level} {now * value:.2g}" for level, value in found.levels.items())
        spread = f"{now * found.low:.2g} to {now * found.high:.2g}"
        rows.append([term.name, now, f"{now * found.median:.3g}", spread, levels, weights[term.name]])
    headers = ["loss", "weight", "ratio: median", "10 % to 90 % of the batches", "median by level", "proposed weight"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def weights_as_yaml(terms: Iterable[Term], weights: Mapping[str, float]) -> str:
    """The weights as they stand in a config file.

    Args:
        terms: of the weights.
        weights: from :func:`suggest_weights`.
    """
    nested: dict = {}
    for term in terms:
        *path, key = term.key.split(".")
        node = nested
        for name in path:
            node = node.setdefault(name, {})
        node[key] = weights[term.name]
    return yaml.safe_dump(nested, sort_keys=False)


def _values(rows: list[dict[str, float]], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows if name in row])
