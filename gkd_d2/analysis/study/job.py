"""One training of a study, and what it left in its folder."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path

from detectron2.config import CfgNode

from gkd_d2.analysis.runs import HEADLINE, Run
from gkd_d2.config import DISTILLER, config_differences, read_config

# What the operating system knows of a training, in its folder beside its own metrics.
COST_FILE = "study_cost.json"
# A training's place, hardware and imports, and how it is stopped and resumed, do not change what it teaches. What the
# teacher's config file says is compared in the teacher's own training.
_IRRELEVANT = (
    "OUTPUT_DIR",
    "GKD.TEACHER.WEIGHTS",
    "GKD.TEACHER.CONFIG_FILE",
    "GKD.IMPORTS",
    "MODEL.DEVICE",
    "DATALOADER.NUM_WORKERS",
    "SOLVER.CHECKPOINT_PERIOD",
)


@dataclasses.dataclass
class Job:
    """One training.

    Attributes:
        folder: its OUTPUT_DIR.
        config_file: of ``tools/train_net.py``.
        options: KEY VALUE pairs that override it.
        dataset: name of the validation set that it is to be evaluated on.
    """

    folder: Path
    config_file: str
    options: tuple[str, ...]
    dataset: str
    _finished: Run | None = dataclasses.field(default=None, init=False, repr=False, compare=False)

    @functools.cached_property
    def config(self) -> CfgNode:
        """The whole config."""
        return read_config(self.config_file, list(self.options))

    def finished(self) -> Run | None:
        """What it left in its folder; None before it has ended and was evaluated.

        Raises:
            ValueError: the folder holds another training, or a file in it is damaged.
        """
        if self._finished is None:
            self._finished = self._look()
        return self._finished

    def _look(self) -> Run | None:
        run = Run(self.folder.name, self.folder)
        # One that failed before its first checkpoint left nothing to go on with, and nothing to mix up.
        if not run.has_checkpoint:
            return None
        distils = self.config.MODEL.META_ARCHITECTURE == DISTILLER
        # Of a teacher's training the defaults of GKD may have changed since.
        different = config_differences(run.config, self.config, _IRRELEVANT if distils else (*_IRRELEVANT, "GKD"))
        if different:
            listed = "; ".join(f"{key} {there!r} there, {here!r} here" for key, (there, here) in different.items())
            raise ValueError(
                f"{self.folder} holds a training that the study does not describe (any more): {listed}. Delete the "
                "folder, or give the study another --output"
            )
        if not (self.folder / "model_final.pth").is_file() or run.iterations() < self.config.SOLVER.MAX_ITER:
            return None
        return run if run.curve(run.prefix(self.dataset) + HEADLINE) else None

    def iterations(self) -> int:
        """The number of iterations that were trained, of those that a resume goes on from."""
        run = Run(self.folder.name, self.folder)
        return run.iterations() if run.has_checkpoint else 0

    def metrics(self) -> dict[str, float]:
        """The metrics of its last evaluation, in percent; 0 for what Detectron2 gives none of: without detections.

        It must have finished.
        """
        metrics = self.finished().metrics(self.dataset)
        return {name: 0.0 if math.isnan(value) else value for name, value in metrics.items()}
