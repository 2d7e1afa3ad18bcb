"""The split of FCOS, which came after Detectron2 0.5."""

from __future__ import annotations

from gkd_d2.modeling.split.registry import register_split
from gkd_d2.modeling.split.retinanet import SplitRetinaNet

try:
    from detectron2.modeling.meta_arch.fcos import FCOS
except ModuleNotFoundError:
    FCOS = None


class SplitFCOS(SplitRetinaNet):
    """FCOS: a RetinaNet, as its parts are called, whose head predicts the centerness of each cell, too."""

    def score_maps(self, features):
        """The largest of a cell's scores, as its detections have them: sqrt(class probability * centerness)."""
        levels = self.model.head_in_features
        logits, _, centerness = self.model.head([features[name] for name in levels])
        return {
            name: (classes.amax(dim=1).sigmoid() * center[:, 0].sigmoid()).sqrt()
            for name, classes, center in zip(levels, logits, centerness)
        }


if FCOS is not None:
    register_split(FCOS)(SplitFCOS)
