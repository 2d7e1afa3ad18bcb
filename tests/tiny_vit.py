"""Tiny ViTs with their pyramids, of Detectron2 after 0.5; a config's GKD.IMPORTS may name this module."""

from __future__ import annotations

from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.vit import SimpleFeaturePyramid, ViT


@BACKBONE_REGISTRY.register()
def build_tiny_vit_backbone(cfg, input_shape) -> SimpleFeaturePyramid:
    """Levels p2 to p6; one block looks at windows, the other at the whole image; relative and absolute positions."""
    return _pyramid(cfg, square_pad=0)


@BACKBONE_REGISTRY.register()
def build_tiny_square_vit_backbone(cfg, input_shape) -> SimpleFeaturePyramid:
    """The same, for batches padded to 160 x 160 pixels."""
    return _pyramid(cfg, square_pad=160)


def _pyramid(cfg, square_pad: int) -> SimpleFeaturePyramid:
    net = ViT(
        img_size=64, embed_dim=32, depth=2, num_heads=2, window_size=2, window_block_indexes=(0,), use_rel_pos=True
    )
    return SimpleFeaturePyramid(
        net,
        in_feature="last_feat",
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        scale_factors=(4.0, 2.0, 1.0, 0.5),
        top_block=LastLevelMaxPool(),
        square_pad=square_pad,
    )
