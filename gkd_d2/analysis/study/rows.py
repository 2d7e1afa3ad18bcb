"""What the finished trainings of each setting reached, and what they took."""

from __future__ import annotations

import dataclasses
import json
import statistics

from gkd_d2.analysis.study.job import COST_FILE, Job
from gkd_d2.analysis.study.plan import Study


@dataclasses.dataclass(frozen=True)
class Row:
    """What is there of one setting of one detector.

    Attributes:
        name: of the setting.
        scale: what the weights of its config are multiplied by; None where it is not chosen yet.
        metrics: seed -> metric -> percent.
        seconds: of an iteration, the median of the trainings' medians; None without any.
        megabytes: that a training takes at most; None without any.
        cuda: whether they are those that torch holds on a GPU, not those of the process.
        at_once: numbers of trainings that ran at the same time as one of its own, itself included.
    """

    name: str
    scale: float | None
    metrics: dict[int, dict[str, float]]
    seconds: float | None
    megabytes: float | None
    cuda: bool
    at_once: frozenset[int]

    def values(self, metric: str) -> dict[int, float]:
        """Seed -> percent, of the seeds that have the metric."""
        return {seed: found[metric] for seed, found in self.metrics.items() if metric in found}


def read_rows(study: Study, detector: str) -> dict[str, Row]:
    """Setting -> what is there of it."""
    rows = {}
    for name in study.settings_of(detector):
        jobs = {seed: job for seed, job in study.student_jobs(detector, name).items() if job.finished()}
        times = [list(job.finished().curve("time").values()) for job in jobs.values()]
        costs = [cost for cost in map(_cost, jobs.values()) if cost]
        rows[name] = Row(
            name,
            study.scale(detector, name),
            {seed: job.metrics() for seed, job in jobs.items()},
            # Detectron2 times none of the first iterations.
            statistics.median(map(statistics.median, filter(None, times))) if any(times) else None,
            max((cost["megabytes"] for cost in costs), default=None),
            any(cost["device"] == "cuda" for cost in costs),
            frozenset(cost["at_once"] for cost in costs),
        )
    return rows


def _cost(job: Job) -> dict | None:
    """Megabytes that a finished training took, the device, and how many ran at once; None where it is not known."""
    path = job.folder / COST_FILE
    if not path.is_file():
        return None
    try:
        cost = json.loads(path.read_text(encoding="utf-8"))
        if cost["device"] == "cuda":
            return cost | {"megabytes": max(job.finished().curve("max_mem").values())}
        return cost | {"megabytes": cost["resident_megabytes"], "at_once": cost["at_once"]}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, and the report leaves the costs out") from error
