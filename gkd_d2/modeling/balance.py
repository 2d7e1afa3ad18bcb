"""Weights of losses by the ratio of their gradients to the detection loss's, calibrated once."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from gkd_d2.modeling.measure import TermReport
from gkd_d2.utils.text import listed


class Balance:
    """Finds the weights at which a method's losses have wanted ratios to the detection loss.

    With A the norm of the detection loss's gradient at the student's features, of all distilled levels together, and
    B_k that of loss k at weight 1,

        weight_k = ratio_k * exp(median over samples of log(A / B_k)).

    A sample is one batch of the training, that of all processes and parts together. It counts for a loss where A and
    B_k are finite and above 0. One without boxes counts for none, since the detection loss may have next to no gradient
    there.

    The weights are found once and then stay: a weight that followed the ratio would make a squared distance an absolute
    one, whose gradient never fades, and would have no bound.

    Args:
        ratios: name of a loss -> its ratio, above 0.
        iters: number of batches to take, after which the weights are frozen; at least 1.
        limit: the most that the ratios of all losses together may be afterwards, see :meth:`cap`; above 0.

    Attributes:
        frozen: whether the weights are final.
        taken: number of batches that were taken.

    Raises:
        ValueError: ``iters`` or ``limit`` is out of range.
    """

    def __init__(self, ratios: Mapping[str, float], iters: int, limit: float = math.inf):
        if iters < 1:
            raise ValueError(f"GKD.BALANCE_ITERS is {iters}, but must be >= 1")
        if not limit > 0:
            raise ValueError(f"GKD.BALANCE_MAX is {limit}, but must be > 0")
        self._ratios = dict(ratios)
        self._iters = iters
        self._limit = limit
        # Name of a loss -> log(A / B_k) of each sample.
        self._samples: dict[str, list[float]] = {name: [] for name in ratios}
        # Of all weights, from the cap.
        self._scale = 1.0
        self.taken = 0
        self.frozen = False

    def take(self, report: TermReport) -> None:
        """Take a batch, measured with all losses at weight 1; the last one freezes the weights."""
        detection = report.detection_norm if report.boxes else 0.0
        for name, samples in self._samples.items():
            # A warm-up of the weights is no part of the loss at weight 1.
            norm = report.norm(name) / report.factor
            if all(math.isfinite(number) and number > 0 for number in (detection, norm)):
                samples.append(math.log(detection / norm))
        self.taken += 1
        self.frozen = self.taken >= self._iters

    def counts(self) -> dict[str, int]:
        """Name of a loss -> number of batches that have counted for it."""
        return {name: len(samples) for name, samples in self._samples.items()}

    def without_sample(self) -> list[str]:
        """Names of the losses that no batch has counted for."""
        return [name for name, samples in self._samples.items() if not samples]

    def weights(self) -> dict[str, float]:
        """Name of a loss -> its weight by the samples so far; 0 where there is none."""
        return {
            name: self._ratios[name] * math.exp(np.median(samples)) if samples else 0.0
            for name, samples in self._samples.items()
        }

    def spread(self) -> dict[str, tuple[float, float]]:
        """Name of a loss -> tenth and ninetieth percentile of B_k / A over the samples, which are not none."""
        return {
            name: tuple(math.exp(-np.percentile(samples, percent)) for percent in (90, 10))
            for name, samples in self._samples.items()
            if samples
        }

    def factors(self) -> dict[str, float]:
        """Name of a loss -> what it is multiplied by in the next batch.

        Before the first sample it is 0; then the weights so far, times the part of the batches that is taken; then the
        final weights, times what :meth:`cap` leaves of them.
        """
        scale = self._scale if self.frozen else min(1.0, self.taken / self._iters)
        return {name: scale * weight for name, weight in self.weights().items()}

    def cap(self, report: TermReport) -> float | None:
        """Keep the ratios of all losses together at the limit or below, until the next call.

        A batch whose gradients are not finite, or that has none of the detection loss, changes nothing.

        Args:
            report: of a batch, measured with all losses at weight 1, after the weights are frozen.

        Returns:
            The sum of the ratios by the final weights, where it is above the limit; else None.
        """
        weighted = report.times(self.weights())
        detection, norms = weighted.detection_norm, sum(weighted.norm(name) for name in self._ratios)
        if not (detection > 0 and math.isfinite(detection) and math.isfinite(norms)):
            return None
        total = norms / detection
        above = total > self._limit
        self._scale = self._limit / total if above else 1.0
        return total if above else None

    def state_dict(self) -> dict:
        """All but the options: numbers, lists and strings."""
        return {
            "samples": {name: list(samples) for name, samples in self._samples.items()},
            "taken": self.taken,
            "frozen": self.frozen,
            "scale": self._scale,
        }

    def load_state_dict(self, state_dict: Mapping) -> None:
        """Go on with the samples of a checkpoint, which the ratios of this object are applied to.

        Raises:
            ValueError: it was calibrated, at least in part, without one of the losses.
        """
        if not state_dict["taken"]:
            return
        samples = state_dict["samples"]
        if lacking := [name for name in self._ratios if name not in samples]:
            raise ValueError(
                f"the weights of the losses were calibrated without the {listed(lacking)} loss: set "
                f"{listed([f'GKD.RATIOS.{name.upper()}' for name in lacking])} to 0, or start anew from the weights of "
                "the checkpoint, by MODEL.WEIGHTS, without --resume and in another OUTPUT_DIR"
            )
        self._samples = {name: list(samples[name]) for name in self._ratios}
        self.taken, self.frozen, self._scale = (state_dict[key] for key in ("taken", "frozen", "scale"))
