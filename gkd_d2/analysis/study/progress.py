"""How far the trainings of a study are."""

from __future__ import annotations

import threading
import time

from gkd_d2.analysis.runs import HEADLINE
from gkd_d2.analysis.study.job import Job
from gkd_d2.analysis.study.plan import Study
from gkd_d2.utils.progress import duration


class Progress:
    """How many trainings of a study are done, and when the rest will be.

    Args:
        study: its finished trainings are counted, and take no more time.
    """

    def __init__(self, study: Study):
        lengths = study.lengths()
        finished = [job for job in study.jobs() if job.finished()]
        self._number, self._done = len(lengths), len(finished)
        # In iterations.
        self._left = sum(lengths) - sum(job.config.SOLVER.MAX_ITER for job in finished)
        self._trained = 0
        self._begin = time.monotonic()
        self._lock = threading.Lock()

    def ended(self, job: Job, trained: int) -> str:
        """Count a finished training, and say so.

        Args:
            job: of the training.
            trained: iterations that it was trained for since this object was made.
        """
        with self._lock:
            self._done += 1
            self._left -= job.config.SOLVER.MAX_ITER
            self._trained += trained
            text = f"{self._done} of {self._number}, AP {job.metrics()[HEADLINE]:.1f}"
            if self._left > 0 and self._trained > 0:
                text += f", {duration((time.monotonic() - self._begin) / self._trained * self._left)} left"
            return text
