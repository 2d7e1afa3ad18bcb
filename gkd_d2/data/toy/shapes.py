"""What things are drawn of: coloured polygons, blocks whose faces are seen, and flat figures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from gkd_d2.data.toy.camera import CAMERA_HEIGHT
from gkd_d2.data.toy.street import Color, Street


class Part(NamedTuple):
    """A polygon: corners in metres, camera coordinates, (n, 3); RGB in 0..255; whether it belongs to the object."""

    corners: np.ndarray
    color: Color
    solid: bool = True


@dataclass
class Item:
    """Something painted at depth z. One without a type is clutter, which hides and is no object."""

    z: float
    parts: list[Part]
    type: str | None = None
    dimensions: tuple[float, float, float] = (-1.0, -1.0, -1.0)
    location: tuple[float, float, float] = (-1000.0, -1000.0, -1000.0)
    rotation_y: float = -10.0


def to_camera(local: np.ndarray, position: tuple[float, float], rotation_y: float) -> np.ndarray:
    """Points (forward, up, sideways) about a place (x, z) on the ground to camera coordinates, (n, 3)."""
    forward, up, sideways = np.asarray(local, dtype=float).T
    cos, sin = math.cos(rotation_y), math.sin(rotation_y)
    x = position[0] + forward * cos + sideways * sin
    z = position[1] - forward * sin + sideways * cos
    return np.stack([x, CAMERA_HEIGHT - up, z], axis=1)


class Face(NamedTuple):
    """One side of a block; the normal points outward and has length 1."""

    name: str
    corners: np.ndarray  # (4, 3): bottom left, bottom right, top right, top left
    normal: np.ndarray

    def patch(self, u0: float, u1: float, v0: float, v1: float) -> np.ndarray:
        """The part of the face between u0 and u1 of its width, v0 and v1 of its height."""
        bottom_left, bottom_right, top_right, top_left = self.corners
        uv = np.array([(u0, v0), (u1, v0), (u1, v1), (u0, v1)])
        u, v = uv[:, :1], uv[:, 1:]
        return (1 - v) * ((1 - u) * bottom_left + u * bottom_right) + v * ((1 - u) * top_left + u * top_right)


def visible_faces(
    bottom: tuple[float, float],
    top: tuple[float, float],
    heights: tuple[float, float],
    half_widths: tuple[float, float],
    position: tuple[float, float],
    rotation_y: float,
) -> list[Face]:
    """Faces, seen by the camera, of a block whose top and bottom are rectangles.

    Args:
        bottom: rear and front end of the bottom, metres forward of the place.
        top: the same of the top.
        heights: of bottom and top.
        half_widths: of bottom and top.
        position: x, z of the place.
        rotation_y: radians.
    """
    (b0, b1), (t0, t1), (h0, h1), (w0, w1) = bottom, top, heights, half_widths
    local = {
        "front": [(b1, h0, -w0), (b1, h0, w0), (t1, h1, w1), (t1, h1, -w1)],
        "rear": [(b0, h0, w0), (b0, h0, -w0), (t0, h1, -w1), (t0, h1, w1)],
        "right": [(b1, h0, w0), (b0, h0, w0), (t0, h1, w1), (t1, h1, w1)],
        "left": [(b0, h0, -w0), (b1, h0, -w0), (t1, h1, -w1), (t0, h1, -w1)],
        "top": [(t0, h1, -w1), (t1, h1, -w1), (t1, h1, w1), (t0, h1, w1)],
    }
    faces = {name: to_camera(corners, position, rotation_y) for name, corners in local.items()}
    middle = np.concatenate(list(faces.values())).mean(axis=0)
    visible = []
    for name, corners in faces.items():
        normal = np.cross(corners[1] - corners[0], corners[3] - corners[0])
        normal = normal / np.linalg.norm(normal)
        center = corners.mean(axis=0)
        if normal @ (center - middle) < 0:
            normal = -normal
        if normal @ center < 0:
            visible.append(Face(name, corners, normal))
    return visible


def ground_shadow(
    street: Street, position: tuple[float, float], rotation_y: float, length: float, width: float
) -> Part:
    """The shadow of something of that length and width, in metres, that is turned by rotation_y."""
    half_length, half_width = length / 2 + 0.15, width / 2 + 0.2
    shift = -0.5 * street.sun[[0, 2]]
    place = (position[0] + shift[0], position[1] + shift[1])
    corners = to_camera(
        [
            (-half_length, 0, -half_width),
            (half_length, 0, -half_width),
            (half_length, 0, half_width),
            (-half_length, 0, half_width),
        ],
        place,
        rotation_y,
    )
    return Part(corners, tuple(0.42 * street.ground_color), solid=False)


def painted_faces(street: Street, faces: list[Face], paint: np.ndarray) -> list[Part]:
    """The faces in a paint, each shaded by the sun."""
    return [Part(face.corners, street.shade(paint, face.normal)) for face in faces]


class Billboard:
    """A flat drawing that faces the camera; local coordinates are metres to the right of x and above the ground."""

    def __init__(self, x: float, z: float, stretch: tuple[float, float] = (1.0, 1.0)):
        self.x, self.z = x, z
        self._stretch = np.array(stretch)
        self.parts: list[Part] = []

    def polygon(self, points, color: Color, solid: bool = True) -> None:
        """Add a polygon; one that is not solid does not belong to the object."""
        local = np.asarray(points, dtype=float) * self._stretch
        corners = np.stack([self.x + local[:, 0], CAMERA_HEIGHT - local[:, 1], np.full(len(local), self.z)], axis=1)
        self.parts.append(Part(corners, tuple(color), solid))

    def rectangle(self, left: float, right: float, low: float, high: float, color: Color) -> None:
        """Add an upright rectangle."""
        self.polygon([(left, low), (right, low), (right, high), (left, high)], color)

    def ellipse(self, center, radii, color: Color, solid: bool = True) -> None:
        """Add an ellipse."""
        angles = np.linspace(0, 2 * math.pi, 14, endpoint=False)
        points = np.stack([center[0] + radii[0] * np.cos(angles), center[1] + radii[1] * np.sin(angles)], axis=1)
        self.polygon(points, color, solid)

    def limb(self, points, width: float, color: Color) -> None:
        """Add a bent strip through the points."""
        for start, end in zip(np.asarray(points[:-1], float), np.asarray(points[1:], float)):
            along = end - start
            across = np.array([-along[1], along[0]]) * (width / 2 / max(np.linalg.norm(along), 1e-6))
            self.polygon([start + across, end + across, end - across, start - across], color)

    def ring(self, center, radius: float, width: float, color: Color) -> None:
        """Add a ring, such as a tyre."""
        angles = np.linspace(0, 2 * math.pi, 15)
        self.limb(
            np.stack([center[0] + radius * np.cos(angles), center[1] + radius * np.sin(angles)], axis=1), width, color
        )

    def shadow(self, street: Street, half_width: float) -> None:
        """Add the shadow on the ground."""
        x = self.x - 0.3 * street.sun[0]
        angles = np.linspace(0, 2 * math.pi, 12, endpoint=False)
        corners = np.stack(
            [x + half_width * np.cos(angles), np.full(12, CAMERA_HEIGHT), self.z + 0.3 * np.sin(angles)], axis=1
        )
        self.parts.append(Part(corners, tuple(0.5 * street.ground_color), solid=False))
