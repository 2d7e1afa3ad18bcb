"""One scene: laid out, painted from far to near, and labelled."""

from __future__ import annotations

import numpy as np
from PIL import Image

from gkd_d2.data.toy.background import paint_background
from gkd_d2.data.toy.camera import Camera
from gkd_d2.data.toy.labels import ToyObject
from gkd_d2.data.toy.layout import place_clutter, place_objects
from gkd_d2.data.toy.painter import Painter
from gkd_d2.data.toy.street import Street

MIN_SIZE = (160, 64)


def make_scene(seed: int, index: int, image_size: tuple[int, int] = (320, 128)) -> tuple[Image.Image, list[ToyObject]]:
    """Draw one scene.

    Args:
        seed: seed of the data set, >= 0.
        index: number of the image, >= 0; with the seed it decides the scene.
        image_size: width and height in pixels.

    Returns:
        The RGB image and its objects from far to near, DontCare last.

    Raises:
        ValueError: an argument is out of range.
    """
    painter = paint_scene(seed, index, image_size)
    return painter.develop(), painter.labels()


def paint_scene(seed: int, index: int, image_size: tuple[int, int]) -> Painter:
    """Lay out and paint one scene; the arguments are those of :func:`make_scene`."""
    check_scene_arguments(seed, image_size)
    rng = np.random.default_rng([seed, index])
    street = Street.draw(rng)
    painter = Painter(Camera(*image_size), street, rng)
    paint_background(painter)
    items = place_objects(street, rng) + place_clutter(street, rng)
    # Blurring what is painted so far leaves the far part of the scene blurred more than the near part.
    blurs = [(35.0, 0.9), (16.0, 0.6)]
    for item in sorted(items, key=lambda item: -item.z):
        while blurs and item.z < blurs[0][0]:
            painter.blur(blurs.pop(0)[1])
        painter.paint(item)
    return painter


def check_scene_arguments(seed: int, image_size: tuple[int, int]) -> None:
    """Raise ValueError where the seed is negative or the image too small."""
    if seed < 0:
        raise ValueError(f"seed is {seed}, not an integer >= 0")
    width, height = image_size
    if width < MIN_SIZE[0] or height < MIN_SIZE[1]:
        raise ValueError(f"image_size is {width} x {height}; at least {MIN_SIZE[0]} x {MIN_SIZE[1]} pixels are needed")
