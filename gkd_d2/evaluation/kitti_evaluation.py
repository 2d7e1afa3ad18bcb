"""KITTI's official 2D average precision, and VOC's, as a Detectron2 evaluator."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from gkd_d2.data.datasets.kitti_labels import CLASSES
from gkd_d2.evaluation.kitti_overlaps import Detections, GroundTruth
from gkd_d2.evaluation.kitti_report import evaluate_images, flat_metrics, table
from gkd_d2.evaluation.kitti_results import write_results
from gkd_d2.utils.text import counted

logger = logging.getLogger(__name__)

RESULTS_FOLDER = "kitti_results"


class KITTIEvaluator(DatasetEvaluator):
    """KITTI's official average precision of every class and difficulty, and VOC's at IoU 0.5 of every class.

    :meth:`evaluate` returns ``{"kitti": metrics}`` in percent. KITTI's are ``Car-easy-R40`` and so on, and the means
    over the classes ``AP_moderate`` (the headline: moderate, R40), ``AP_easy``, ``AP_hard`` and, at 11 recall points,
    ``AP11_moderate``, ``AP11_easy``, ``AP11_hard``. VOC's are ``Car-AP50_voc`` and so on, and their mean
    ``mAP50_voc``. Only images that were processed count. With several processes the first one computes, the others
    return an empty dictionary.
    """

    def __init__(
        self,
        dataset_name: str,
        output_dir: str | os.PathLike | None = None,
        *,
        write_results: bool = False,
        voc_strict: bool = False,
        distributed: bool = True,
    ) -> None:
        """Read the dataset's labels.

        Args:
            dataset_name: a registered dataset whose records hold ``kitti_objects``; its classes are among KITTI's.
                Without labels, as in ``kitti_test``, there are detections to write and no metric.
            output_dir: where result files go.
            write_results: write the detections in KITTI's result format, one file ID.txt an image, into the folder
                ``kitti_results`` of ``output_dir``.
            voc_strict: as ``strict`` of :func:`gkd_d2.evaluation.voc_metric.voc_average_precision`.
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
        self._voc_strict = voc_strict
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
        result = evaluate_images(
            [self._ground_truth[image_id] for image_id in image_ids],
            [detections[image_id] for image_id in image_ids],
            voc_strict=self._voc_strict,
        )
        logger.info(
            "KITTI average precision in percent, %s:\n%s",
            counted(len(image_ids), "image"),
            table(result, voc_strict=self._voc_strict),
        )
        return OrderedDict(kitti=flat_metrics(result))

    def _write(self, detections: dict[str, Detections]) -> None:
        self._results_dir.mkdir(parents=True, exist_ok=True)
        for image_id, found in detections.items():
            write_results(self._results_dir / f"{image_id}.txt", found)
        logger.info(
            "Wrote the detections of %s in KITTI's result format to %s",
            counted(len(detections), "image"),
            self._results_dir,
        )
