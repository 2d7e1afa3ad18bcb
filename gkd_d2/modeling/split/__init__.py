"""How a detector is split at its feature pyramid: features from images, losses from given features.

Each split computes exactly what the detector's own training forward computes, in the same order and with the same
random draws. This is the one place that knows where the supported versions of Detectron2 differ. Splits of other
meta-architectures are added by :func:`register_split`: docs/own_detector.md.
"""

from gkd_d2.modeling.split.base import SplitDetector
from gkd_d2.modeling.split.fcos import SplitFCOS
from gkd_d2.modeling.split.rcnn import SplitGeneralizedRCNN
from gkd_d2.modeling.split.registry import load_running_state, register_split, running_state, split_detector
from gkd_d2.modeling.split.retinanet import SplitRetinaNet

__all__ = [
    "SplitDetector",
    "SplitFCOS",
    "SplitGeneralizedRCNN",
    "SplitRetinaNet",
    "load_running_state",
    "register_split",
    "running_state",
    "split_detector",
]
