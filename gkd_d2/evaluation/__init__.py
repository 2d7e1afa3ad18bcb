"""Evaluators for Detectron2."""

from detectron2.data import MetadataCatalog

from gkd_d2.evaluation.coco_evaluation import CompletingCOCOEvaluator
from gkd_d2.evaluation.kitti_evaluation import KITTIEvaluator

__all__ = ["CompletingCOCOEvaluator", "KITTIEvaluator", "evaluator_type"]

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
