"""fgfi: imitation of the cells whose anchors lie near objects."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, pairwise_iou
from torch import Tensor

from gkd_d2.methods.method import METHOD_REGISTRY, Method, Term, widened

LEVELS = ("together", "separate")


class FGFI(Method):
    """Squared differences of the features at the cells near objects, I = 1 (:func:`near_object_masks`), which are Np:

        loss_fgfi = w * 1/(2*Np) * sum over levels, n,c,h,w of I * (S - T)^2;    0 where Np = 0

    Np is counted over the batch and all levels. With ``levels="separate"`` each level has its own Np.

    Source: "Distilling Object Detectors with Fine-grained Feature Imitation", arXiv 1906.03609.

    What differs: the paper and the authors' code have one feature map. Here the pyramid takes its place: the largest
    overlap of an object and Np are those of all distilled levels together, so that an object is imitated at the levels
    whose anchors are of its size, and a coarse level without such an object contributes 0. Ports to feature pyramids
    do this, or apply the formula to each level by itself, as ``levels="separate"`` does. Then every object is imitated
    at every level: on 81 KITTI images, with the anchors of configs/gkd_retinanet_kitti.yaml, 43 % of the cells of p6
    and 81 % of those of p7 are near objects, against 3 % and none with "together". The adaptation layer is the 1x1
    convolution of the distiller, the identity where channels agree; the authors' code has a 3x3 convolution and a ReLU
    in any case.

    Args:
        weight: of the loss; 0.01 in the authors' code.
        threshold: psi of the paper, which takes 0.5; at least 0 and below 1.
        levels: "together" or "separate".

    Raises:
        ValueError: an option is out of range.
    """

    needs_anchors = True

    def __init__(self, weight: float = 0.01, threshold: float = 0.5, levels: str = "together"):
        if not 0 <= threshold < 1:
            raise ValueError(f"GKD.FGFI.THRESHOLD is {threshold}, but must be at least 0 and below 1")
        if levels not in LEVELS:
            raise ValueError(f"GKD.FGFI.LEVELS is {levels!r}, but must be one of {', '.join(LEVELS)}")
        together = levels == "together"
        super().__init__({"loss_fgfi": Term("fgfi", weight, "GKD.FGFI.WEIGHT", level_assigned=together, ratio=1.0)})
        self.threshold = threshold
        self.together = together

    def forward(self, levels, factor=1.0):
        # The masks of all distilled levels, of which the call may be given only some.
        masks = near_object_masks(levels[0].boxes, levels[0].anchors, self.threshold, together=self.together)
        cells = torch.stack([mask.sum() for mask in masks])
        if self.together:
            cells = cells.sum().expand(len(masks))
        # Np is 0 where the sum is; its minimum is for the division alone.
        cells = cells.clamp(min=1)
        loss = 0
        for level in map(widened, levels):
            distance = (level.student - level.teacher).square().sum(dim=1)
            loss = loss + (masks[level.index] * distance).sum() / (2 * cells[level.index])
        return {"loss_fgfi": factor * self.terms["loss_fgfi"].weight * loss}


@torch.no_grad()
def near_object_masks(
    boxes: list[Tensor], anchors: Sequence[Tensor], threshold: float, *, together: bool
) -> list[Tensor]:
    """Where an anchor overlaps an object nearly as much as the best anchor does.

    A cell is near an object if one of its anchors has an overlap (intersection over union) with it of more than
    ``threshold`` times the largest overlap that any anchor has with it.

    Args:
        boxes: N tensors K,4 of ground truth, xyxy, pixels of the padded batch; K may be 0.
        anchors: one tensor H,W,A,4 a level, in the same pixels.
        threshold: psi.
        together: whether the largest overlap is that of all levels, or of the anchor's own level.

    Returns:
        N,H,W, bool, for each level: whether the cell is near any object of the image.
    """
    images = []
    for truth in boxes:
        overlaps = [
            pairwise_iou(Boxes(level.reshape(-1, 4)), Boxes(truth)).view(*level.shape[:3], len(truth))
            for level in anchors
        ]
        largest = torch.stack([overlap.amax(dim=(0, 1, 2)) for overlap in overlaps])
        if together:
            largest = largest.amax(dim=0).expand_as(largest)
        images.append([(overlap > threshold * most).flatten(2).any(dim=2) for overlap, most in zip(overlaps, largest)])
    return [torch.stack(masks) for masks in zip(*images)]


@METHOD_REGISTRY.register()
def fgfi(cfg: CfgNode) -> FGFI:
    """The options stand in GKD.FGFI."""
    node = cfg.GKD.FGFI
    return FGFI(node.WEIGHT, node.THRESHOLD, node.LEVELS)
