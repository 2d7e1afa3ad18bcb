"""Pedestrians and cyclists, and the bicycle that both cyclists and clutter have."""

from __future__ import annotations

import math

import numpy as np

from gkd_d2.data.toy.camera import CAMERA_HEIGHT
from gkd_d2.data.toy.shapes import Billboard, Item
from gkd_d2.data.toy.street import Street

_SKINS = ((224, 182, 152), (198, 150, 118), (150, 104, 76), (96, 66, 50))
_HAIRS = ((34, 28, 26), (70, 50, 36), (128, 96, 60), (150, 148, 144))


def cloth(rng: np.random.Generator) -> np.ndarray:
    """A colour of clothes."""
    gray = rng.uniform(25, 170)
    return np.clip(gray + rng.normal(0, 28, 3), 10, 230)


def pedestrian(street: Street, rng: np.random.Generator, x: float, z: float) -> Item:
    """A person on foot, seen from the front or from the side."""
    height, broad = rng.uniform(1.5, 1.9), rng.uniform(0.75, 1.15)
    figure = Billboard(x, z, (height / 1.75 * rng.choice([-1, 1]), height / 1.75))
    figure.shadow(street, 0.35)
    skin, hair = _SKINS[rng.integers(len(_SKINS))], _HAIRS[rng.integers(len(_HAIRS))]
    coat, trousers = cloth(rng), cloth(rng) * 0.8
    sideways = rng.random() < 0.5
    shoulder = (0.15 if sideways else 0.22) * broad
    stride = rng.uniform(0.1, 0.32) if sideways else rng.uniform(0.05, 0.12)
    swing = rng.uniform(0.05, 0.3) if sideways else 0.05
    hip = 0.88
    figure.limb([(0.03, hip), (-0.4 * stride, 0.46), (-stride, 0.05)], 0.15, trousers * 0.75)
    figure.limb([(-stride - 0.05, 0.03), (-stride + 0.14, 0.03)], 0.07, (30, 28, 28))
    figure.limb([(-0.8 * shoulder, 1.38), (-shoulder - swing, 1.1), (-shoulder - 0.5 * swing, 0.86)], 0.1, coat * 0.7)
    if rng.random() < 0.3:  # a rucksack or bag
        figure.ellipse((-shoulder - 0.06, 1.2), (0.14, 0.22), cloth(rng))
    figure.limb([(-0.02, hip), (0.5 * stride, 0.48), (stride, 0.05)], 0.16, trousers)
    figure.limb([(stride - 0.05, 0.03), (stride + 0.16, 0.03)], 0.07, (34, 32, 32))
    hem = rng.choice([0.85, 0.55], p=[0.75, 0.25])
    waist = shoulder * (0.85 if hem > 0.8 else 1.15)
    torso = [(-waist, hem), (waist, hem), (shoulder, 1.42), (0.06, 1.5), (-0.06, 1.5), (-shoulder, 1.42)]
    figure.polygon(torso, coat)
    figure.polygon([(0.25 * waist, hem), (waist, hem), (shoulder, 1.42), (0.3 * shoulder, 1.46)], coat * 0.82)
    figure.limb([(0.85 * shoulder, 1.38), (shoulder + 0.3 * swing, 1.1), (shoulder + swing, 0.88)], 0.1, coat * 0.9)
    figure.rectangle(-0.045, 0.045, 1.46, 1.56, skin)
    figure.ellipse((0.01, 1.63), (0.095, 0.125), skin)
    figure.polygon([(-0.1, 1.58), (-0.1, 1.69), (0, 1.76), (0.1, 1.69), (0.04, 1.68), (-0.04, 1.62)], hair)
    return Item(z, figure.parts, "Pedestrian", (height, 0.6, 0.6), (x, CAMERA_HEIGHT, z), float(rng.uniform(-3, 3)))


