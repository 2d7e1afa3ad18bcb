"""Cars, vans and trucks."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from gkd_d2.data.toy.camera import CAMERA_HEIGHT
from gkd_d2.data.toy.shapes import Face, Item, Part, ground_shadow, painted_faces, to_camera, visible_faces
from gkd_d2.data.toy.street import Color, Street

CAR_PAINTS = (
    (225, 225, 222), (185, 188, 192), (120, 124, 130), (70, 74, 80), (38, 38, 42), (150, 32, 34), (40, 62, 120),
    (58, 92, 76), (176, 160, 130), (196, 158, 48), (98, 56, 46), (110, 140, 170),
)  # fmt: skip

# Height, width and length in metres.
VEHICLE_SIZES: dict[str, Callable[[np.random.Generator], tuple[float, float, float]]] = {
    "Car": lambda rng: (rng.uniform(1.38, 1.72), rng.uniform(1.55, 1.85), rng.uniform(3.5, 4.7)),
    "Van": lambda rng: (rng.uniform(1.9, 2.4), rng.uniform(1.75, 2.0), rng.uniform(4.6, 5.6)),
    "Truck": lambda rng: (rng.uniform(2.8, 3.5), rng.uniform(2.2, 2.5), rng.uniform(6.0, 8.5)),
}


def vehicle(
    street: Street,
    rng: np.random.Generator,
    kind: str,
    position: tuple[float, float],
    rotation_y: float,
    dimensions: tuple[float, float, float],
) -> Item:
    """A vehicle of KITTI's type ``kind``, which is a key of :data:`VEHICLE_SIZES`, at a place (x, z)."""
    height, width, length = dimensions
    half, paint = width / 2, np.array(CAR_PAINTS[rng.integers(len(CAR_PAINTS))]) * rng.uniform(0.85, 1.1)
    glass = np.array([48, 56, 66]) * rng.uniform(0.6, 1.5) + 0.12 * street.haze_color
    floor = 0.16 * min(height, 2.0)
    parts = [ground_shadow(street, position, rotation_y, length, width)]

    def block(bottom, top, heights, half_widths):
        ends = [(length * a, length * b) for a, b in (bottom, top)]
        return visible_faces(*ends, heights, half_widths, position, rotation_y)

    under = block((-0.47, 0.47), (-0.47, 0.47), (0.02, floor + 0.05), (half * 0.92, half * 0.92))
    parts += [Part(face.corners, (22, 22, 24)) for face in under]

    if kind == "Truck":
        cargo = np.array(CAR_PAINTS[rng.integers(len(CAR_PAINTS))]) * 1.05
        cargo_faces = block((-0.5, 0.18), (-0.5, 0.18), (floor, height), (half, half))
        cab_faces = block((0.2, 0.5), (0.2, 0.46), (floor, 0.78 * height), (half * 0.96, half * 0.9))
        cab_parts = painted_faces(street, cab_faces, paint)
        for face in cab_faces:
            if face.name in ("front", "left", "right"):
                cab_parts.append(Part(face.patch(0.1, 0.9, 0.5, 0.88), tuple(glass)))
        groups = [painted_faces(street, cargo_faces, cargo), cab_parts]
        front_is_nearer = math.sin(rotation_y) > 0
        parts += sum(groups if front_is_nearer else groups[::-1], [])
        parts += _lights(cab_faces if front_is_nearer else cargo_faces, low=0.05, high=0.14)
        wheel_radius = 0.48
    else:
        belt = height * (0.57 if kind == "Car" else 0.5)
        body = block((-0.5, 0.5), (-0.49, 0.47), (floor, belt), (half, half * 0.97))
        if kind == "Van":
            cabin_ends = (-0.49, 0.36), (-0.48, 0.24)
        else:  # saloon, or hatchback
            rear = rng.choice([-0.40, -0.49])
            cabin_ends = (rear, 0.24), (rear + rng.uniform(0.05, 0.12), 0.04)
        cabin = block(*cabin_ends, (belt, height), (half * 0.95, half * 0.78))
        parts += painted_faces(street, body, paint)
        for face in body:
            if face.name != "top":
                parts.append(Part(face.patch(0, 1, 0, 0.2), tuple(0.45 * np.array(street.shade(paint, face.normal)))))
        parts += _lights(body, low=0.5, high=0.78)
        parts += painted_faces(street, cabin, paint)
        parts += _windows(cabin, tuple(glass), closed_rear=kind == "Van" and rng.random() < 0.6)
        wheel_radius = 0.31
    for sign in (-1, 1):
        parts += _wheels(sign * half * 1.001, length, wheel_radius, position, rotation_y)
    x, z = position
    return Item(z, parts, kind, dimensions, (x, CAMERA_HEIGHT, z), rotation_y)


def _lights(faces: list[Face], low: float, high: float) -> list[Part]:
    colors = {"front": (235, 232, 210), "rear": (170, 24, 22)}
    parts = []
    for face in faces:
        if face.name in colors:
            parts += [Part(face.patch(u, u + 0.17, low, high), colors[face.name]) for u in (0.04, 0.79)]
            parts.append(Part(face.patch(0.36, 0.64, low - 0.05, low + 0.12), (205, 205, 200)))
    return parts


def _windows(cabin: list[Face], glass: Color, closed_rear: bool) -> list[Part]:
    parts = []
    for face in cabin:
        if face.name in ("front", "rear"):
            parts.append(Part(face.patch(0.08, 0.92, 0.12, 0.9), glass))
        elif face.name in ("left", "right"):
            # u runs from the front on the right face, from the rear on the left one
            panes = [(0.06, 0.46), (0.52, 0.94)] if not closed_rear else [(0.06, 0.34)]
            if face.name == "left":
                panes = [(1 - b, 1 - a) for a, b in panes]
            parts += [Part(face.patch(a, b, 0.12, 0.88), glass) for a, b in panes]
    return parts


def _wheels(
    sideways: float, length: float, radius: float, position: tuple[float, float], rotation_y: float
) -> list[Part]:
    """Both wheels of one side, nothing where that side faces away."""
    outward = to_camera([(0, 0, math.copysign(1, sideways))], (0, 0), rotation_y)[0]
    center = to_camera([(0, radius, sideways)], position, rotation_y)[0]
    if outward[0] * center[0] + outward[2] * center[2] >= 0:
        return []
    parts = []
    angles = np.linspace(0, 2 * math.pi, 14, endpoint=False)
    for share in (-0.31, 0.31):
        for r, color in ((radius, (20, 20, 22)), (0.55 * radius, (128, 130, 134))):
            forward, up = share * length + r * np.cos(angles), radius + r * np.sin(angles)
            corners = to_camera(np.stack([forward, up, np.full(14, sideways)], axis=1), position, rotation_y)
            parts.append(Part(corners, color))
    return parts
