"""The calibration of the losses' weights: GKD.BALANCE calibrate."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping

from detectron2.engine.hooks import HookBase
from detectron2.utils import comm

from gkd_d2.engine.hooks.checkpoints import save_stopped, saves_in_all_processes
from gkd_d2.engine.output import naming_output
from gkd_d2.engine.resume import ResumeError
from gkd_d2.methods import weights_as_yaml
from gkd_d2.modeling.balance import Balance
from gkd_d2.modeling.distiller import GKDDistiller
from gkd_d2.modeling.measure import Measurement, TermReport, pooled
from gkd_d2.utils.text import counted, listed

FILE = "calibrated_weights.yaml"


class CalibrationError(RuntimeError):
    """A loss has no gradient by which it could be weighted."""


class Calibration(HookBase):
    """Measures the losses of a method that is weighted by ratios, and sets their weights: see :class:`Balance`.

    From iteration ``start`` on each iteration is measured, until the weights are frozen; they are logged and written to
    calibrated_weights.yaml in the run's folder. Later the sum of the ratios is looked at every ``period`` iterations.
    ``gkd_weight/<loss>`` in the EventStorage is what each loss is multiplied by. All processes have one value, that of
    all their batches together; a step that the gradient scaler leaves out does not count.

    Args:
        distiller: whose method is weighted by ratios.
        measurement: that the distiller tells, as of :class:`LossWatch`.
        start: the first iteration that is measured.
        iters: number of iterations that are, GKD.BALANCE_ITERS.
        limit: GKD.BALANCE_MAX.
        period: in iterations.
        place: what a key of yacs is called in the run's config.

    Raises:
        ValueError: an argument is out of range, see :class:`Balance`.
        CalibrationError: in :meth:`after_step`, in all processes, where the weight of a loss can't be measured. Under
            gkd_d2's own trainer the state is saved as model_stopped.pth.
    """

    def __init__(
        self,
        distiller: GKDDistiller,
        measurement: Measurement,
        *,
        start: int,
        iters: int,
        limit: float,
        period: int,
        place: Callable[[str], str] = str,
    ):
        self._distiller = distiller
        self._measurement = measurement
        self._terms = {term.name: term for term in distiller.method.terms.values() if term.weight > 0}
        self._balance = Balance({name: term.ratio for name, term in self._terms.items()}, iters, limit)
        self._start = start
        self._iters = iters
        self._limit = limit
        self._period = period
        self._place = place
        self._warned = False

    def before_train(self) -> None:
        logger = logging.getLogger(__name__)
        self._distiller.factors = self._balance.factors()
        wanted = sum(term.ratio for term in self._terms.values())
        if wanted > self._limit:
            logger.warning(
                "GKD.RATIOS add up to %.3g, more than GKD.BALANCE_MAX %g, which will hold the losses below their "
                "ratios: raise it, or lower them",
                wanted,
                self._limit,
            )
        if self._balance.frozen:
            # The ratios may be others than when they were written.
            logger.info(
                "The calibration of the checkpoint is kept: %s. %s holds the weights for GKD.BALANCE fixed",
                self._listed(),
                self._write(),
            )
            return
        first = max(self._start, self.trainer.start_iter)
        # At least one, where GKD.BALANCE_ITERS is less than it was.
        last = first + max(1, self._iters - self._balance.taken) - 1
        logger.info(
            "The weights of the losses are calibrated in iterations %d to %d%s, over which they ramp up%s",
            first,
            last,
            f", after {counted(self._balance.taken, 'iteration')} before" if self._balance.taken else "",
            "; until then nothing is imitated" if first > self.trainer.start_iter and not self._balance.taken else "",
        )
        if last >= self.trainer.max_iter:
            logger.warning(
                "The run ends at iteration %d, before the weights are calibrated: GKD.BALANCE_ITERS %d iterations from "
                "%d on are measured for that",
                self.trainer.max_iter - 1,
                self._iters,
                first,
            )

    def before_step(self) -> None:
        if self._calibrates() or self._caps():
            # Of a scaler's scale a GPU is waited for.
            self._scale = _gradient_scale(self.trainer)
            self._measurement.ask(self.trainer.iter)

    def after_step(self) -> None:
        if not (self._calibrates() or self._caps()):
            return
        reports = comm.all_gather(self._measurement.report)
        # Another hook may have set the distiller's listeners anew.
        if None in reports:
            raise CalibrationError(
                f"iteration {self.trainer.iter} was not measured, as GKD.BALANCE calibrate requires: another hook has "
                "changed the distiller's listeners"
            )
        if self._caps():
            self._cap(pooled(reports))
        elif all(comm.all_gather(_stepped(self.trainer, self._scale))):
            self._take(pooled(reports))
        self._distiller.factors = self._balance.factors()
        for name, factor in self._distiller.factors.items():
            self.trainer.storage.put_scalar(f"gkd_weight/{name}", factor, smoothing_hint=False)

    def state_dict(self) -> dict:
        """Of the calibration; part of each checkpoint."""
        return {**self._balance.state_dict(), "keys": self._keys()}

    def load_state_dict(self, state_dict: Mapping) -> None:
        """Go on from a checkpoint's, with the ratios of this run.

        Raises:
            ResumeError: it was calibrated without one of the losses, or for another of the same name.
        """
        others = {name: key for name, key in state_dict["keys"].items() if key != self._keys().get(name, key)}
        if others and state_dict["taken"]:
            name, key = next(iter(others.items()))
            raise ResumeError(
                f"The checkpoint can't be resumed: its {name} loss is that of {key}, whose calibration says nothing "
                f"about that of {self._terms[name].key}. Start anew from its weights, by MODEL.WEIGHTS and without "
                "--resume"
            )
        try:
            self._balance.load_state_dict(state_dict)
        except ValueError as error:
            raise ResumeError(f"The checkpoint can't be resumed: {error}") from error

    def _keys(self) -> dict[str, str]:
        """Name of a loss -> the key of its weight, by which losses of one name are told apart."""
        return {name: term.key for name, term in self._terms.items()}

    def _calibrates(self) -> bool:
        return not self._balance.frozen and self.trainer.iter >= self._start

    def _caps(self) -> bool:
        # Not in the first iteration of a resumed run, which an uninterrupted one does not measure.
        return self._balance.frozen and (self.trainer.iter + 1) % self._period == 0

    def _take(self, report: TermReport) -> None:
        self._balance.take(report)
        if not self._balance.frozen:
            return
        if lacking := self._balance.without_sample():
            self._stop(lacking)
        logging.getLogger(__name__).info(
            "The weights of the losses are calibrated and stay: %s. %s holds them for GKD.BALANCE fixed",
            self._listed(),
            self._write(),
        )

    def _write(self) -> str:
        """Write the final weights, in the main process; returns the path of the file."""
        folder = self.trainer.checkpointer.save_dir
        path = os.path.join(folder, FILE)
        if comm.is_main_process():
            text = weights_as_yaml(self._distiller.method.terms.values(), self._balance.weights(), self._place)
            with naming_output(folder, path), open(path, "w", encoding="utf-8") as file:
                file.write(text)
        return path

    def _cap(self, report: TermReport) -> None:
        # Without objects the gradients of the detection losses are next to nothing.
        if not report.boxes:
            return
        total = self._balance.cap(report)
        if total is not None and not self._warned:
            self._warned = True
            logging.getLogger(__name__).warning(
                "At iteration %d the losses' gradients at the student's features have %.3g times the norm of those of "
                "the detection losses, more than GKD.BALANCE_MAX %g. Their weights are smaller, for it to be that, "
                "until it is measured again, each %s; of later times nothing is said",
                self.trainer.iter,
                total,
                self._limit,
                counted(self._period, "iteration"),
            )

    def _stop(self, names: list[str]) -> None:
        saved = save_stopped(self.trainer)
        keys = [self._terms[name].ratio_key for name in names]
        raise CalibrationError(
            f"the weight of the {listed(names)} loss can't be calibrated: in all "
            f"{counted(self._balance.taken, 'iteration')} up to {self.trainer.iter} there was no object, or its "
            "gradient at the student's features, or that of the detection losses, was 0 or not finite. Look at the "
            f"data, set {listed(keys)} to 0, or raise GKD.BALANCE_ITERS where objects are rare. {saved}"
        )

    def _listed(self) -> str:
        weights, spread, counts = self._balance.weights(), self._balance.spread(), self._balance.counts()
        return ", ".join(
            f"{name} {weights[name]:.3g} for the ratio {self._terms[name].ratio:g} ({low:.2g} to {high:.2g} in 80 % of "
            f"{counted(counts[name], 'batch', 'batches')})"
            for name, (low, high) in ((n, [weights[n] * b for b in bounds]) for n, bounds in spread.items())
        )


def _gradient_scale(trainer) -> float:
    """That of Detectron2's AMPTrainer; 1 elsewhere."""
    scaler = getattr(trainer._trainer, "grad_scaler", None)
    return scaler.get_scale() if scaler is not None else 1.0


def _stepped(trainer, scale_before: float) -> bool:
    """Whether the last iteration took the optimizer's step, which a gradient scaler may leave out."""
    if saves_in_all_processes(trainer):
        return trainer._trainer.stepped
    # The scaler tells of a step that it left out by its scale alone.
    return _gradient_scale(trainer) >= scale_before
