"""Evaluators for Detectron2."""

from .kitti_evaluation import KITTIEvaluator

__all__ = ["KITTIEvaluator"]
