"""What finished trainings left in their folders."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.utils.logger import log_first_n
from fvcore.nn import parameter_count
from torch import nn

from gkd_d2.config import DISTILLER, detector_config, method_names, read_config
from gkd_d2.modeling.student import build_student, load_student
from gkd_d2.utils.last_checkpoint import has_checkpoint
from gkd_d2.utils.text import counted, listed

HEADLINE = "bbox/AP"


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished training of ``tools/train_net.py``, or of Detectron2's own.

    Attributes:
        name: how the run is called in a report.
        folder: its OUTPUT_DIR.
    """

    name: str
    folder: Path

    @cached_property
    def config(self) -> CfgNode:
        """Its config.

        Raises:
            FileNotFoundError: the folder holds none.
            ValueError: it is not one of this Detectron2 and gkd_d2, or a module in its GKD.IMPORTS is not found.
        """
        path = self.folder / "config.yaml"
        if not path.is_file():
            raise FileNotFoundError(f"{self.folder} holds no config.yaml: it is not the OUTPUT_DIR of a training")
        cfg = read_config(str(path), [])
        cfg.freeze()
        return cfg

    @property
    def distilled(self) -> bool:
        """Whether it trained a student under a teacher."""
        return self.config.MODEL.META_ARCHITECTURE == DISTILLER and method_names(self.config) != ["none"]

    @cached_property
    def architecture(self) -> CfgNode:
        """The MODEL node of the detector it trained, the student's where it distilled, without weights and device."""
        return architecture_of(self.config)

    @property
    def has_checkpoint(self) -> bool:
        """Whether the run has left something to go on from; see :func:`gkd_d2.utils.last_checkpoint.has_checkpoint`."""
        return has_checkpoint(str(self.folder))

    @cached_property
    def network(self) -> nn.Module:
        """The detector it trained, the student where it distilled, on the CPU and in eval mode.

        Its weights are those of the last checkpoint, random where there is none.

        Raises:
            ValueError: the checkpoint does not fit the config.
        """
        return load_student(self.config, self.folder) if self.has_checkpoint else build_student(self.config)

    @property
    def parameters(self) -> int:
        """The number of the detector's parameters."""
        return parameter_count(self.network)[""]

    @cached_property
    def history(self) -> dict[int, dict[str, float]]:
        """Iteration -> scalar -> value, in the order of the iterations.

        What a resumed run wrote again replaces what it had written. A line that is cut or damaged, as where a disk was
        full, is left out, with a warning.

        Raises:
            FileNotFoundError: the folder holds no metrics.json.
        """
        path = self.folder / "metrics.json"
        if not path.is_file():
            raise FileNotFoundError(f"{self.folder} holds no metrics.json: nothing was trained there")
        rows: dict[int, dict[str, float]] = {}
        damaged = []
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            row = _row(line)
            if row is None:
                damaged.append(str(number))
            else:
                rows.setdefault(row.pop("iteration"), {}).update(row)
        if damaged:
            log_first_n(
                logging.WARNING,
                f"{path}: left out {counted(len(damaged), 'damaged line')}, number {listed(damaged)}",
                key="message",
            )
        return dict(sorted(rows.items()))

    def iterations(self) -> int:
        """The number of training iterations."""
        return 1 + max(self.curve("total_loss"), default=-1)

    def curve(self, scalar: str) -> dict[int, float]:
        """Iteration -> value of one scalar of metrics.json; empty where it was never written."""
        return {iteration: row[scalar] for iteration, row in self.history.items() if scalar in row}

    def losses(self) -> list[str]:
        """Names of the loss terms, the sum first; one that is 0 all the time is off and left out."""
        names = {name for row in self.history.values() for name in row if name.startswith("loss_") and row[name] != 0}
        return ["total_loss", *sorted(names)]

    def prefix(self, dataset: str) -> str:
        """What the names of a dataset's metrics begin with: Detectron2 adds its name where there are several.

        Raises:
            ValueError: the run is not evaluated on it.
        """
        datasets = self.config.DATASETS.TEST
        if dataset not in datasets:
            raise ValueError(f"{self.folder} is evaluated on {', '.join(datasets) or 'nothing'}, not on {dataset}")
        return f"{dataset}/" if len(datasets) > 1 else ""

    def metrics(self, dataset: str) -> dict[str, float]:
        """The metrics of the last evaluation on a dataset, in percent: ``bbox/AP``, ``kitti/AP_moderate`` and so on.

        Those of the averaged weights, where MODEL_EMA.ENABLED was set, are ``bbox_EMA/AP`` and so on.

        Raises:
            ValueError: there was none.
        """
        prefix = self.prefix(dataset)
        evaluated = self.curve(prefix + HEADLINE)
        if not evaluated:
            raise ValueError(
                f"{self.folder} was never evaluated: its metrics.json holds no {prefix}{HEADLINE}. Let the training "
                "end, or set TEST.EVAL_PERIOD and go on with --resume"
            )
        row = self.history[max(evaluated)]
        found = {}
        for task, averaged in itertools.product(("bbox", "kitti"), ("", "_EMA")):
            # Where there are several datasets the outer key, to which "_EMA" is appended, is the dataset.
            start = f"{prefix[:-1]}{averaged}/{task}/" if prefix else f"{task}{averaged}/"
            found |= {f"{task}{averaged}/{name[len(start) :]}": row[name] for name in row if name.startswith(start)}
        return found

    def detections(self, dataset: str, score: float) -> dict[str, list[dict]]:
        """Image id -> detections of at least ``score`` as COCO result records.

        Raises:
            OSError: the last evaluation left no file of them.
            ValueError: that is damaged.
        """
        path = self.folder / "inference" / dataset / "coco_instances_results.json"
        found: dict[str, list[dict]] = {}
        try:
            for record in json.loads(path.read_bytes()):
                if record["score"] >= score:
                    found.setdefault(record["image_id"], []).append(record)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is cut or damaged ({error}): evaluate the run again") from error
        return found


def architecture_of(cfg: CfgNode) -> CfgNode:
    """The MODEL node of a config's detector, the student's of a distiller, without weights and device."""
    model = detector_config(cfg).MODEL.clone()
    for key in ("WEIGHTS", "DEVICE"):
        model.pop(key)
    return model


def find_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs of several folders, called by what distinguishes the folders."""
    common = os.path.commonpath([folder.resolve().parent for folder in folders])
    return [Run(os.path.relpath(folder.resolve(), common), folder) for folder in folders]


def shared_dataset(runs: Sequence[Run]) -> str:
    """The one dataset that all runs are evaluated on.

    Raises:
        ValueError: there is none, or more than one.
    """
    shared = [name for name in runs[0].config.DATASETS.TEST if all(name in run.config.DATASETS.TEST for run in runs)]
    if len(shared) == 1:
        return shared[0]
    if shared:
        raise ValueError(f"the runs are all evaluated on {', '.join(shared)}: choose one of them by --dataset")
    tested = "; ".join(f"{run.folder}: {', '.join(run.config.DATASETS.TEST) or 'none'}" for run in runs)
    raise ValueError(f"there is no dataset that all runs are evaluated on. DATASETS.TEST of {tested}")


def _row(line: bytes) -> dict | None:
    """A line of metrics.json; None where it is none."""
    try:
        row = json.loads(line)
    except (RecursionError, ValueError):
        return None
    if not (isinstance(row, dict) and type(row.get("iteration")) is int):
        return None
    return row if all(isinstance(value, (int, float)) for value in row.values()) else None
