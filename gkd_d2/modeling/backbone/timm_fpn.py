"""Models of timm under Detectron2's feature pyramid, as it builds ResNets under it."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool, LastLevelP6P7
from torch import nn

from gkd_d2.modeling.backbone.timm_features import TimmFeatures
from gkd_d2.modeling.backbone.timm_images import check_pixel_norm
from gkd_d2.utils.timm_models import config_problems


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """The model of MODEL.TIMM under a pyramid whose last level is max-pooled, for R-CNNs.

    Raises:
        ValueError: see :class:`TimmFeatures`; or the weights need images that are normalised otherwise.
    """
    return _pyramid(cfg, build_timm_features(cfg), LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_retinanet_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """The model of MODEL.TIMM under a pyramid whose p6 and p7 are made of res5, for RetinaNet and FCOS.

    Raises:
        ValueError: see :func:`build_timm_fpn_backbone`; or MODEL.FPN.IN_FEATURES lacks res5.
    """
    if "res5" not in cfg.MODEL.FPN.IN_FEATURES:
        raise ValueError(
            f"MODEL.FPN.IN_FEATURES is {list(cfg.MODEL.FPN.IN_FEATURES)}, but {cfg.MODEL.BACKBONE.NAME} makes p6 and "
            "p7 of res5: add it"
        )
    bottom_up = build_timm_features(cfg)
    channels = bottom_up.output_shape()["res5"].channels
    return _pyramid(cfg, bottom_up, LastLevelP6P7(channels, cfg.MODEL.FPN.OUT_CHANNELS))


def build_timm_features(cfg: CfgNode) -> TimmFeatures:
    """The model of MODEL.TIMM alone, with the features that MODEL.FPN.IN_FEATURES names.

    Raises:
        ValueError: see :class:`TimmFeatures`; or PIXEL_MEAN and PIXEL_STD are Detectron2's defaults.
    """
    if problems := config_problems(cfg):
        raise ValueError("; ".join(problems))
    options = cfg.MODEL.TIMM
    features = TimmFeatures(
        options.NAME,
        cfg.MODEL.FPN.IN_FEATURES,
        out_indices=options.OUT_INDICES,
        pretrained=options.PRETRAINED,
        weights=options.WEIGHTS,
        norm=options.NORM,
        freeze_at=options.FREEZE_AT,
        image_format=cfg.INPUT.FORMAT,
    )
    check_pixel_norm(features, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
    return features


def _pyramid(cfg: CfgNode, bottom_up: TimmFeatures, top_block: nn.Module) -> FPN:
    options = cfg.MODEL.FPN
    return FPN(
        bottom_up=bottom_up,
        in_features=options.IN_FEATURES,
        out_channels=options.OUT_CHANNELS,
        norm=options.NORM,
        top_block=top_block,
        fuse_type=options.FUSE_TYPE,
    )
