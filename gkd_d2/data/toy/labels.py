"""The label of what shows of an object."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from gkd_d2.data.toy.camera import Camera
from gkd_d2.data.toy.shapes import Item

_MIN_LABEL_HEIGHT, _MIN_LABEL_WIDTH = 10.0, 4.0  # pixels; what shows less than that is marked DontCare
_PARTLY_HIDDEN, _LARGELY_HIDDEN, _BEYOND_LABEL = 0.1, 0.5, 0.85  # hidden share: occlusion 1, 2, DontCare


@dataclass(frozen=True)
class ToyObject:
    """One line of a label file, in the units of KITTI's format.

    Attributes:
        type: KITTI's name of the type.
        truncation: share of the whole object's box that lies outside the image; -1 for DontCare.
        occlusion: 0, 1, 2 by the hidden share of the object's pixels in the image; -1 for DontCare.
        bbox: left, top, right, bottom in pixels, rounded to 2 digits, inside [0, width - 1] x [0, height - 1].
        alpha: observation angle in radians.
        dimensions: height, width, length in metres.
        location: x, y, z of the bottom's centre in camera coordinates, metres.
        rotation_y: rotation about the camera's y axis in radians.
    """

    type: str
    truncation: float
    occlusion: int
    bbox: tuple[float, float, float, float]
    alpha: float = -10.0
    dimensions: tuple[float, float, float] = (-1.0, -1.0, -1.0)
    location: tuple[float, float, float] = (-1000.0, -1000.0, -1000.0)
    rotation_y: float = -10.0

    def label_line(self) -> str:
        """The object as a line of KITTI's label format, without the line's end."""
        if self.type == "DontCare":
            box = " ".join(f"{value:.2f}" for value in self.bbox)
            return f"DontCare -1 -1 -10 {box} -1 -1 -1 -1000 -1000 -1000 -10"
        numbers = (self.alpha, *self.bbox, *self.dimensions, *self.location, self.rotation_y)
        return f"{self.type} {self.truncation:.2f} {self.occlusion} " + " ".join(f"{value:.2f}" for value in numbers)


@dataclass
class Painted:
    """An object that was painted.

    Attributes:
        item: the object.
        whole_box: left, top, right, bottom in pixels, beyond the image too.
        num_pixels: of its mask inside the image, before anything hides it.
    """

    item: Item
    whole_box: np.ndarray
    num_pixels: int


def label_objects(painted: list[Painted], owners: np.ndarray, camera: Camera) -> list[ToyObject]:
    """Label the objects of which something shows.

    Args:
        painted: the objects from far to near, numbered from 1 in this order.
        owners: the number of the object that shows at each pixel of the canvas, 0 where none does; (h, w), a multiple
            of the image's size.
        camera: that of the image.

    Returns:
        The labels from far to near, DontCare last.
    """
    scale = owners.shape[0] // camera.height
    objects, dont_care = [], []
    for number, candidate in enumerate(painted, start=1):
        rows, columns = np.nonzero(owners == number)
        if not rows.size:
            continue
        label = _label(candidate, camera, hidden=1 - rows.size / candidate.num_pixels)
        if label is not None:
            objects.append(label)
            continue
        visible = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / scale
        box = _clip(visible, camera)
        if box[2] > box[0] and box[3] > box[1]:
            dont_care.append(ToyObject("DontCare", -1, -1, box))
    return objects + dont_care


def _label(painted: Painted, camera: Camera, hidden: float) -> ToyObject | None:
    """The object's label, None where too little of it shows."""
    box = _clip(painted.whole_box, camera)
    width, height = box[2] - box[0], box[3] - box[1]
    inside = np.clip(painted.whole_box, 0, [camera.width, camera.height] * 2)
    truncation = 1 - float(np.prod(inside[2:] - inside[:2]) / np.prod(painted.whole_box[2:] - painted.whole_box[:2]))
    too_small = height < _MIN_LABEL_HEIGHT or width < _MIN_LABEL_WIDTH
    if too_small or hidden > _BEYOND_LABEL or truncation > _BEYOND_LABEL:
        return None
    item = painted.item
    alpha = item.rotation_y - math.atan2(item.location[0], item.location[2])
    return ToyObject(
        item.type,
        round(truncation, 2),
        int(hidden > _PARTLY_HIDDEN) + int(hidden > _LARGELY_HIDDEN),
        box,
        _wrap(alpha),
        item.dimensions,
        item.location,
        _wrap(item.rotation_y),
    )


def _clip(box: np.ndarray, camera: Camera) -> tuple[float, float, float, float]:
    limit = np.array([camera.width - 1, camera.height - 1] * 2)
    return tuple(round(float(value), 2) for value in np.clip(box, 0, limit))


def _wrap(angle: float) -> float:
    return (angle + math.pi) % (2 * math.pi) - math.pi
