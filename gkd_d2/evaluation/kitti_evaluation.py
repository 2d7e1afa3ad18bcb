"""KITTI's official 2D average precision as a Detectron2 evaluator."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from tabulate import tabulate

from gkd_d2.data.datasets.kitti_labels import CLASSES, DIFFICULTIES
from gkd_d2.evaluation.kitti_metric import average_precision
from gkd_d2.evaluation.kitti_overlaps import Detections, GroundTruth
from gkd_d2.evaluation.kitti_results import write_results
from gkd_d2.utils.text import counted

logger = logging.getLogger(__name__)

RESULTS_FOLDER = "kitti_results"


class KITTIEvaluator(DatasetEvaluator):
    """KITTI's official average precision of every class and difficulty, at 40 and at 11 recall points.

    :meth:`evaluate` returns ``{"kitti": metrics}`` in percent: ``Car-easy-R40`` and so on, and the means over the
    classes ``AP_moderate`` (the headline: moderate, R40), ``AP_easy``, ``AP_hard`` and, at 11 points,
    ``AP11_moderate``, ``AP11_easy``, ``AP11_hard``. Only images that were processed count. With several processes
    the first one computes, the others return an empty dictionary.
    """

    def __init__(
        self,
        dataset_name: str,
        output_dir: str | os.PathLike | None = None,
        *,
        write_results: bool = False,
        distributed: bool = True,
    ) -> None:
        """Read the dataset's labels.

        Args:
            dataset_name: a registered dataset whose records hold ``kitti_objects``; its classes are among KITTI's.
                Without labels, as in ``kitti_test``, there are detections to write and no metric.
            output_dir: where result files go.
            write_results: write the detections in KITTI's result format, one file ID.txt an image, into the folder
                ``kitti_results`` of ``output_dir``.
            distributed: gather the detections of all processes; else each evaluates its own.

        Raises:
            ValueError: the dataset is not of KITTI's form, or there is no folder to write results to.
        """
        if write_results and output_dir is None:
            raise ValueError("write_results needs an output_dir to write to")
        metadata = MetadataCatalog.get(dataset_name)
        self._classes = metadata.get("thing_classes", [])
        if not self._classes or not set(self._classes) <= set(CLASSES):
            raise ValueError(
                f"dataset {dataset_name} has the classes {', '.join(self._classes) or 'none'}; KITTI's metric knows "
                f"{', '.join(CLASSES)} only"
            )
        self._results_dir = Path(output_dir) / RESULTS_FOLDER if write_results else None
        self._distributed = distributed
        self._labelled = metadata.get("kitti_labelled", True)
        self._ground_truth: dict[str, GroundTruth] = {}
        if self._labelled:
            for record in DatasetCatalog.get(dataset_name):
                if "kitti_objects" not in record:
                    raise ValueError(
                        f"dataset {dataset_name}: the record of {record.get('file_name')} has no kitti_objects; "
                        "register the dataset by gkd_d2.data.register_kitti"
                    )
                self._ground_truth[record["image_id"]] = GroundTruth.from_objects(record["kitti_objects"])
        self._detections: dict[str, Detections] = {}

    def reset(self) -> None:
        """Forget all detections."""
        self._detections = {}

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Take the detections of a batch.

        Args:
            inputs: records with ``image_id``.
            outputs: ``{"instances": Instances}`` each, with pred_boxes, pred_classes and scores in the pixels of the
                image file.

        Raises:
            ValueError: an image comes twice.
        """
        for record, output in zip(inputs, outputs):
            image_id = record["image_id"]
            if image_id in self._detections:
                raise ValueError(f"image {image_id} was evaluated already: its objects would be found twice")
            found = output["instances"].to("cpu")
            self._detections[image_id] = Detections(
                [self._classes[category] for category in found.pred_classes.tolist()],
                found.pred_boxes.tensor.numpy().astype(np.float64),
                found.scores.numpy().astype(np.float64),
            )

    def evaluate(self) -> dict[str, dict[str, float]]:
        """The metrics of all images that were processed.

        Returns:
            ``{"kitti": {name: percent}}`` in the first process, an empty dictionary in others and where there is
            nothing to evaluate.
        """
        detections = self._detections
        if self._distributed:
            comm.synchronize()
            gathered = comm.gather(self._detections, dst=0)
            if not comm.is_main_process():
                return {}
            detections = {image_id: found for part in gathered for image_id, found in part.items()}
        if not detections:
            logger.warning("KITTIEvaluator did not receive any image")
            return {}
        if self._results_dir is not None:
            self._write(detections)
        if not self._labelled:
            logger.info("There are no labels to compare the detections with")
            return {}
        image_ids = sorted(detections)
        result = average_precision(
            [self._ground_truth[image_id] for image_id in image_ids], [detections[image_id] for image_id in image_ids]
        )
        metrics = flat_metrics(result)
        logger.info("KITTI average precision in percent, %s:\n%s", counted(len(image_ids), "image"), table(result))
        return OrderedDict(kitti=metrics)

    def _write(self, detections: dict[str, Detections]) -> None:
        self._results_dir.mkdir(parents=True, exist_ok=True)
        for image_id, found in detections.items():
            write_results(self._results_dir / f"{image_id}.txt", found)
        logger.info(
            "Wrote the detections of %s in KITTI's result format to %s",
            counted(len(detections), "image"),
            self._results_dir,
        )


def flat_metrics(result: dict[str, dict[str, dict[str, float]]]) -> dict[str, float]:
    """The metrics by one name each; the means over the classes come first, the headline ``AP_moderate`` at the front.

    Args:
        result: of :func:`gkd_d2.evaluation.kitti_metric.average_precision`.
    """
    # Detectron2 prints only names without a hyphen, the means, in its summary.
    levels = ["moderate", *(level for level in DIFFICULTIES if level != "moderate")]
    means = {
        f"{prefix}_{level}": float(np.mean([result[name][level][points] for name in CLASSES]))
        for prefix, points in (("AP", "R40"), ("AP11", "R11"))
        for level in levels
    }
    single = {
        f"{name}-{level}-{points}": result[name][level][points]
        for name in CLASSES
        for level in DIFFICULTIES
        for points in ("R40", "R11")
    }
    return means | single


def table(result: dict[str, dict[str, dict[str, float]]]) -> str:
    """The metrics as text: a line a class and one for their mean, a column a difficulty and number of recall points.

    Args:
        result: of :func:`gkd_d2.evaluation.kitti_metric.average_precision`.
    """
    columns = [(level, points) for points in ("R40", "R11") for level in DIFFICULTIES]
    rows = [[name, *(result[name][level][points] for level, points in columns)] for name in CLASSES]
    rows.append(["mean", *(float(np.mean([row[1 + index] for row in rows])) for index in range(len(columns)))])
    header = ["AP", *(f"{level} {points}" for level, points in columns)]
    return tabulate(rows, headers=header, tablefmt="pipe", floatfmt=".2f")
