"""How large the distillation losses' gradients are beside the detection loss's, and weights for wanted ratios."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage
from tabulate import tabulate

from gkd_d2.config import method_title
from gkd_d2.methods import CALIBRATE, Method, Term, build_method
from gkd_d2.modeling.balance import Balance
from gkd_d2.modeling.distiller import GKDDistiller
from gkd_d2.modeling.measure import Measurement
from gkd_d2.utils.random_streams import mix_seed, seed_everything
from gkd_d2.utils.text import counted

_FLOAT16_SCALE = 2.0**10


@dataclasses.dataclass(frozen=True)
class Found:
    """What batches say of one loss.

    Attributes:
        weight: at which it has its ratio, as a calibration over these batches finds it.
        low: the tenth percentile of the batches' ratios at weight 1, all levels together.
        high: the ninetieth.
        levels: level name -> the median of the batches' ratios at this level and weight 1.
    """

    weight: float
    low: float
    high: float
    levels: dict[str, float]


def wanted_ratios(cfg: CfgNode, ratio: float | None, given: Mapping[str, float]) -> dict[str, float]:
    """The ratios that are asked for.

    Args:
        cfg: of a distiller.
        ratio: for every loss that is on: of a weight above 0 or, under GKD.BALANCE calibrate, of a ratio above 0. None:
            each one's own, from its method and GKD.RATIOS.
        given: name of a loss -> ratio instead, also of one that is off.

    Returns:
        Name of a loss -> ratio, of all losses of the method; 0 of those that are left out.

    Raises:
        ValueError: ``given`` names no loss of the method, or no loss is left.
        TypeError: see :func:`gkd_d2.methods.build_method`.
    """
    method, terms = build_method(cfg), build_method(to_measure(cfg, cfg.GKD.RATIOS)).terms
    if not terms:
        raise ValueError(f"the method {method_title(cfg)} has no loss to weigh")
    names = [term.name for term in terms.values()]
    unknown = [name for name in given if name not in names]
    if unknown:
        raise ValueError(f"--term names {', '.join(unknown)}, but the method's losses are {', '.join(names)}")
    wanted = {}
    for key, term in terms.items():
        own = term.ratio if ratio is None else ratio
        wanted[term.name] = given.get(term.name, own if key in method.active() else 0.0)
    if not any(wanted.values()):
        raise ValueError(
            f"all losses of {method_title(cfg)} are off, or their ratios 0: name some by --term {names[0]}=0.3"
        )
    return wanted


def to_measure(cfg: CfgNode, ratios: Mapping[str, float]) -> CfgNode:
    """A copy of a distiller's config whose losses have ratios, from the first iteration on.

    Args:
        cfg: of the distiller.
        ratios: name of a loss -> ratio; at 0 it is left out.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.GKD.BALANCE = CALIBRATE
    cfg.GKD.RATIOS = CfgNode({name.upper(): ratio for name, ratio in ratios.items()}, new_allowed=True)
    cfg.GKD.WARMUP_ITERS = 0
    # Batches are measured whole.
    cfg.SOLVER.ACCUMULATE_STEPS = 1
    cfg.freeze()
    return cfg


def measure_weights(
    distiller: GKDDistiller, batches: Iterable[list[dict]], seed: int, amp_dtype: torch.dtype | None = None
) -> dict[str, Found]:
    """Run a distiller on batches without training it, and find the weights that a calibration would over them.

    Args:
        distiller: built from :func:`to_measure`; left in training mode. Its weights stay, its BatchNorm statistics move
            as in training.
        batches: with ground truth.
        seed: of the random draws.
        amp_dtype: of autocast, as in the training; None: no autocast.

    Returns:
        Name of a loss -> what was found, of those of a ratio above 0.

    Raises:
        ValueError: there is no batch, a loss has no gradient or none that is finite, or a network holds values that are
            not finite.
    """
    method = distiller.method
    terms = [method.terms[key] for key in method.active()]
    # Frozen by no number of batches.
    balance = Balance({term.name: term.ratio for term in terms}, sys.maxsize)
    rows: list[dict[str, float]] = []
    distiller.check_finite()
    distiller.train()
    measurement = Measurement()
    if amp_dtype == torch.float16:
        # For small gradients, as a gradient scaler's.
        distiller.gradient_scale = _FLOAT16_SCALE
    with EventStorage() as storage:
        for batch in batches:
            # As the first process of a training does.
            seed_everything(mix_seed(seed, storage.iter, 0))
            measurement.ask(storage.iter)
            with torch.autocast(distiller.device.type, amp_dtype, enabled=amp_dtype is not None):
                seen = distiller.observe(batch, student_grad=True, teacher_grad=method.needs_teacher_grad)
                measurement(distiller, seen.detached())
            report = measurement.report
            balance.take(report)
            # As in the weights, a batch without objects does not count.
            rows.append(report.scalars() if report.boxes else {})
            storage.step()
    if not rows:
        raise ValueError("there is no batch to measure the losses with")
    if lacking := balance.without_sample():
        raise ValueError(
            f"in {counted(len(rows), 'batch', 'batches')} the {lacking[0]} loss had no gradient at the student's "
            "features, or one that is not finite, or there was no object, so that no weight can be proposed: look at "
            "the data, the teacher and the student's weights"
        )
    weights, spread = balance.weights(), balance.spread()
    return {
        term.name: Found(weights[term.name], *spread[term.name], _medians(rows, term.name, distiller.student_features))
        for term in terms
    }


def ratio_table(method: Method, wanted: Mapping[str, float], found: Mapping[str, Found]) -> str:
    """What was measured, as a Markdown table.

    Ratios are those at the weights of the config or, where it has none because they are calibrated, at the weights that
    were found.

    Args:
        method: of the config.
        wanted: name of a loss -> ratio.
        found: from :func:`measure_weights`; a row each.
    """
    rows = []
    for term in method.terms.values():
        if term.name not in found:
            continue
        loss, ratio = found[term.name], wanted[term.name]
        now = loss.weight if method.by_ratio else term.weight
        levels = " ".join(f"{level} {now * value:.2g}" for level, value in loss.levels.items())
        present = [] if method.by_ratio else [f"{now:g}", f"{now * ratio / loss.weight:.3g}"]
        spread = f"{now * loss.low:.2g} to {now * loss.high:.2g}"
        rows.append([term.name, *present, spread, levels, f"{ratio:g}", f"{loss.weight:.4g}"])
    present = [] if method.by_ratio else ["weight", "ratio: median"]
    headers = ["loss", *present, "ratio: 10 % to 90 % of the batches", "median by level", "wanted ratio", "its weight"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def ratios_as_yaml(terms: Iterable[Term], ratios: Mapping[str, float]) -> str:
    """The YAML, in one line, of a config that has each training calibrate its weights.

    Args:
        terms: all losses of the method.
        ratios: name of a loss -> ratio; one that is not named is off.
    """
    keys = ", ".join(f"{term.name.upper()}: {ratios.get(term.name, 0.0):g}" for term in terms)
    return f"GKD: {{BALANCE: {CALIBRATE}, RATIOS: {{{keys}}}}}"


def _medians(rows: list[dict[str, float]], name: str, levels: Iterable[str]) -> dict[str, float]:
    """Level name -> median over the batches in which the level has a ratio that is finite."""
    found = {}
    for level in levels:
        key = f"gkd_ratio/{name}/{level}"
        values = np.array([row[key] for row in rows if key in row])
        if np.isfinite(values).any():
            found[level] = float(np.median(values[np.isfinite(values)]))
    return found
