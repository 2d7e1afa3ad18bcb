"""Where things stand in a street."""

from __future__ import annotations

import math

import numpy as np

from gkd_d2.data.toy.camera import NEAREST
from gkd_d2.data.toy.clutter import bicycle, board, bollard, container, litter_bin, pole, tree
from gkd_d2.data.toy.people import cyclist, pedestrian
from gkd_d2.data.toy.shapes import Item
from gkd_d2.data.toy.street import Street
from gkd_d2.data.toy.vehicles import VEHICLE_SIZES, vehicle

# Labelled things stand nearer than KITTI's, for the pictures are a quarter as large.
_FARTHEST_VEHICLE, _FARTHEST_PERSON = 35.0, 20.0


class _Ground:
    """The rectangles of the ground that are taken."""

    def __init__(self) -> None:
        self._taken: list[tuple[float, float, float, float]] = []

    def take(self, x: float, z: float, half_x: float, half_z: float) -> bool:
        """Take a rectangle if none of it is taken."""
        for other_x, other_z, other_half_x, other_half_z in self._taken:
            if abs(x - other_x) < half_x + other_half_x and abs(z - other_z) < half_z + other_half_z:
                return False
        self._taken.append((x, z, half_x, half_z))
        return True


def _depth(rng: np.random.Generator, x: float, nearest: float, farthest: float) -> float:
    """A depth, evenly spread in its logarithm, at which something at lateral offset x is in view."""
    nearest = min(max(nearest, 1.1 * abs(x)), 0.9 * farthest)
    return float(np.exp(rng.uniform(math.log(nearest), math.log(farthest))))


def place_objects(street: Street, rng: np.random.Generator) -> list[Item]:
    """Vehicles and people, none within another."""
    ground = _Ground()
    return _place_vehicles(street, rng, ground) + _place_people(street, rng, ground)


def _place_vehicles(street: Street, rng: np.random.Generator, ground: _Ground) -> list[Item]:
    items = []

    def add(kind: str, x: float, z: float, rotation_y: float) -> None:
        height, width, length = dimensions = VEHICLE_SIZES[kind](rng)
        along = abs(math.sin(rotation_y)) * length + abs(math.cos(rotation_y)) * width
        across = abs(math.cos(rotation_y)) * length + abs(math.sin(rotation_y)) * width
        if z - along / 2 > NEAREST - 1.5 and ground.take(x, z, across / 2 + 0.2, along / 2 + 0.3):
            items.append(vehicle(street, rng, kind, (x, z), rotation_y, dimensions))

    def any_kind() -> str:
        return str(rng.choice(["Car", "Van", "Truck"], p=[0.88, 0.08, 0.04]))

    for side in (-1, 1):  # parked in a row, each hiding a part of the next
        if rng.random() < 0.5:
            z = rng.uniform(NEAREST + 1, 20)
            for _ in range(rng.integers(1, 5)):
                towards = 1 if rng.random() < 0.25 else -1
                x = side * (street.half_width - 1.0 + rng.uniform(-0.15, 0.15))
                add(any_kind(), x, z, towards * math.pi / 2 + rng.normal(0, 0.03))
                z += rng.uniform(5.2, 9.0)
    for _ in range(rng.poisson(1.4)):
        if rng.random() < 0.15:  # crossing
            x, rotation_y = rng.uniform(-6, 6), (0 if rng.random() < 0.5 else math.pi) + rng.normal(0, 0.25)
        else:
            x = rng.uniform(-1, 1) * (street.half_width - 1.2)
            rotation_y = (math.pi / 2 if x < 0 else -math.pi / 2) + rng.normal(0, 0.08)
        add(any_kind(), x, _depth(rng, x, 7.0, _FARTHEST_VEHICLE), rotation_y)
    return items


def _place_people(street: Street, rng: np.random.Generator, ground: _Ground) -> list[Item]:
    items = []
    for _ in range(rng.poisson(2.0)):
        x = rng.choice([-1, 1]) * rng.uniform(street.half_width + 0.3, street.wall_x - 0.3)
        if rng.random() < 0.2:  # on the road
            x = rng.uniform(-street.half_width, street.half_width)
        z = _depth(rng, x, NEAREST + 0.5, _FARTHEST_PERSON)
        for _ in range(rng.choice([1, 2, 3], p=[0.65, 0.25, 0.1])):
            if ground.take(x, z, 0.22, 0.22):
                items.append(pedestrian(street, rng, x, z))
            x, z = x + rng.normal(0, 0.5), max(NEAREST, z + rng.normal(0, 0.6))
    for _ in range(rng.poisson(1.5)):
        x = rng.choice([-1, 1]) * rng.uniform(street.half_width - 2.5, street.half_width + 1.0)
        z = _depth(rng, x, NEAREST + 1, _FARTHEST_PERSON)
        if ground.take(x, z, 0.6, 0.6):
            items.append(cyclist(street, rng, x, z))
    return items


def place_clutter(street: Street, rng: np.random.Generator) -> list[Item]:
    """Things that hide objects or look like them; none of them is labelled."""
    items: list[Item] = []
    for make, mean in ((pole, 2.2), (litter_bin, 1.6), (bollard, 1.2), (bicycle, 0.6), (container, 0.5), (board, 0.7)):
        for _ in range(rng.poisson(mean)):
            x = rng.choice([-1, 1]) * rng.uniform(street.half_width + 0.4, street.wall_x - 0.2)
            items.append(make(street, rng, x, _depth(rng, x, NEAREST + 1, 40)))
    for side, houses in zip((-1, 1), street.walls):
        for _ in range(rng.poisson(1.0 if houses else 6.0)):
            x = side * (street.wall_x - rng.uniform(0.2, 1.0) + (0 if houses else rng.uniform(0, 9)))
            items.append(tree(street, rng, x, _depth(rng, x, NEAREST + 3, 60)))
    return items
