"""The student of a run as stock Detectron2 reads it: a config and a checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path

from detectron2.config import CfgNode, get_cfg
from torch import Tensor

from gkd_d2.config import detector_config, without_backbone_weights
from gkd_d2.utils.timm_models import has_timm_backbone


def stock_config(cfg: CfgNode, weights: Path) -> CfgNode:
    """The config of the plain detector that ``cfg`` trains, with the keys of a fresh Detectron2 config alone.

    Where the backbone is one of timm's, MODEL.TIMM stays: it is read after ``gkd_d2.add_gkd_config``.

    Args:
        cfg: of a distiller or of a plain detector.
        weights: what MODEL.WEIGHTS becomes.
    """
    stock = get_cfg()
    detector = without_backbone_weights(detector_config(cfg))
    plain = _common(detector, stock)
    if has_timm_backbone(cfg):
        plain.MODEL.TIMM = detector.MODEL.TIMM.clone()
    plain.MODEL.WEIGHTS = str(weights)
    # The run's own folder, where whoever trains or evaluates by this config would overwrite the run.
    plain.OUTPUT_DIR = stock.OUTPUT_DIR
    return plain


def _common(cfg: CfgNode, stock: CfgNode) -> CfgNode:
    """``cfg`` without the keys that ``stock`` lacks."""
    known = {key: value for key, value in cfg.items() if key in stock}
    return CfgNode({key: _common(v, stock[key]) if isinstance(v, CfgNode) else v for key, v in known.items()})


def to_half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict with its floating tensors in 16 bits.

    Raises:
        ValueError: a finite number is beyond 65504 and would become infinite.
    """
    # Keeps the modules' versions, an attribute of the dictionary.
    rounded = copy.copy(state)
    for name, value in state.items():
        if value.is_floating_point():
            rounded[name] = value.half()
        if (value.isfinite() & ~rounded[name].isfinite()).any():
            raise ValueError(
                f"{name} holds numbers up to {value.abs().max().item():.3g}, beyond the 65504 that 16 bits can hold: "
                "export without --fp16"
            )
    return rounded
