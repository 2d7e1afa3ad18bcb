"""What a training that starts from random weights needs."""

from __future__ import annotations

import logging

from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from torch import nn

ADVICE = (
    "to train from scratch, set MODEL.WEIGHTS to '', MODEL.BACKBONE.FREEZE_AT to 0, and MODEL.RESNETS.NORM and "
    "MODEL.FPN.NORM to BN"
)


def warn_of_frozen_random_weights(cfg: CfgNode, detector: nn.Module) -> None:
    """Warn where parts of a detector's backbone would keep the random weights that they start with.

    Args:
        cfg: of the run; nothing is random where its MODEL.WEIGHTS is set.
        detector: before its first step.
    """
    if cfg.MODEL.WEIGHTS:
        return
    backbone = getattr(detector, "backbone", detector)
    reasons = []
    if any(not parameter.requires_grad for parameter in backbone.parameters()):
        frozen_at = cfg.MODEL.BACKBONE.FREEZE_AT
        key = f"MODEL.BACKBONE.FREEZE_AT is {frozen_at}" if frozen_at > 0 else "a part of the backbone is frozen"
        reasons.append(f"{key}, which keeps random weights as they are")
    if any(isinstance(module, FrozenBatchNorm2d) for module in backbone.modules()):
        norms = f"MODEL.RESNETS.NORM is {cfg.MODEL.RESNETS.NORM!r} and MODEL.FPN.NORM {cfg.MODEL.FPN.NORM!r}"
        reasons.append(f"{norms}, of which FrozenBN does not normalize")
    if reasons:
        logging.getLogger(__name__).warning("MODEL.WEIGHTS is empty, but %s: %s", ", and ".join(reasons), ADVICE)
