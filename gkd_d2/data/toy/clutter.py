"""Things that hide objects or look like them, none of which is labelled."""

from __future__ import annotations

import math

import numpy as np

from gkd_d2.data.toy.camera import NEAREST
from gkd_d2.data.toy.people import cloth, draw_bicycle
from gkd_d2.data.toy.shapes import Billboard, Item, Part, ground_shadow, painted_faces, visible_faces
from gkd_d2.data.toy.street import Street
from gkd_d2.data.toy.vehicles import CAR_PAINTS


def bicycle(street: Street, rng: np.random.Generator, x: float, z: float) -> Item:
    """A bicycle without a rider."""
    figure = Billboard(x, z, (rng.uniform(0.5, 1.0), 1.0))
    draw_bicycle(figure, rng)
    return Item(z, figure.parts)


def pole(street: Street, rng: np.random.Generator, x: float, z: float) -> Item:
    """A post, traffic sign, lamp or signal."""
    figure = Billboard(x, z)
    gray, height = np.full(3, rng.uniform(60, 130)), rng.uniform(2.2, 6.0)
    radius = rng.uniform(0.04, 0.11)
    figure.rectangle(-radius, radius, 0, height, gray)
    figure.rectangle(0.2 * radius, radius, 0, height, gray * 0.7)
    if height < 3.2:  # a traffic sign
        color = ((190, 40, 40), (40, 70, 160), (225, 225, 220), (220, 180, 50))[rng.integers(4)]
        if rng.random() < 0.5:
            figure.ellipse((0, height), (0.32, 0.32), color)
            figure.ellipse((0, height), (0.22, 0.22), (225, 222, 215))
        else:
            figure.rectangle(-0.3, 0.3, height - 0.35, height + 0.35, color)
    elif rng.random() < 0.5:  # a lamp or signal
        figure.rectangle(-0.14, 0.14, height - 1.0, height, (35, 38, 36))
    return Item(z, figure.parts)


def litter_bin(street: Street, rng: np.random.Generator, x: float, z: float) -> Item:
    """A litter bin or letter box: about as broad as a person."""
    figure = Billboard(x, z)
    color, height, half = cloth(rng), rng.uniform(0.9, 1.5), rng.uniform(0.2, 0.32)
    figure.rectangle(-half, half, 0.02, height, color)
    figure.rectangle(0.2 * half, half, 0.02, height, color * 0.75)
    figure.ellipse((0, height), (half, 0.13), color * 1.2)
    figure.rectangle(-0.6 * half, 0.6 * half, 0.7 * height, 0.8 * height, color * 0.4)
    return Item(z, figure.parts)


def bollard(street: Street, rng: np.random.Generator, x: float, z: float) -> Item:
    """A post with a round top, in two colours: a poor likeness of a person."""
    figure = Billboard(x, z)
    lower, upper, height, half = cloth(rng), cloth(rng), rng.uniform(1.0, 1.6), rng.uniform(0.09, 0.2)
    figure.rectangle(-0.8 * half, 0.8 * half, 0, 0.5 * height, lower)
    figure.rectangle(-half, half, 0.5 * height, 0.85 * height, upper)
    figure.ellipse((0, 0.92 * height), (0.11, 0.12), cloth(rng) * 1.2)
    return Item(z, figure.parts)


def board(street: Street, rng: np.random.Generator, x: float, z: float) -> Item:
    """An advertising board with a dark shape on it."""
    figure = Billboard(x, z)
    half, height = rng.uniform(0.45, 0.8), rng.uniform(1.7, 2.3)
    figure.rectangle(-half, half, 0.1, height, (70, 72, 74))
    figure.rectangle(-0.88 * half, 0.88 * half, 0.25, height - 0.1, rng.uniform(90, 235, 3))
    figure.ellipse((0, 0.68 * height), (0.3 * half, 0.16 * height), cloth(rng))
    figure.rectangle(-0.4 * half, 0.4 * half, 0.3, 0.5 * height, cloth(rng))
    return Item(z, figure.parts)


def container(street: Street, rng: np.random.Generator, x: float, z: float) -> Item:
    """A skip or stall: about as large as a car, without wheels or windows."""
    height, half, length = rng.uniform(1.1, 1.9), rng.uniform(0.7, 0.9), rng.uniform(1.8, 3.4)
    rotation_y = float(math.pi / 2 + rng.normal(0, 0.2))
    z = max(z, NEAREST + length)
    color = np.array(CAR_PAINTS[rng.integers(len(CAR_PAINTS))])
    ends = (-length / 2, length / 2)
    faces = visible_faces(ends, ends, (0.0, height), (half, half), (x, z), rotation_y)
    parts = [ground_shadow(street, (x, z), rotation_y, length, 2 * half), *painted_faces(street, faces, color)]
    parts += [Part(f.patch(0, 1, 0.82, 1), tuple(0.6 * color)) for f in faces if f.name != "top"]
    return Item(z, parts)


def tree(street: Street, rng: np.random.Generator, x: float, z: float) -> Item:
    """A tree."""
    figure = Billboard(x, z)
    trunk, height = np.array([86, 68, 52]) * rng.uniform(0.6, 1.2), rng.uniform(3.0, 7.0)
    radius, green = rng.uniform(0.1, 0.26), np.array([70, 98, 48]) * rng.uniform(0.6, 1.3)
    figure.rectangle(-radius, radius, 0, height, trunk)
    figure.rectangle(0, radius, 0, height, trunk * 0.7)
    bottom = rng.uniform(0.35, 0.65) * height
    for _ in range(rng.integers(6, 11)):
        center = (rng.normal(0, 0.9), rng.uniform(bottom + 0.6, height + 1.5))
        figure.ellipse(center, rng.uniform(0.5, 1.3, 2), green * rng.uniform(0.7, 1.25))
    return Item(z, figure.parts)
