"""The watch over the distillation losses: whether each teaches, and whether one swamps the detection losses."""

from __future__ import annotations

import logging
import math

import numpy as np
from detectron2.engine.hooks import HookBase
from detectron2.utils import comm

from gkd_d2.engine.hooks.checkpoints import save_stopped
from gkd_d2.methods import Term
from gkd_d2.modeling.distiller import GKDDistiller
from gkd_d2.modeling.measure import Measurement, TermReport, weight_for_ratio
from gkd_d2.utils.text import counted

# What a weight is proposed for where a loss swamps the detection losses.
MODERATE_RATIO = 0.3


class DeadLossError(RuntimeError):
    """A distillation loss teaches nothing, or something infinite."""


class LossWatch(HookBase):
    """Measures each distillation loss at each level every so many iterations, and in the first and the last.

    The scalars of :meth:`gkd_d2.modeling.measure.TermReport.scalars` go to the EventStorage, averaged over the
    processes, and the ratios of the losses to the log. A loss whose ratio is above ``max_ratio`` is warned of once. A
    loss whose gradient at a level is exactly 0 in all processes, or not finite in one, is from then on measured in
    every iteration, and stops the run after ``patience`` of them. Where no process has a box in its batch, a gradient
    of 0 says nothing, nor does a ratio.

    Args:
        distiller: whose losses are watched; some weight is above 0.
        period: in iterations.
        patience: number of iterations in a row with such a gradient that stop the run.
        max_ratio: norm of a loss's gradient in proportion to that of the detection losses, all levels together.

    Attributes:
        measurement: by which it measures.

    Raises:
        ValueError: ``period`` or ``patience`` is below 1, or ``max_ratio`` is not above 0.
        DeadLossError: in :meth:`after_step`, in all processes. Under gkd_d2's own trainer the state is saved as
            model_stopped.pth.
    """

    def __init__(self, distiller: GKDDistiller, period: int, patience: int, max_ratio: float):
        for key, value in (("GKD.WATCH_PERIOD", period), ("GKD.WATCH_PATIENCE", patience)):
            if value < 1:
                raise ValueError(f"{key} is {value}, but must be >= 1")
        if not max_ratio > 0:
            raise ValueError(f"GKD.WATCH_MAX_RATIO is {max_ratio}, but must be > 0")
        self._distiller = distiller
        self.measurement = Measurement()
        self._terms = {term.name: term for term in distiller.method.terms.values() if term.weight > 0}
        self._period = period
        self._patience = patience
        self._max_ratio = max_ratio
        self._due = False
        # Names of the losses whose ratio was warned of.
        self._warned: set[str] = set()
        # (loss, level), or (loss, None) for all levels together -> iterations in a row.
        self._dead: dict[tuple[str, str | None], int] = {}

    def before_train(self) -> None:
        self._distiller.listen(self.measurement)

    def after_train(self) -> None:
        self._distiller.unlisten(self.measurement)

    def before_step(self) -> None:
        done = self.trainer.iter + 1
        self._due = self.trainer.iter == self.trainer.start_iter or done % self._period == 0
        self._due |= done == self.trainer.max_iter
        self._asked = self._due or bool(self._dead)
        if self._asked:
            self.measurement.ask(self.trainer.iter)

    def after_step(self) -> None:
        if not self._asked:
            return
        reports: list[TermReport] = comm.all_gather(self.measurement.report)
        # Another hook may have set the distiller's listeners anew.
        if None in reports:
            return
        # A loss whose calibration has not begun teaches nothing yet, but is not dead.
        factors = self._distiller.factors
        weighted = reports if factors is None else [report.times(factors) for report in reports]
        means = _means(weighted)
        for name, value in means.items():
            self.trainer.storage.put_scalar(name, value, smoothing_hint=False)
        with_boxes = [report for report in weighted if report.boxes]
        if self._due:
            self._log(means, objects=bool(with_boxes))
        self._warn(_means(with_boxes), reports[0].factor)
        self._judge(reports, objects=bool(with_boxes))

    def _log(self, means: dict[str, float], *, objects: bool) -> None:
        if not comm.is_main_process():
            return
        ratios = {name: means[f"gkd_ratio/{name}"] for name in self._terms if f"gkd_ratio/{name}" in means}
        logger = logging.getLogger(__name__)
        if ratios:
            listed = ", ".join(f"{name} {ratio:.2g}" for name, ratio in ratios.items())
            note = "" if objects else " (no object in the batch)"
            if (factors := self._distiller.factors) is not None and not any(factors.values()):
                note += " (the weights start at 0)"
            logger.info("gkd_ratio at iteration %d: %s%s", self.trainer.iter, listed, note)
        else:
            logger.warning(
                "gkd_ratio at iteration %d is undefined: the gradient of the detection losses at the student's "
                "features is 0 or not a number",
                self.trainer.iter,
            )

    def _warn(self, means: dict[str, float], factor: float) -> None:
        """Warn of losses that swamp the detection losses; ``factor`` is that of the weights, from the warm-up."""
        for name, term in self._terms.items():
            ratio = means.get(f"gkd_ratio/{name}", 0.0)
            # A gradient that is not finite is judged below.
            if name in self._warned or not self._max_ratio < ratio < math.inf:
                continue
            self._warned.add(name)
            if comm.is_main_process():
                logging.getLogger(__name__).warning(
                    "The %s loss swamps the detection losses: at iteration %d its gradient at the student's features "
                    "has %.3g times the norm of theirs, more than GKD.WATCH_MAX_RATIO %g. %s",
                    name,
                    self.trainer.iter,
                    ratio,
                    self._max_ratio,
                    self._advice(term, ratio, factor),
                )

    def _advice(self, term: Term, ratio: float, factor: float) -> str:
        """What to do about a loss of too large a ratio."""
        key, value = self._distiller.method.setting(term)
        if self._distiller.method.by_ratio:
            return f"Lower {key}, which is {value:g}: a run that is resumed takes the new ratio"
        warmup = f" (of which the warm-up applies {factor:.2g})" if factor < 1 else ""
        weight = weight_for_ratio(factor * value, ratio, MODERATE_RATIO)
        return (
            f"{key} is {value:g}{warmup}; {weight:g} would give a ratio of {MODERATE_RATIO:g}. A run that is resumed "
            "takes the new weight; tools/suggest_weights.py measures it over many batches"
        )

    def _judge(self, reports: list[TermReport], *, objects: bool) -> None:
        """Count the iterations in a row in which a loss is dead, and stop the run where they are too many."""
        norms = [_norms(report, self._terms) for report in reports]
        for key in norms[0]:
            everywhere = [row[key] for row in norms]
            finite = all(map(math.isfinite, everywhere))
            if finite and any(everywhere):
                self._dead.pop(key, None)
            # Where nothing has a box a loss of objects must be 0.
            elif objects or not finite:
                self._dead[key] = self._dead.get(key, 0) + 1
                if self._dead[key] >= self._patience:
                    self._stop(*key, finite)

    def _stop(self, name: str, level: str | None, finite: bool) -> None:
        saved = save_stopped(self.trainer)
        key, _ = self._distiller.method.setting(self._terms[name])
        others = [other for other in self._distiller.student_features if other != level]
        remedy = f"Set GKD.FEATURES to {others}, without {level}, or set" if level and others else "Set"
        where = f"at the student's {level}" if level else "at all levels of the student"
        last = f"{counted(self._patience, 'iteration')}{' with objects' if finite else ''}"
        raise DeadLossError(
            f"the gradient of the {name} loss ({key}) {where} was "
            f"{'exactly 0' if finite else 'not finite'} in the last {last}, up to iteration {self.trainer.iter}: it "
            f"teaches nothing there. {remedy} {key} to 0. "
            f"Where the data make it so for a while, raise GKD.WATCH_PATIENCE, which is {self._patience}, for "
            f"instance by `GKD.WATCH_PATIENCE {10 * self._patience}` on the command line. {saved}"
        )


def _means(reports: list[TermReport]) -> dict[str, float]:
    """Each scalar, averaged over the reports that have it."""
    rows = [report.scalars() for report in reports]
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: float(np.mean([row[name] for row in rows if name in row])) for name in names}


def _norms(report: TermReport, terms: dict[str, Term]) -> dict[tuple[str, str | None], float]:
    """(loss, level) -> norm of the gradient; of a loss that is judged over all levels together, (loss, None)."""
    norms: dict[tuple[str, str | None], float] = {}
    for (name, level), norm in report.norms.items():
        if terms[name].level_assigned:
            norms[name, None] = report.norm(name)
        else:
            norms[name, level] = norm
    return norms
