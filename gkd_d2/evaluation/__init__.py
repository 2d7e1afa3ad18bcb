"""Evaluators for Detectron2."""

from gkd_d2.evaluation.build import build_evaluator, evaluator_type
from gkd_d2.evaluation.coco_evaluation import CompletingCOCOEvaluator
from gkd_d2.evaluation.kitti_evaluation import KITTIEvaluator

__all__ = ["CompletingCOCOEvaluator", "KITTIEvaluator", "build_evaluator", "evaluator_type"]
