"""fitnet: plain imitation of all cells."""

from __future__ import annotations

from detectron2.config import CfgNode
from torch.nn import functional as F

from gkd_d2.methods.method import METHOD_REGISTRY, LevelwiseMethod, Term


class FitNet(LevelwiseMethod):
    """Half the mean squared difference of the features, without any weight on cells or channels:

        loss_fitnet = w * sum over levels of 1/(2*N*C*H*W) * sum over n,c,h,w of (S - T)^2

    Source: "FitNets: Hints for Thin Deep Nets", arXiv 1412.6550, eq. 3: 1/2 * ||hint - r(guided)||^2 with a regressor r
    from the student's to the teacher's channels.

    What differs: the squared norm is divided by the number of its elements, so that its weight does not depend on
    sizes. The imitated layers are levels of a feature pyramid, r is the 1x1 convolution of the distiller, the identity
    where channels agree, and student and r are trained with the detection loss at once, not in a stage ahead of it.

    Args:
        weight: of the loss. The paper has no detector, so there is no value of its own to start with.
    """

    def __init__(self, weight: float = 1.0):
        super().__init__({"loss_fitnet": Term("fitnet", weight, "GKD.FITNET.WEIGHT", ratio=1.0)})

    def level_losses(self, level):
        return {"loss_fitnet": F.mse_loss(level.student, level.teacher) / 2}


@METHOD_REGISTRY.register()
def fitnet(cfg: CfgNode) -> FitNet:
    """The options stand in GKD.FITNET."""
    return FitNet(cfg.GKD.FITNET.WEIGHT)
