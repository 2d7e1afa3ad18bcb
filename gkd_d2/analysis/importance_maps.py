"""What makes the cells of an image important, and whether those are the cells of its objects."""

from __future__ import annotations

import torch
from torch import Tensor

from gkd_d2.engine.hooks.pictures import picture_with
from gkd_d2.losses import LossOptions
from gkd_d2.losses.options import IMPORTANCES
from gkd_d2.losses.reference import boxes_on_grid, cell_importance
from gkd_d2.modeling.distiller import GKDDistiller
from gkd_d2.modeling.observation import Observation
from gkd_d2.visualize.legend import SCORE
from gkd_d2.visualize.picture import LevelImportances, Picture, Place, PlacedMap


def take_importance_picture(distiller: GKDDistiller, seen: Observation) -> Picture:
    """The first image of a batch with every importance of its cells.

    Args:
        distiller, seen: as for :func:`level_importances`.
    """
    return picture_with(distiller, seen, level_importances(distiller, seen))


@torch.no_grad()
def level_importances(distiller: GKDDistiller, seen: Observation) -> list[LevelImportances]:
    """Every importance of the cells of a batch's first image, and the teacher's score of them.

    It changes nothing of the distiller. Shares and areas are those of all cells, the padding's included.

    Args:
        distiller: in training mode.
        seen: by its :meth:`~gkd_d2.GKDDistiller.observe`, with the gradients of both networks.
    """
    rectifier = distiller.method.map_options.rectifier
    scores = distiller.teacher_score_maps(seen.batched_inputs)
    levels = []
    for level, (name, stride) in enumerate(distiller.strides.items()):
        teacher, teacher_grad, student_grad = (
            tensors[level][:1] for tensors in (seen.teacher, seen.teacher_grad, seen.student_grad)
        )
        maps = {
            importance: cell_importance(
                teacher, teacher_grad, student_grad, LossOptions(rectifier=rectifier, importance=importance)
            )
            for importance in IMPORTANCES
        }
        if distiller.teacher_features[level] in scores:
            maps[SCORE] = scores[distiller.teacher_features[level]]
        inside = cells_in_boxes(seen.boxes[0].cpu(), seen.image_size, tuple(teacher.shape[2:]))
        placed = {importance: placed_map(values[0].float().cpu(), inside) for importance, values in maps.items()}
        levels.append(LevelImportances(name, stride, inside.double().mean().item(), placed))
    return levels


def cells_in_boxes(boxes: Tensor, image_size: tuple[int, int], feature_size: tuple[int, int]) -> Tensor:
    """The cells that lie in a box once the boxes are rounded outwards to the grid, as for the box context mask.

    Args:
        boxes: K,4, xyxy, pixels of the padded batch; those that are empty or not finite hold no cell.
        image_size: (height, width) of the padded batch in pixels.
        feature_size: (height, width) of the level in cells.

    Returns:
        H,W, bool.
    """
    inside = torch.zeros(feature_size, dtype=torch.bool)
    for x0, y0, x1, y1 in boxes_on_grid(boxes, image_size, feature_size).clamp(min=0).long().tolist():
        inside[y0:y1, x0:x1] = True
    return inside


def placed_map(values: Tensor, inside: Tensor) -> PlacedMap:
    """A map, with the share of its sum and the peak that lie in some cells.

    Args:
        values: H,W, >= 0.
        inside: H,W, bool.
    """
    if not values.any():
        return PlacedMap(values, None)
    share = (values[inside].double().sum() / values.double().sum()).item()
    return PlacedMap(values, Place(share, bool(inside.flatten()[values.argmax()])))
