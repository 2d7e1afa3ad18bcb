"""Which evaluators a dataset gets."""

from __future__ import annotations

import os

from detectron2.data import MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_json
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.utils import comm

from gkd_d2.evaluation.coco_evaluation import CompletingCOCOEvaluator
from gkd_d2.evaluation.kitti_evaluation import KITTIEvaluator

_KNOWN = ("coco", "kitti")


def evaluator_type(dataset_name: str) -> str:
    """Which evaluator a dataset's metadata ask for: "coco" or "kitti"; "coco" where they name none.

    Raises:
        ValueError: it is another one.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", "coco")
    if kind not in _KNOWN:
        raise ValueError(
            f"the dataset {dataset_name} has the evaluator_type {kind!r}, but there are evaluators for "
            f"{' and '.join(_KNOWN)} only: take it out of DATASETS.TEST, or register its data under another name with "
            "evaluator_type 'coco'"
        )
    return kind


def build_evaluator(
    dataset_name: str, folder: str, *, kitti_results: bool = False, voc_strict: bool = False
) -> DatasetEvaluator:
    """COCO-style average precision; for datasets of KITTI's form the official one and VOC's too, ahead of it.

    Args:
        dataset_name: registered.
        folder: for the files of the evaluation.
        kitti_results: whether detections are also written in KITTI's result format; without labels they always are.
        voc_strict: as ``strict`` of :func:`gkd_d2.evaluation.voc_metric.voc_average_precision`.

    Raises:
        ValueError: the dataset's ``evaluator_type`` is another.
    """
    metadata = MetadataCatalog.get(dataset_name)
    kind = evaluator_type(dataset_name)
    if not metadata.get("kitti_labelled", True):
        return KITTIEvaluator(dataset_name, folder, write_results=True)
    _convert_to_coco(dataset_name, folder)
    coco = CompletingCOCOEvaluator(dataset_name, output_dir=folder)
    if kind == "coco":
        return coco
    kitti = KITTIEvaluator(dataset_name, folder, write_results=kitti_results, voc_strict=voc_strict)
    return DatasetEvaluators([kitti, coco])


def _convert_to_coco(dataset_name: str, folder: str) -> None:
    """Write a dataset's ground truth in COCO's form anew, once a process.

    COCOEvaluator would do so, but takes a file that an earlier run left in ``folder`` even if the data have changed.
    """
    metadata = MetadataCatalog.get(dataset_name)
    if metadata.get("json_file") is not None:
        return
    path = os.path.join(folder, f"{dataset_name}_coco_format.json")
    if comm.is_main_process():
        convert_to_coco_json(dataset_name, path, allow_cached=False)
    comm.synchronize()
    metadata.json_file = path
