"""fgfi: imitation of the cells whose anchors lie near objects."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, pairwise_iou
from torch import Tensor

from gkd_d2.methods.method import METHOD_REGISTRY, LevelwiseMethod, Term


class FGFI(LevelwiseMethod):
    """Squared differences of the features at the cells near objects, I = 1 (:func:`near_object_mask`), which are Np:

        loss_fgfi = w * sum over levels of 1/(2*Np) * sum over n,c,h,w of I * (S - T)^2;    0 where Np = 0

    Source: "Distilling Object Detectors with Fine-grained Feature Imitation", arXiv 1906.03609.

    What differs: the paper's formula, for one feature map, is applied at each level by itself, with the anchors, the
    largest overlap and the Np of that level, Np counted over the batch. The adaptation layer is the 1x1 convolution of
    the distiller, the identity where channels agree; the authors' code has a 3x3 convolution and a ReLU in any case.

    Args:
        weight: of the loss; 0.01 in the authors' code.
        threshold: psi of the paper, which takes 0.5; at least 0 and below 1.

    Raises:
        ValueError: an option is out of range.
    """

    needs_anchors = True

    def __init__(self, weight: float = 0.01, threshold: float = 0.5):
        if not 0 <= threshold < 1:
            raise ValueError(f"GKD.FGFI.THRESHOLD is {threshold}, but must be at least 0 and below 1")
        super().__init__({"loss_fgfi": Term("fgfi", weight, "GKD.FGFI.WEIGHT", level_assigned=True)})
        self.threshold = threshold

    def level_losses(self, level):
        mask = near_object_mask(level.boxes, level.anchors, tuple(level.student.shape[2:]), self.threshold)
        distance = (level.student - level.teacher).square().sum(dim=1)
        # Np is 0 where the sum is; its minimum is for the division alone.
        return {"loss_fgfi": (mask * distance).sum() / (2 * mask.sum().clamp(min=1))}


@torch.no_grad()
def near_object_mask(boxes: list[Tensor], anchors: Tensor, feature_size: tuple[int, int], threshold: float) -> Tensor:
    """Where an anchor overlaps an object nearly as much as the best anchor does.

    A cell is near an object if one of its anchors has an overlap (intersection over union) with it of more than
    ``threshold`` times the largest overlap that any anchor of the level has with it.

    Args:
        boxes: N tensors K,4 of ground truth, xyxy, pixels of the padded batch; K may be 0.
        anchors: H*W*A,4, in the same pixels, cell by cell and row by row.
        feature_size: (H, W) of the level in cells.
        threshold: psi.

    Returns:
        N,H,W, bool: whether the cell is near any object of the image.
    """
    masks = []
    for truth in boxes:
        overlap = pairwise_iou(Boxes(anchors), Boxes(truth))
        near = overlap > threshold * overlap.amax(dim=0)
        masks.append(near.any(dim=1).view(*feature_size, -1).any(dim=2))
    return torch.stack(masks)


@METHOD_REGISTRY.register()
def fgfi(cfg: CfgNode) -> FGFI:
    """The options stand in GKD.FGFI."""
    return FGFI(cfg.GKD.FGFI.WEIGHT, cfg.GKD.FGFI.THRESHOLD)
