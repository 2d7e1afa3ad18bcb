"""What the parts of a scene share: the street's layout, the light and the air."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

Color = tuple[float, float, float]  # RGB in 0..255


@dataclass
class Street:
    """What a scene's parts share: layout in metres, light and air."""

    half_width: float
    sidewalk: float
    walls: tuple[bool, bool]  # left, right: a row of houses, else green
    sun: np.ndarray
    ambient: float
    haze_length: float
    haze_color: np.ndarray
    ground_color: np.ndarray

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Street:
        """A random street."""
        sun = np.array([rng.uniform(-1, 1), -rng.uniform(0.5, 1.2), rng.uniform(-1, 0.4)])
        gray = rng.uniform(70, 125)
        return cls(
            half_width=rng.uniform(3.8, 6.0),
            sidewalk=rng.uniform(2.0, 4.0),
            walls=(rng.random() < 0.65, rng.random() < 0.65),
            sun=sun / np.linalg.norm(sun),
            ambient=rng.uniform(0.45, 0.75),
            haze_length=rng.uniform(50, 220),
            haze_color=rng.uniform(170, 228) + np.array([rng.uniform(-8, 8), 0.0, rng.uniform(-4, 16)]),
            ground_color=gray + np.array([rng.uniform(-3, 5), 0.0, rng.uniform(-5, 5)]),
        )

    @property
    def wall_x(self) -> float:
        """Distance of the walls from the middle of the street, in metres."""
        return self.half_width + self.sidewalk

    def shade(self, color: Color, normal: np.ndarray) -> Color:
        """A surface's colour by its outward unit normal (Lambert's law with an ambient part)."""
        light = self.ambient + (1 - self.ambient) * max(0.0, float(normal @ self.sun)) * 1.4
        return tuple(np.asarray(color, dtype=float) * min(light, 1.25))

    def in_air(self, color: Color, z: float) -> Color:
        """What the haze leaves of a colour at depth z."""
        share = 1 - math.exp(-max(z, 0.0) / self.haze_length)
        return tuple((1 - share) * np.asarray(color, dtype=float) + share * self.haze_color)
