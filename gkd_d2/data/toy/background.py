"""What stands behind all items: sky, skyline, ground and houses."""

from __future__ import annotations

import math

import numpy as np

from gkd_d2.data.toy.camera import CAMERA_HEIGHT
from gkd_d2.data.toy.painter import Painter, smooth_field
from gkd_d2.data.toy.street import Street


def paint_background(painter: Painter) -> None:
    """Paint all that stands behind the items."""
    _paint_sky(painter)
    _paint_skyline(painter)
    _paint_ground(painter)
    for side, houses in zip((-1, 1), painter.street.walls):
        if houses:
            _paint_houses(painter, side)


def _paint_sky(painter: Painter) -> None:
    rng, street, camera = painter.rng, painter.street, painter.camera
    overcast = rng.random()
    zenith = (1 - overcast) * np.array([88, 138, 205]) + overcast * np.array([172, 180, 190]) + rng.uniform(-10, 10)
    size = (camera.width, round(camera.center[1]) + 2)
    share = (np.linspace(0, 1, size[1]) ** 0.7)[:, None, None]
    sky = (1 - share) * zenith + share * street.haze_color
    clouds = smooth_field(rng, size, cells=9, amplitude=0.08)
    painter.backdrop(np.clip(sky * clouds[..., None], 0, 255).astype(np.uint8))


def _paint_skyline(painter: Painter) -> None:
    rng, street, camera = painter.rng, painter.street, painter.camera
    left, unit = 0.0, camera.height / 128
    while left < camera.width:
        width = rng.uniform(6, 34) * unit
        top = camera.center[1] - rng.uniform(2, 17) * unit
        base = (70, 95, 60) if rng.random() < 0.5 else (rng.uniform(95, 150),) * 3
        color = street.in_air(base, 60.0)
        painter.polygon(
            [(left, top), (left + width, top), (left + width, camera.center[1] + 3), (left, camera.center[1] + 3)],
            color,
        )
        left += width * rng.uniform(0.6, 1.1)


def _paint_ground(painter: Painter) -> None:
    rng, street = painter.rng, painter.street
    road, walk = street.ground_color, street.ground_color * rng.uniform(1.12, 1.35)
    grass = np.array([rng.uniform(70, 110), rng.uniform(95, 130), rng.uniform(50, 75)])
    beyond = [walk if houses else grass for houses in street.walls]
    depths = [0.5, 5, 7, 10, 14, 20, 30, 45, 70, 120, 400]
    for far, near in zip(depths[:0:-1], depths[-2::-1]):
        for x0, x1, color in (
            (-400, -street.wall_x, beyond[0]),
            (street.wall_x, 400, beyond[1]),
            (-street.wall_x, -street.half_width, walk),
            (street.half_width, street.wall_x, walk),
            (-street.half_width, street.half_width, road),
        ):
            painter.surface(_on_ground(x0, x1, near, far), color)
    for side in (-1, 1):
        edge = side * street.half_width
        painter.surface(_on_ground(edge - 0.12, edge + 0.12, 1, 70), walk * 1.15)
    for _ in range(rng.poisson(5)):  # repaired patches and shadows of what stands beside the street
        x, z = rng.uniform(-street.half_width, street.half_width), rng.uniform(5, 30)
        half = rng.uniform(0.4, 2.5, 2)
        angles = np.sort(rng.uniform(0, 2 * math.pi, 9))
        x, z = x + half[0] * np.cos(angles), z + half[1] * np.sin(angles)
        corners = np.stack([x, np.full(9, CAMERA_HEIGHT), z], axis=1)
        painter.surface(corners, road * rng.uniform(0.65, 1.12))
    paint = np.full(3, rng.uniform(185, 235))
    if rng.random() < 0.7:
        for z in np.arange(rng.uniform(3, 9), 70, 7.5):
            painter.surface(_on_ground(-0.08, 0.08, z, z + 3), paint)
    if rng.random() < 0.2:
        z = rng.uniform(8, 20)
        for x in np.arange(-street.half_width + 0.3, street.half_width - 0.5, 1.0):
            painter.surface(_on_ground(x, x + 0.5, z, z + 2.5), paint)


def _on_ground(x0: float, x1: float, z0: float, z1: float) -> np.ndarray:
    y = CAMERA_HEIGHT
    return np.array([(x0, y, z0), (x1, y, z0), (x1, y, z1), (x0, y, z1)])


def _paint_houses(painter: Painter, side: int) -> None:
    rng, street = painter.rng, painter.street
    ends = [rng.uniform(1.0, 3.0)]
    while ends[-1] < 75:
        ends.append(ends[-1] + rng.uniform(6, 16))
    light = 0.75 + 0.35 * max(0.0, -side * float(street.sun[0]))
    for start, end in reversed(list(zip(ends[:-1], ends[1:]))):
        height = rng.uniform(4.5, 13)
        wall = np.array([150, 130, 112]) * rng.uniform(0.6, 1.35) + rng.uniform(-14, 14, 3)
        painter.surface(_on_wall(side, street, start, end, 0, height), wall * light)
        painter.surface(_on_wall(side, street, start, end, 0, 0.7), wall * light * 0.7)
        if start > 50:
            continue
        glass = np.array([60, 70, 85]) * rng.uniform(0.6, 1.5)
        step, storey = rng.uniform(1.9, 3.2), rng.uniform(2.6, 3.3)
        wide, high = rng.uniform(0.8, 1.4), rng.uniform(1.1, 1.7)
        for bottom in np.arange(0.9, height - high - 0.3, storey):
            for z in np.arange(start + 0.6, end - wide - 0.3, step):
                if bottom < 1 and rng.random() < 0.25:  # a door, about as high as a person
                    door = _on_wall(side, street, z, z + 0.9, 0, 2.0)
                    painter.surface(door, (rng.uniform(40, 120) + rng.uniform(-20, 20, 3)) * light)
                    continue
                window = _on_wall(side, street, z, z + wide, bottom, bottom + high)
                painter.surface(window, glass * rng.uniform(0.7, 1.3))


def _on_wall(side: int, street: Street, z0: float, z1: float, low: float, high: float) -> np.ndarray:
    x, bottom, top = side * street.wall_x, CAMERA_HEIGHT - low, CAMERA_HEIGHT - high
    return np.array([(x, bottom, z0), (x, bottom, z1), (x, top, z1), (x, top, z0)])
