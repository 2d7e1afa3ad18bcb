"""Evaluators for Detectron2."""

from .coco_evaluation import CompletingCOCOEvaluator
from .kitti_evaluation import KITTIEvaluator

__all__ = ["CompletingCOCOEvaluator", "KITTIEvaluator"]
