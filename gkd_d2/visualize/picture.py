"""What is drawn of one image: gradient maps, box context masks, importances and detections."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from detectron2.structures import Instances
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class LevelMaps:
    """One level of one image: maps of H x W cells that cover the padded batch.

    Attributes:
        name: of the level.
        stride: in pixels.
        teacher: H,W, the teacher's gradient map in [0, 1].
        student: H,W, the student's.
        mask: H,W, the box context mask.
        importance: H,W, >= 0, what weighs the cells in the imitation; None where that is the teacher's map, or no
            gradient.
    """

    name: str
    stride: int
    teacher: Tensor
    student: Tensor
    mask: Tensor
    importance: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a map that is not 0 everywhere lies.

    Attributes:
        share: of its sum, that of the cells in the ground-truth boxes; in [0, 1].
        peak_inside: whether its largest cell is one of them.
    """

    share: float
    peak_inside: bool


@dataclasses.dataclass(frozen=True)
class PlacedMap:
    """A map and where it lies.

    Attributes:
        values: H,W, >= 0.
        place: None where the values are 0 everywhere.
    """

    values: Tensor
    place: Place | None


@dataclasses.dataclass(frozen=True)
class LevelImportances:
    """One level of one image: what makes its cells important, and whether those are the cells of the objects.

    Attributes:
        name: of the level.
        stride: in pixels.
        area: share of its cells that lie in the ground-truth boxes.
        maps: name of an importance -> its map; what the level does not have is left out.
    """

    name: str
    stride: int
    area: float
    maps: dict[str, PlacedMap]


@dataclasses.dataclass(frozen=True)
class Picture:
    """What :mod:`gkd_d2.visualize.draw` draws of one image. All tensors are on the CPU.

    Attributes:
        image: height,width,3, uint8, RGB, without padding.
        padded_size: (height, width) in pixels of the batch that the maps cover; the image lies at its top left.
        levels: the maps.
        truth: ``gt_boxes`` and ``gt_classes``.
        teacher: the teacher's ``pred_boxes``, ``pred_classes`` and ``scores``.
        student: the student's.
    """

    image: np.ndarray
    padded_size: tuple[int, int]
    levels: Sequence[LevelMaps] | Sequence[LevelImportances]
    truth: Instances
    teacher: Instances
    student: Instances