def draw_bicycle(figure: Billboard, rng: np.random.Generator) -> None:
    """Add a bicycle, seen from the side, to a figure."""
    frame, tyre = rng.uniform(20, 190, 3), (28, 28, 30)
    for center in (-0.52, 0.52):
        figure.ring((center, 0.34), 0.32, 0.06, tyre)
    figure.limb([(-0.52, 0.34), (-0.05, 0.32), (-0.2, 0.82), (-0.52, 0.34)], 0.05, frame)
    figure.limb([(-0.05, 0.32), (0.4, 0.78), (-0.18, 0.76)], 0.05, frame)
    figure.limb([(0.52, 0.34), (0.4, 0.78), (0.36, 1.0), (0.48, 1.04)], 0.05, frame * 0.8)
    figure.limb([(-0.3, 0.9), (-0.08, 0.9)], 0.07, (30, 26, 24))


def cyclist(street: Street, rng: np.random.Generator, x: float, z: float) -> Item:
    """A person on a bicycle, seen from the side or along the street."""
    height = rng.uniform(1.6, 1.85)
    scale = height / 1.75
    skin, hair = _SKINS[rng.integers(len(_SKINS))], _HAIRS[rng.integers(len(_HAIRS))]
    shirt, trousers = cloth(rng), cloth(rng) * 0.8
    helmet = rng.uniform(40, 235, 3) if rng.random() < 0.5 else hair
    if rng.random() < 0.45:  # riding along the street: seen from behind or in front
        figure = Billboard(x, z, (scale * rng.choice([-1, 1]), scale))
        figure.shadow(street, 0.4)
        figure.ellipse((0, 0.34), (0.045, 0.34), (28, 28, 30))
        figure.limb([(0, 0.5), (0, 1.0)], 0.06, rng.uniform(20, 190, 3))
        figure.limb([(-0.1, 0.9), (-0.16, 0.62), (-0.12, 0.34)], 0.14, trousers * 0.8)
        figure.limb([(0.1, 0.9), (0.17, 0.7), (0.12, 0.46)], 0.15, trousers)
        figure.polygon([(-0.16, 0.86), (0.16, 0.86), (0.23, 1.38), (0.07, 1.48), (-0.07, 1.48), (-0.23, 1.38)], shirt)
        figure.limb([(-0.21, 1.36), (-0.33, 1.16), (-0.28, 1.0)], 0.09, shirt * 0.85)
        figure.limb([(0.21, 1.36), (0.33, 1.16), (0.28, 1.0)], 0.09, shirt * 0.85)
        figure.limb([(-0.3, 1.0), (0.3, 1.0)], 0.045, (40, 40, 42))
        figure.ellipse((0, 1.6), (0.1, 0.13), skin)
        figure.polygon([(-0.12, 1.62), (-0.1, 1.7), (0, 1.76), (0.1, 1.7), (0.12, 1.62)], helmet)
        rotation_y = float(rng.choice([-1, 1]) * math.pi / 2)
    else:
        turn = rng.uniform(0.55, 1.0)
        direction = rng.choice([-1, 1])
        figure = Billboard(x, z, (scale * turn * direction, scale))
        figure.shadow(street, 0.75)
        lean = rng.uniform(0.18, 0.42)
        head = (-0.18 + lean * 1.2, 1.62)
        figure.limb([(-0.2, 0.92), (0.12, 0.72), (0.0, 0.42)], 0.13, trousers * 0.75)
        draw_bicycle(figure, rng)
        figure.limb([(-0.2, 0.92), (0.16, 0.66), (-0.02, 0.24)], 0.15, trousers)
        shoulder = (-0.18 + lean, 1.42)
        figure.limb([(-0.2, 0.88), shoulder], 0.27, shirt)
        figure.limb([shoulder, (0.2 + 0.4 * lean, 1.16), (0.44, 1.06)], 0.09, shirt * 0.8)
        figure.ellipse(head, (0.11, 0.13), skin)
        figure.polygon(
            [(head[0] + a, head[1] + b) for a, b in ((-0.13, 0), (-0.1, 0.1), (0, 0.14), (0.12, 0.05))], helmet
        )
        rotation_y = 0.0 if direction > 0 else math.pi
    return Item(z, figure.parts, "Cyclist", (height, 0.6, 1.76), (x, CAMERA_HEIGHT, z), rotation_y)
