"""What a training that starts from random weights needs."""

from __future__ import annotations

import logging

from detectron2.layers import FrozenBatchNorm2d
from torch import nn

ADVICE = (
    "to train from scratch, set MODEL.WEIGHTS to '', MODEL.BACKBONE.FREEZE_AT to 0, and MODEL.RESNETS.NORM and "
    "MODEL.FPN.NORM to BN"
)


def warn_of_frozen_random_weights(detector: nn.Module) -> None:
    """Warn where parts of a detector's backbone would keep the random weights that they start with.

    Args:
        detector: before its first step, without weights of its own.
    """
    backbone = getattr(detector, "backbone", detector)
    reasons = []
    if any(not parameter.requires_grad for parameter in backbone.parameters()):
        reasons.append("parts of the backbone are frozen by MODEL.BACKBONE.FREEZE_AT, and so keep random weights")
    if any(isinstance(module, FrozenBatchNorm2d) for module in backbone.modules()):
        reasons.append("MODEL.RESNETS.NORM or MODEL.FPN.NORM is FrozenBN, which without weights does not normalize")
    if reasons:
        logging.getLogger(__name__).warning("MODEL.WEIGHTS is empty, but %s: %s", ", and ".join(reasons), ADVICE)
