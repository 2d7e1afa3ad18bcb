"""Differences of paired trainings, with confidence intervals."""

from __future__ import annotations

import dataclasses
import math
import statistics

# 97.5 % quantiles of Student's t distribution with 1, 2, ... degrees of freedom.
_T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclasses.dataclass(frozen=True)
class Gain:
    """How much better one setting is than another.

    Attributes:
        mean: of the differences of trainings with one seed.
        margin: half the width of the 95 % confidence interval of the mean; None with fewer than 2 seeds.
        seeds: number of seeds that both have.
    """

    mean: float
    margin: float | None
    seeds: int

    def __str__(self) -> str:
        if self.margin is None:
            return f"{self.mean:+.1f}"
        return f"{self.mean:+.1f} ({self.mean - self.margin:+.1f} to {self.mean + self.margin:+.1f})"


def paired_gain(values: dict[int, float], baseline: dict[int, float]) -> Gain | None:
    """The mean difference of what has one seed, with Student's 95 % interval; None where no seed is shared.

    Args:
        values: seed -> metric.
        baseline: the same of what the gain is over.
    """
    differences = [value - baseline[seed] for seed, value in values.items() if seed in baseline]
    if not differences:
        return None
    margin = None
    if len(differences) > 1:
        # Beyond the table the last quantile makes the interval a little too wide.
        quantile = _T_QUANTILES[min(len(differences) - 1, len(_T_QUANTILES)) - 1]
        margin = quantile * statistics.stdev(differences) / math.sqrt(len(differences))
    return Gain(statistics.fmean(differences), margin, len(differences))
