"""Toy data in KITTI's own format: seeded, drawn street scenes, so that everything runs without a download.

A scene is laid out in metres in KITTI's camera coordinates (x right, y down, z forward, the ground at y = 1.65) and
painted from far to near. Boxes, truncation and occlusion follow from that geometry and from what stays visible.
"""

from gkd_d2.data.toy.labels import ToyObject
from gkd_d2.data.toy.scene import make_scene
from gkd_d2.data.toy.write import FIRST_VAL_ID, make_toy_kitti

__all__ = ["FIRST_VAL_ID", "ToyObject", "make_scene", "make_toy_kitti"]
