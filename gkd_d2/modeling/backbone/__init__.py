"""Backbones beside Detectron2's own, registered by their names in MODEL.BACKBONE.NAME."""

from gkd_d2.modeling.backbone.timm_features import TimmFeatures
from gkd_d2.modeling.backbone.timm_fpn import (
    build_retinanet_timm_fpn_backbone,
    build_timm_features,
    build_timm_fpn_backbone,
)
from gkd_d2.modeling.backbone.timm_images import check_timm_images

__all__ = [
    "TimmFeatures",
    "build_retinanet_timm_fpn_backbone",
    "build_timm_features",
    "build_timm_fpn_backbone",
    "check_timm_images",
]
