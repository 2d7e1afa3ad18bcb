"""fgd: foreground and background apart, weighed by the teacher's attention, and each cell's relation to all others."""

from __future__ import annotations

import math

import torch
from detectron2.config import CfgNode
from torch import Tensor

from gkd_d2.losses.reference import boxes_on_grid, channel_attention, spatial_attention
from gkd_d2.methods.method import METHOD_REGISTRY, LevelwiseMethod, Term
from gkd_d2.methods.relation import RelationLoss

RELATION = "loss_fgd_relation"
# Of each of the four losses by default.
_RATIO = 0.1


class FGD(LevelwiseMethod):
    """Focal and global distillation. With the masks Mf and Mb of :func:`focal_masks` and the attentions

        Ac(F) = C   * softmax over c   of ( mean over h,w of abs(F) / tau )
        As(F) = H*W * softmax over h,w of ( mean over c   of abs(F) / tau )

    of which those of the teacher weigh the squared differences D = As(T) * sum over c of Ac(T) * (S - T)^2,

        loss_fgd_foreground = w * sum over levels of 1/N * sum over n,h,w of Mf * D
        loss_fgd_background = w * sum over levels of 1/N * sum over n,h,w of Mb * D
        loss_fgd_attention  = w * sum over levels of 1/N * (  sum over n,c   of |Ac(S) - Ac(T)|
                                                            + sum over n,h,w of |As(S) - As(T)| )
        loss_fgd_relation   = w * sum over levels of the loss of RelationLoss

    The weights w are the paper's alpha, beta, gamma and lambda. The last loss is the paper's global part, whose blocks
    train with the student: :class:`gkd_d2.methods.relation.RelationLoss`. It starts as plain imitation of all cells.

    Source: "Focal and Global Knowledge Distillation for Detectors", arXiv 2111.11837; weights and the mean over the
    batch as in its public code.

    What differs: a box is rounded outwards to the cells it touches and scaled by the padded size of the batch; the
    public code adds a row and a column of cells and scales by the unpadded size. Where channels differ, the distiller's
    convolution has no bias; the public code's has one.

    Args:
        foreground: weight of ``loss_fgd_foreground``.
        background: weight of ``loss_fgd_background``.
        attention: weight of ``loss_fgd_attention``.
        temperature: tau of the attention, > 0.
        relation: weight of ``loss_fgd_relation``.

    Raises:
        ValueError: an option is out of range.
    """

    def __init__(
        self,
        foreground: float = 5e-5,
        background: float = 2.5e-5,
        attention: float = 5e-5,
        temperature: float = 0.5,
        relation: float = 5e-7,
    ):
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"GKD.FGD.TEMPERATURE is {temperature}, but must be a finite number > 0")
        super().__init__(
            {
                "loss_fgd_foreground": Term("foreground", foreground, "GKD.FGD.FOREGROUND_WEIGHT", ratio=_RATIO),
                "loss_fgd_background": Term("background", background, "GKD.FGD.BACKGROUND_WEIGHT", ratio=_RATIO),
                "loss_fgd_attention": Term("attention", attention, "GKD.FGD.ATTENTION_WEIGHT", ratio=_RATIO),
                RELATION: Term("relation", relation, "GKD.FGD.RELATION_WEIGHT", ratio=_RATIO),
            }
        )
        self.temperature = temperature
        self.relation = RelationLoss({})

    def build_parameters(self, channels):
        if RELATION in self.active():
            self.relation = RelationLoss(channels)

    def level_losses(self, level):
        s, t = level.student, level.teacher
        n = s.shape[0]
        channels_s, channels_t = (channel_attention(f.abs(), self.temperature) for f in (s, t))
        cells_s, cells_t = (spatial_attention(f.abs(), self.temperature) for f in (s, t))
        distance = cells_t * (channels_t[:, :, None, None] * (s - t).square()).sum(dim=1)
        size = tuple(s.shape[2:])
        foreground, background = focal_masks(level.boxes, level.image_size, size, device=s.device, dtype=s.dtype)
        difference = (channels_s - channels_t).abs().sum() + (cells_s - cells_t).abs().sum()
        losses = {
            "loss_fgd_foreground": (foreground * distance).sum() / n,
            "loss_fgd_background": (background * distance).sum() / n,
            "loss_fgd_attention": difference / n,
        }
        if RELATION in self.active():
            losses[RELATION] = self.relation(level)
        return losses


def focal_masks(
    boxes: list[Tensor],
    image_size: tuple[int, int],
    feature_size: tuple[int, int],
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The weights of the cells in the objects, and of those outside all objects.

    A cell in an object of width w and height h in cells, which is rounded outwards to them, weighs 1/(w*h); in several
    objects it weighs as in the smallest. Each cell outside all objects weighs 1 over the number of such cells.

    Args:
        boxes: N tensors K,4 of ground truth, xyxy, pixels of the padded batch; those that are empty or not finite are
            skipped.
        image_size: (height, width) of the padded batch in pixels.
        feature_size: (H, W) of the level in cells.
        device: of the masks.
        dtype: of the masks.

    Returns:
        Foreground and background, N,H,W each.
    """
    masks = [_foreground(b.to(device), image_size, feature_size) for b in boxes]
    foreground = torch.stack(masks).to(dtype)
    outside = (foreground == 0).to(dtype)
    return foreground, outside / outside.sum(dim=(1, 2), keepdim=True).clamp(min=1)


def _foreground(boxes: Tensor, image_size: tuple[int, int], feature_size: tuple[int, int]) -> Tensor:
    """The weights of the cells in the objects of one image: boxes K,4 -> H,W."""
    if len(boxes) == 0:
        return torch.zeros(feature_size, device=boxes.device)
    height, width = feature_size
    x0, y0, x1, y1 = boxes_on_grid(boxes, image_size, feature_size)[:, :, None].unbind(dim=1)
    x, y = (torch.arange(cells, device=boxes.device) + 0.5 for cells in (width, height))
    inside = ((y >= y0) & (y < y1))[:, :, None] & ((x >= x0) & (x < x1))[:, None, :]
    return torch.where(inside, 1 / ((x1 - x0) * (y1 - y0))[:, :, None], 0.0).amax(dim=0)


@METHOD_REGISTRY.register()
def fgd(cfg: CfgNode) -> FGD:
    """The options stand in GKD.FGD."""
    node = cfg.GKD.FGD
    return FGD(
        foreground=node.FOREGROUND_WEIGHT,
        background=node.BACKGROUND_WEIGHT,
        attention=node.ATTENTION_WEIGHT,
        temperature=node.TEMPERATURE,
        relation=node.RELATION_WEIGHT,
    )
