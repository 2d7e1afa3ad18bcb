"""pkd: correlation of the features instead of their distance."""

from __future__ import annotations

from detectron2.config import CfgNode
from torch import Tensor
from torch.nn import functional as F

from gkd_d2.methods.method import METHOD_REGISTRY, LevelwiseMethod, Term

# Beside a channel's standard deviation, so that one that is constant gives 0.
EPSILON = 1e-6


class PKD(LevelwiseMethod):
    """Each channel is brought to mean 0 and variance 1 over the batch's images and cells; then the distance is taken:

        Fhat[n,c,h,w] = (F - mean over n,h,w of F) / (std over n,h,w of F + 1e-6)
        loss_pkd      = w * sum over levels of 1/(2*N*C*H*W) * sum over n,c,h,w of (Shat - That)^2

    That is the mean over channels of 1 - r, with r the Pearson correlation of the student's and the teacher's channel:
    neither the scale nor the offset of a channel matters.

    Source: "PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient", arXiv
    2207.02039.

    What differs: the standard deviation is the biased one, with which the equality with 1 - r is exact; the public code
    in MMRazor takes the unbiased one. A batch that is computed in parts or by several processes is normalised part by
    part. MMRazor's configs distil the first four levels of the pyramid; of a RetinaNet's five, which are all distilled
    by default here, ``GKD.FEATURES ['p3','p4','p5','p6']`` chooses the same.

    Args:
        weight: of the loss. MMRazor's configs have 6 for Faster R-CNN and 10 for RetinaNet.
    """

    def __init__(self, weight: float = 6.0):
        super().__init__({"loss_pkd": Term("pkd", weight, "GKD.PKD.WEIGHT", ratio=1.0)})

    def level_losses(self, level):
        return {"loss_pkd": F.mse_loss(_standardized(level.student), _standardized(level.teacher)) / 2}


def _standardized(feature: Tensor) -> Tensor:
    """``feature`` N,C,H,W with mean 0 and variance 1 in each channel; 0 in a channel that is constant."""
    centred = feature - feature.mean(dim=(0, 2, 3), keepdim=True)
    return centred / (feature.std(dim=(0, 2, 3), correction=0, keepdim=True) + EPSILON)


@METHOD_REGISTRY.register()
def pkd(cfg: CfgNode) -> PKD:
    """The options stand in GKD.PKD."""
    return PKD(cfg.GKD.PKD.WEIGHT)
