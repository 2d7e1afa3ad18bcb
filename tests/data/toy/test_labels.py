"""The labels of toy scenes follow from their geometry and from what stays visible."""

from __future__ import annotations

import numpy as np
import pytest

from gkd_d2.data.toy import ToyObject
from gkd_d2.data.toy.camera import Camera
from gkd_d2.data.toy.painter import Painter
from gkd_d2.data.toy.shapes import Item, Part
from gkd_d2.data.toy.street import Street


def test_label_lines() -> None:
    car = ToyObject("Car", 0.25, 1, (1, 2.5, 30.25, 40), 0.5, (1.5, 1.75, 4), (-2, 1.65, 12.5), -1.57)
    assert car.label_line() == ("Car 0.25 1 0.50 1.00 2.50 30.25 40.00 1.50 1.75 4.00 -2.00 1.65 12.50 -1.57")
    ignored = ToyObject("DontCare", -1, -1, (1, 2.5, 30.25, 40))
    assert ignored.label_line() == "DontCare -1 -1 -10 1.00 2.50 30.25 40.00 -1 -1 -1 -1000 -1000 -1000 -10"


def test_occlusion_follows_from_what_is_visible() -> None:
    street = Street.draw(np.random.default_rng(0))
    painter = Painter(Camera(320, 128), street, np.random.default_rng(0))

    def square(left: float, right: float, z: float, kind: str | None) -> None:
        """A block 2 m high, whose sides are given in metres at depth z."""
        corners = np.array([(left, 1.65, z), (right, 1.65, z), (right, -0.35, z), (left, -0.35, z)])
        painter.paint(Item(z, [Part(corners, (9, 9, 9))], kind, (2, 1, 1), (0, 1.65, z), 0))

    # Rays through the edges: a block at 10 m spans half the metres of one at 20 m that looks as broad.
    for place in (-12, -6, 0, 6, 12):
        square(place, place + 4, 20, "Car")
    for place, hidden in ((-6, 0.3), (0, 0.7), (6, 0.9), (12, 1.0)):
        square(place / 2, place / 2 + 2 * hidden, 10, None)
    labels = painter.labels()
    assert [(obj.type, obj.occlusion) for obj in labels] == [("Car", 0), ("Car", 1), ("Car", 2), ("DontCare", -1)]
    # 18.56 pixels a metre at 10 m, the centre at 160: the rest of the block from 6 m at 20 m, 90 % hidden
    assert labels[3].bbox[0::2] == pytest.approx((160 + 9.28 * 9.6, 160 + 9.28 * 10), abs=0.6)


def test_truncation_follows_from_what_lies_outside() -> None:
    street = Street.draw(np.random.default_rng(0))
    painter = Painter(Camera(320, 128), street, np.random.default_rng(0))
    # At 18.56 m a metre is 10 pixels and the left border is at -16 m: a quarter of the block is outside.
    corners = np.array([(-17, 1.65, 18.56), (-13, 1.65, 18.56), (-13, 0, 18.56), (-17, 0, 18.56)])
    painter.paint(Item(18.56, [Part(corners, (9, 9, 9))], "Van", (2, 1, 1), (0, 1.65, 19), 0))
    (label,) = painter.labels()
    assert label.truncation == 0.25
    assert label.bbox == pytest.approx((0, 58.88, 30, 58.88 + 16.5), abs=0.01)
