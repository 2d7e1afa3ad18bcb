"""What is drawn of one image: gradient maps, box context masks and detections."""

from __future__ import annotations

import dataclasses

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
    """

    name: str
    stride: int
    teacher: Tensor
    student: Tensor
    mask: Tensor


@dataclasses.dataclass(frozen=True)
class Picture:
    """What :func:`gkd_d2.visualize.draw.draw` draws of one image. All tensors are on the CPU.

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
    levels: list[LevelMaps]
    truth: Instances
    teacher: Instances
    student: Instances
