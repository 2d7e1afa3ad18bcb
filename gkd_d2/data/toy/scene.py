"""Toy data in KITTI's own format: seeded, drawn street scenes, so that everything runs without a download.

A scene is laid out in metres in KITTI's camera coordinates (x right, y down, z forward, the ground at y = 1.65) and
painted from far to near. Boxes, truncation and occlusion follow from that geometry and from what stays visible.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

logger = logging.getLogger(__name__)

# Validation ids start here, so that they and their scenes do not depend on the number of training images.
FIRST_VAL_ID = 500_000
MIN_SIZE = (160, 64)

_FORMAT_VERSION = 1  # raise it when a drawing changes: folders made before are then no longer taken as equal
_PARAMETERS_FILE = "toy_kitti.json"
_SUPERSAMPLING = 2
_CAMERA_HEIGHT = 1.65
_NEAREST = 4.5
# Labelled things stand nearer than KITTI's, for the pictures are a quarter as large.
_FARTHEST_VEHICLE, _FARTHEST_PERSON = 35.0, 20.0
_MIN_LABEL_HEIGHT, _MIN_LABEL_WIDTH = 10.0, 4.0  # pixels; what shows less than that is marked DontCare
_PARTLY_HIDDEN, _LARGELY_HIDDEN, _BEYOND_LABEL = 0.1, 0.5, 0.85  # hidden share: occlusion 1, 2, DontCare

Color = tuple[float, float, float]


@dataclass(frozen=True)
class ToyObject:
    """One line of a label file, in the units of KITTI's format.

    Attributes:
        type: KITTI's name of the type.
        truncation: share of the whole object's box that lies outside the image; -1 for DontCare.
        occlusion: 0, 1, 2 by the hidden share of the object's pixels in the image; -1 for DontCare.
        bbox: left, top, right, bottom in pixels, rounded to 2 digits, inside [0, width - 1] x [0, height - 1].
        alpha: observation angle in radians.
        dimensions: height, width, length in metres.
        location: x, y, z of the bottom's centre in camera coordinates, metres.
        rotation_y: rotation about the camera's y axis in radians.
    """

    type: str
    truncation: float
    occlusion: int
    bbox: tuple[float, float, float, float]
    alpha: float = -10.0
    dimensions: tuple[float, float, float] = (-1.0, -1.0, -1.0)
    location: tuple[float, float, float] = (-1000.0, -1000.0, -1000.0)
    rotation_y: float = -10.0

    def label_line(self) -> str:
        """The object as a line of KITTI's label format, without the line's end."""
        if self.type == "DontCare":
            box = " ".join(f"{value:.2f}" for value in self.bbox)
            return f"DontCare -1 -1 -10 {box} -1 -1 -1 -1000 -1000 -1000 -10"
        numbers = (self.alpha, *self.bbox, *self.dimensions, *self.location, self.rotation_y)
        return f"{self.type} {self.truncation:.2f} {self.occlusion} " + " ".join(f"{value:.2f}" for value in numbers)


def make_toy_kitti(
    root: str | os.PathLike,
    num_train: int = 300,
    num_val: int = 100,
    seed: int = 0,
    image_size: tuple[int, int] = (320, 128),
    force: bool = False,
) -> None:
    """Write a toy data set in KITTI's form: images, labels, and the lists of both splits.

    Image i of a split is the same whatever the number of images. The folder appears whole or not at all. A folder
    made before with equal arguments is left as it is.

    Args:
        root: the folder to write.
        num_train: number of training images; their ids count from 000000.
        num_val: number of validation images; their ids count from 500000.
        seed: any integer >= 0; other seeds give other scenes.
        image_size: width and height in pixels.
        force: replace a toy data set made with other arguments. Nothing else is ever replaced.

    Raises:
        ValueError: an argument is out of range.
        FileExistsError: the folder holds something else.
    """
    for name, value in (("num_train", num_train), ("num_val", num_val)):
        if not 1 <= value <= FIRST_VAL_ID:
            raise ValueError(f"{name} is {value}, not in 1..{FIRST_VAL_ID}")
    root = Path(root)
    parameters = {
        "version": _FORMAT_VERSION,
        "num_train": num_train,
        "num_val": num_val,
        "seed": seed,
        "image_size": list(image_size),
    }
    _check_scene_arguments(seed, image_size)
    if _is_in_place(root, parameters, force):
        logger.info("%s holds this toy data set already", root)
        return
    with _replacing(root) as folder:
        counts = _write_dataset(folder, num_train, num_val, seed, image_size)
        (folder / _PARAMETERS_FILE).write_text(json.dumps(parameters) + "\n")
    logger.info(
        "wrote %d training and %d validation images to %s; objects: %s",
        num_train,
        num_val,
        root,
        ", ".join(f"{kind} {count}" for kind, count in counts.most_common()),
    )


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
    _check_scene_arguments(seed, image_size)
    rng = np.random.default_rng([seed, index])
    street = _Street.draw(rng)
    painter = _Painter(_Camera(*image_size), street, rng)
    _paint_background(painter)
    items = _place_objects(street, rng) + _place_clutter(street, rng)
    # Blurring what is painted so far leaves the far part of the scene blurred more than the near part.
    blurs = [(35.0, 0.9), (16.0, 0.6)]
    for item in sorted(items, key=lambda item: -item.z):
        while blurs and item.z < blurs[0][0]:
            painter.blur(blurs.pop(0)[1])
        painter.paint(item)
    return painter.develop(), painter.labels()


def _check_scene_arguments(seed: int, image_size: tuple[int, int]) -> None:
    if seed < 0:
        raise ValueError(f"seed is {seed}, not an integer >= 0")
    width, height = image_size
    if width < MIN_SIZE[0] or height < MIN_SIZE[1]:
        raise ValueError(f"image_size is {width} x {height}; at least {MIN_SIZE[0]} x {MIN_SIZE[1]} pixels are needed")


# ---------------------------------------------------------------------------------------------------- files


def _is_in_place(root: Path, parameters: dict, force: bool) -> bool:
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    parameters_path = root / _PARAMETERS_FILE
    if not parameters_path.is_file():
        raise FileExistsError(f"{root} exists and is no toy data set; it is never replaced: choose another folder")
    present = json.loads(parameters_path.read_text())
    if present == parameters:
        return True
    if not force:
        raise FileExistsError(
            f"{root} holds a toy data set made with {present}, not with {parameters}: choose another folder, or "
            "replace it with force (--force)"
        )
    return False


@contextlib.contextmanager
def _replacing(root: Path) -> Iterator[Path]:
    """A new folder beside root that takes root's place when the block ends well and is removed when it does not."""
    root.parent.mkdir(parents=True, exist_ok=True)
    partial = root.parent / f".{root.name}.partial-{os.getpid()}"
    old = root.parent / f".{root.name}.old-{os.getpid()}"
    partial.mkdir()
    try:
        yield partial
        if root.exists():
            root.rename(old)
        partial.rename(root)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_dataset(folder: Path, num_train: int, num_val: int, seed: int, image_size: tuple[int, int]) -> Counter:
    images, labels, lists = (folder / name for name in ("training/image_2", "training/label_2", "ImageSets"))
    for path in (images, labels, lists):
        path.mkdir(parents=True)
    counts: Counter = Counter()
    for split, indices in (("train", range(num_train)), ("val", range(FIRST_VAL_ID, FIRST_VAL_ID + num_val))):
        for index in indices:
            image, objects = make_scene(seed, index, image_size)
            image.save(images / f"{index:06d}.png")
            (labels / f"{index:06d}.txt").write_text("".join(obj.label_line() + "\n" for obj in objects))
            counts.update(obj.type for obj in objects)
        (lists / f"{split}.txt").write_text("".join(f"{index:06d}\n" for index in indices))
    return counts


# ---------------------------------------------------------------------------------------------------- painting


class _Camera:
    """A pinhole camera like KITTI's: focal length 0.58 of the width, horizon at 46 % of the height."""

    def __init__(self, width: int, height: int):
        self.width, self.height = width, height
        self.focal = 0.58 * width
        self.center = (width / 2, 0.46 * height)

    def project(self, points: np.ndarray) -> np.ndarray:
        """Points in metres, (n, 3), to pixels, (n, 2). Every z must be positive."""
        points = np.asarray(points, dtype=float)
        return self.focal * points[:, :2] / points[:, 2:] + self.center


class _Part(NamedTuple):
    """A polygon: corners in metres, camera coordinates, (n, 3); RGB in 0..255; whether it belongs to the object."""

    corners: np.ndarray
    color: Color
    solid: bool = True


@dataclass
class _Item:
    """Something painted at depth z. One without a type is clutter, which hides and is no object."""

    z: float
    parts: list[_Part]
    type: str | None = None
    dimensions: tuple[float, float, float] = (-1.0, -1.0, -1.0)
    location: tuple[float, float, float] = (-1000.0, -1000.0, -1000.0)
    rotation_y: float = -10.0


@dataclass
class _Painted:
    item: _Item
    whole_box: np.ndarray  # left, top, right, bottom in pixels, beyond the image too
    num_pixels: int  # of the object's mask inside the image, before anything hides it


@dataclass
class _Street:
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
    def draw(cls, rng: np.random.Generator) -> _Street:
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
        return self.half_width + self.sidewalk

    def shade(self, color: Color, normal: np.ndarray) -> Color:
        """A surface's colour by its outward unit normal (Lambert's law with an ambient part)."""
        light = self.ambient + (1 - self.ambient) * max(0.0, float(normal @ self.sun)) * 1.4
        return tuple(np.asarray(color, dtype=float) * min(light, 1.25))

    def in_air(self, color: Color, z: float) -> Color:
        share = 1 - math.exp(-max(z, 0.0) / self.haze_length)
        return tuple((1 - share) * np.asarray(color, dtype=float) + share * self.haze_color)


class _Painter:
    """A supersampled canvas and, beside it, the number of the object that shows at each of its pixels."""

    def __init__(self, camera: _Camera, street: _Street, rng: np.random.Generator):
        self.camera, self.street, self.rng = camera, street, rng
        self._size = (camera.width * _SUPERSAMPLING, camera.height * _SUPERSAMPLING)
        self._canvas = Image.new("RGB", self._size)
        self._draw = ImageDraw.Draw(self._canvas)
        self._owners = Image.new("I", self._size, 0)
        self._painted: list[_Painted] = []

    def polygon(self, pixels: np.ndarray, color: Color) -> None:
        """Fill a polygon given in pixels, (n, 2), of the image."""
        self._draw.polygon(_corner_list(pixels), fill=_rgb(color))

    def backdrop(self, pixels: np.ndarray) -> None:
        """Put a picture of the image's width, (h, w, 3) uint8, at the top."""
        picture = Image.fromarray(pixels)
        self._canvas.paste(picture.resize((self._size[0], picture.height * _SUPERSAMPLING), Image.Resampling.BILINEAR))

    def surface(self, corners: np.ndarray, color: Color) -> None:
        """Fill a polygon given in metres, (n, 3), in the colour that the air leaves of it."""
        corners = np.asarray(corners, dtype=float)
        self.polygon(self.camera.project(corners), self.street.in_air(color, float(corners[:, 2].mean())))

    def blur(self, radius: float) -> None:
        """Blur all that is painted so far; the radius is in pixels of the image."""
        self._canvas = self._canvas.filter(ImageFilter.BoxBlur(radius * _SUPERSAMPLING))
        self._draw = ImageDraw.Draw(self._canvas)

    def paint(self, item: _Item) -> None:
        """Paint an item over all that is there."""
        outlines = [self.camera.project(part.corners) for part in item.parts]
        for part, outline in zip(item.parts, outlines):
            self.polygon(outline, self.street.in_air(part.color, item.z))
        solid = [outline for part, outline in zip(item.parts, outlines) if part.solid]
        owners = ImageDraw.Draw(self._owners)
        if item.type is None:
            for outline in solid:
                owners.polygon(_corner_list(outline), fill=0)
            return
        mask = Image.new("1", self._size)
        for outline in solid:
            ImageDraw.Draw(mask).polygon(_corner_list(outline), fill=1)
            owners.polygon(_corner_list(outline), fill=len(self._painted) + 1)
        points = np.concatenate(solid)
        whole_box = np.concatenate([points.min(axis=0), points.max(axis=0)])
        self._painted.append(_Painted(item, whole_box, int(np.asarray(mask).sum())))

    def develop(self) -> Image.Image:
        """The image as a camera would give it: uneven light, exposure, a tint, and noise."""
        rng = self.rng
        image = self._canvas.reduce(_SUPERSAMPLING)
        pixels = np.asarray(image, dtype=np.float32)
        pixels = pixels * _smooth_field(rng, image.size, cells=6, amplitude=0.08)[..., None]
        pixels = pixels * _smooth_field(rng, image.size, cells=40, amplitude=0.03)[..., None]
        exposure = rng.uniform(0.4, 0.65) if rng.random() < 0.12 else rng.uniform(0.85, 1.2)
        tint = np.array([rng.uniform(0.94, 1.06), 1.0, rng.uniform(0.94, 1.06)], dtype=np.float32)
        pixels = 255 * np.clip(pixels / 255, 0, None) ** rng.uniform(0.8, 1.15) * exposure * tint
        pixels = pixels + rng.normal(0, rng.uniform(2, 7), pixels.shape).astype(np.float32)
        return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))

    def labels(self) -> list[ToyObject]:
        """The objects of which something shows, from far to near, DontCare last."""
        owners = np.asarray(self._owners)
        objects, dont_care = [], []
        for number, painted in enumerate(self._painted, start=1):
            rows, columns = np.nonzero(owners == number)
            if not rows.size:
                continue
            visible = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / _SUPERSAMPLING
            label = self._label(painted, hidden=1 - rows.size / painted.num_pixels)
            if label is not None:
                objects.append(label)
                continue
            box = self._clip(visible)
            if box[2] > box[0] and box[3] > box[1]:
                dont_care.append(ToyObject("DontCare", -1, -1, box))
        return objects + dont_care

    def _label(self, painted: _Painted, hidden: float) -> ToyObject | None:
        """The object's label, None where too little of it shows."""
        box = self._clip(painted.whole_box)
        width, height = box[2] - box[0], box[3] - box[1]
        inside = np.clip(painted.whole_box, 0, [self.camera.width, self.camera.height] * 2)
        truncation = 1 - float(
            np.prod(inside[2:] - inside[:2]) / np.prod(painted.whole_box[2:] - painted.whole_box[:2])
        )
        too_small = height < _MIN_LABEL_HEIGHT or width < _MIN_LABEL_WIDTH
        if too_small or hidden > _BEYOND_LABEL or truncation > _BEYOND_LABEL:
            return None
        item = painted.item
        alpha = item.rotation_y - math.atan2(item.location[0], item.location[2])
        return ToyObject(
            item.type,
            round(truncation, 2),
            int(hidden > _PARTLY_HIDDEN) + int(hidden > _LARGELY_HIDDEN),
            box,
            _wrap(alpha),
            item.dimensions,
            item.location,
            _wrap(item.rotation_y),
        )

    def _clip(self, box: np.ndarray) -> tuple[float, float, float, float]:
        limit = np.array([self.camera.width - 1, self.camera.height - 1] * 2)
        return tuple(round(float(value), 2) for value in np.clip(box, 0, limit))


def _corner_list(pixels: np.ndarray) -> list[tuple[float, float]]:
    return [(x, y) for x, y in (np.asarray(pixels) * _SUPERSAMPLING).tolist()]


def _rgb(color: Color) -> tuple[int, int, int]:
    return tuple(int(min(max(channel, 0), 255)) for channel in color)


def _wrap(angle: float) -> float:
    return (angle + math.pi) % (2 * math.pi) - math.pi


def _smooth_field(rng: np.random.Generator, size: tuple[int, int], cells: int, amplitude: float) -> np.ndarray:
    """A smooth random field about 1 of the image's size, with about that many cells along its width."""
    width, height = size
    grid = rng.normal(1, amplitude, (max(2, round(cells * height / width)), cells)).astype(np.float32)
    return np.asarray(Image.fromarray(grid).resize(size, Image.Resampling.BICUBIC))


# ---------------------------------------------------------------------------------------------------- background


def _paint_background(painter: _Painter) -> None:
    _paint_sky(painter)
    _paint_skyline(painter)
    _paint_ground(painter)
    for side, houses in zip((-1, 1), painter.street.walls):
        if houses:
            _paint_houses(painter, side)


def _paint_sky(painter: _Painter) -> None:
    rng, street, camera = painter.rng, painter.street, painter.camera
    overcast = rng.random()
    zenith = (1 - overcast) * np.array([88, 138, 205]) + overcast * np.array([172, 180, 190]) + rng.uniform(-10, 10)
    size = (camera.width, round(camera.center[1]) + 2)
    share = (np.linspace(0, 1, size[1]) ** 0.7)[:, None, None]
    sky = (1 - share) * zenith + share * street.haze_color
    clouds = _smooth_field(rng, size, cells=9, amplitude=0.08)
    painter.backdrop(np.clip(sky * clouds[..., None], 0, 255).astype(np.uint8))


def _paint_skyline(painter: _Painter) -> None:
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


def _paint_ground(painter: _Painter) -> None:
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
        corners = np.stack([x, np.full(9, _CAMERA_HEIGHT), z], axis=1)
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
    y = _CAMERA_HEIGHT
    return np.array([(x0, y, z0), (x1, y, z0), (x1, y, z1), (x0, y, z1)])


def _paint_houses(painter: _Painter, side: int) -> None:
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


def _on_wall(side: int, street: _Street, z0: float, z1: float, low: float, high: float) -> np.ndarray:
    x, bottom, top = side * street.wall_x, _CAMERA_HEIGHT - low, _CAMERA_HEIGHT - high
    return np.array([(x, bottom, z0), (x, bottom, z1), (x, top, z1), (x, top, z0)])


# ---------------------------------------------------------------------------------------------------- layout


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


def _place_objects(street: _Street, rng: np.random.Generator) -> list[_Item]:
    ground = _Ground()
    return _place_vehicles(street, rng, ground) + _place_people(street, rng, ground)


def _place_vehicles(street: _Street, rng: np.random.Generator, ground: _Ground) -> list[_Item]:
    items = []

    def add(kind: str, x: float, z: float, rotation_y: float) -> None:
        height, width, length = dimensions = _VEHICLE_SIZES[kind](rng)
        along = abs(math.sin(rotation_y)) * length + abs(math.cos(rotation_y)) * width
        across = abs(math.cos(rotation_y)) * length + abs(math.sin(rotation_y)) * width
        if z - along / 2 > _NEAREST - 1.5 and ground.take(x, z, across / 2 + 0.2, along / 2 + 0.3):
            items.append(_vehicle(street, rng, kind, (x, z), rotation_y, dimensions))

    def any_kind() -> str:
        return str(rng.choice(["Car", "Van", "Truck"], p=[0.88, 0.08, 0.04]))

    for side in (-1, 1):  # parked in a row, each hiding a part of the next
        if rng.random() < 0.5:
            z = rng.uniform(_NEAREST + 1, 20)
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


def _place_people(street: _Street, rng: np.random.Generator, ground: _Ground) -> list[_Item]:
    items = []
    for _ in range(rng.poisson(2.0)):
        x = rng.choice([-1, 1]) * rng.uniform(street.half_width + 0.3, street.wall_x - 0.3)
        if rng.random() < 0.2:  # on the road
            x = rng.uniform(-street.half_width, street.half_width)
        z = _depth(rng, x, _NEAREST + 0.5, _FARTHEST_PERSON)
        for _ in range(rng.choice([1, 2, 3], p=[0.65, 0.25, 0.1])):
            if ground.take(x, z, 0.22, 0.22):
                items.append(_pedestrian(street, rng, x, z))
            x, z = x + rng.normal(0, 0.5), max(_NEAREST, z + rng.normal(0, 0.6))
    for _ in range(rng.poisson(1.5)):
        x = rng.choice([-1, 1]) * rng.uniform(street.half_width - 2.5, street.half_width + 1.0)
        z = _depth(rng, x, _NEAREST + 1, _FARTHEST_PERSON)
        if ground.take(x, z, 0.6, 0.6):
            items.append(_cyclist(street, rng, x, z))
    return items


def _place_clutter(street: _Street, rng: np.random.Generator) -> list[_Item]:
    """Things that hide objects or look like them; none of them is labelled."""
    items: list[_Item] = []
    for make, mean in ((_pole, 2.2), (_bin, 1.6), (_bollard, 1.2), (_bicycle, 0.6), (_container, 0.5), (_board, 0.7)):
        for _ in range(rng.poisson(mean)):
            x = rng.choice([-1, 1]) * rng.uniform(street.half_width + 0.4, street.wall_x - 0.2)
            items.append(make(street, rng, x, _depth(rng, x, _NEAREST + 1, 40)))
    for side, houses in zip((-1, 1), street.walls):
        for _ in range(rng.poisson(1.0 if houses else 6.0)):
            x = side * (street.wall_x - rng.uniform(0.2, 1.0) + (0 if houses else rng.uniform(0, 9)))
            items.append(_tree(street, rng, x, _depth(rng, x, _NEAREST + 3, 60)))
    return items


# ---------------------------------------------------------------------------------------------------- vehicles


def _place(local: np.ndarray, position: tuple[float, float], rotation_y: float) -> np.ndarray:
    """Points (forward, up, sideways) about a place (x, z) on the ground to camera coordinates, (n, 3)."""
    forward, up, sideways = np.asarray(local, dtype=float).T
    cos, sin = math.cos(rotation_y), math.sin(rotation_y)
    x = position[0] + forward * cos + sideways * sin
    z = position[1] - forward * sin + sideways * cos
    return np.stack([x, _CAMERA_HEIGHT - up, z], axis=1)


class _Face(NamedTuple):
    name: str
    corners: np.ndarray  # (4, 3): bottom left, bottom right, top right, top left
    normal: np.ndarray

    def patch(self, u0: float, u1: float, v0: float, v1: float) -> np.ndarray:
        """The part of the face between u0 and u1 of its width, v0 and v1 of its height."""
        bottom_left, bottom_right, top_right, top_left = self.corners
        uv = np.array([(u0, v0), (u1, v0), (u1, v1), (u0, v1)])
        u, v = uv[:, :1], uv[:, 1:]
        return (1 - v) * ((1 - u) * bottom_left + u * bottom_right) + v * ((1 - u) * top_left + u * top_right)


def _visible_faces(
    bottom: tuple[float, float],
    top: tuple[float, float],
    heights: tuple[float, float],
    half_widths: tuple[float, float],
    position: tuple[float, float],
    rotation_y: float,
) -> list[_Face]:
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
    faces = {name: _place(corners, position, rotation_y) for name, corners in local.items()}
    middle = np.concatenate(list(faces.values())).mean(axis=0)
    visible = []
    for name, corners in faces.items():
        normal = np.cross(corners[1] - corners[0], corners[3] - corners[0])
        normal = normal / np.linalg.norm(normal)
        center = corners.mean(axis=0)
        if normal @ (center - middle) < 0:
            normal = -normal
        if normal @ center < 0:
            visible.append(_Face(name, corners, normal))
    return visible


_CAR_PAINTS = (
    (225, 225, 222), (185, 188, 192), (120, 124, 130), (70, 74, 80), (38, 38, 42), (150, 32, 34), (40, 62, 120),
    (58, 92, 76), (176, 160, 130), (196, 158, 48), (98, 56, 46), (110, 140, 170),
)  # fmt: skip

_VEHICLE_SIZES: dict[str, Callable[[np.random.Generator], tuple[float, float, float]]] = {
    "Car": lambda rng: (rng.uniform(1.38, 1.72), rng.uniform(1.55, 1.85), rng.uniform(3.5, 4.7)),
    "Van": lambda rng: (rng.uniform(1.9, 2.4), rng.uniform(1.75, 2.0), rng.uniform(4.6, 5.6)),
    "Truck": lambda rng: (rng.uniform(2.8, 3.5), rng.uniform(2.2, 2.5), rng.uniform(6.0, 8.5)),
}


def _vehicle(
    street: _Street,
    rng: np.random.Generator,
    kind: str,
    position: tuple[float, float],
    rotation_y: float,
    dimensions: tuple[float, float, float],
) -> _Item:
    height, width, length = dimensions
    half, paint = width / 2, np.array(_CAR_PAINTS[rng.integers(len(_CAR_PAINTS))]) * rng.uniform(0.85, 1.1)
    glass = np.array([48, 56, 66]) * rng.uniform(0.6, 1.5) + 0.12 * street.haze_color
    floor = 0.16 * min(height, 2.0)
    parts = [_ground_shadow(street, position, rotation_y, length, width)]

    def block(bottom, top, heights, half_widths):
        ends = [(length * a, length * b) for a, b in (bottom, top)]
        return _visible_faces(*ends, heights, half_widths, position, rotation_y)

    under = block((-0.47, 0.47), (-0.47, 0.47), (0.02, floor + 0.05), (half * 0.92, half * 0.92))
    parts += [_Part(face.corners, (22, 22, 24)) for face in under]

    if kind == "Truck":
        cargo = np.array(_CAR_PAINTS[rng.integers(len(_CAR_PAINTS))]) * 1.05
        cargo_faces = block((-0.5, 0.18), (-0.5, 0.18), (floor, height), (half, half))
        cab_faces = block((0.2, 0.5), (0.2, 0.46), (floor, 0.78 * height), (half * 0.96, half * 0.9))
        cab_parts = _painted_faces(street, cab_faces, paint)
        for face in cab_faces:
            if face.name in ("front", "left", "right"):
                cab_parts.append(_Part(face.patch(0.1, 0.9, 0.5, 0.88), tuple(glass)))
        groups = [_painted_faces(street, cargo_faces, cargo), cab_parts]
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
        parts += _painted_faces(street, body, paint)
        for face in body:
            if face.name != "top":
                parts.append(_Part(face.patch(0, 1, 0, 0.2), tuple(0.45 * np.array(street.shade(paint, face.normal)))))
        parts += _lights(body, low=0.5, high=0.78)
        parts += _painted_faces(street, cabin, paint)
        parts += _windows(cabin, tuple(glass), closed_rear=kind == "Van" and rng.random() < 0.6)
        wheel_radius = 0.31
    for sign in (-1, 1):
        parts += _wheels(sign * half * 1.001, length, wheel_radius, position, rotation_y)
    x, z = position
    return _Item(z, parts, kind, dimensions, (x, _CAMERA_HEIGHT, z), rotation_y)


def _ground_shadow(
    street: _Street, position: tuple[float, float], rotation_y: float, length: float, width: float
) -> _Part:
    half_length, half_width = length / 2 + 0.15, width / 2 + 0.2
    shift = -0.5 * street.sun[[0, 2]]
    place = (position[0] + shift[0], position[1] + shift[1])
    corners = _place(
        [
            (-half_length, 0, -half_width),
            (half_length, 0, -half_width),
            (half_length, 0, half_width),
            (-half_length, 0, half_width),
        ],
        place,
        rotation_y,
    )
    return _Part(corners, tuple(0.42 * street.ground_color), solid=False)


def _painted_faces(street: _Street, faces: list[_Face], paint: np.ndarray) -> list[_Part]:
    return [_Part(face.corners, street.shade(paint, face.normal)) for face in faces]


def _lights(faces: list[_Face], low: float, high: float) -> list[_Part]:
    colors = {"front": (235, 232, 210), "rear": (170, 24, 22)}
    parts = []
    for face in faces:
        if face.name in colors:
            parts += [_Part(face.patch(u, u + 0.17, low, high), colors[face.name]) for u in (0.04, 0.79)]
            parts.append(_Part(face.patch(0.36, 0.64, low - 0.05, low + 0.12), (205, 205, 200)))
    return parts


def _windows(cabin: list[_Face], glass: Color, closed_rear: bool) -> list[_Part]:
    parts = []
    for face in cabin:
        if face.name in ("front", "rear"):
            parts.append(_Part(face.patch(0.08, 0.92, 0.12, 0.9), glass))
        elif face.name in ("left", "right"):
            # u runs from the front on the right face, from the rear on the left one
            panes = [(0.06, 0.46), (0.52, 0.94)] if not closed_rear else [(0.06, 0.34)]
            if face.name == "left":
                panes = [(1 - b, 1 - a) for a, b in panes]
            parts += [_Part(face.patch(a, b, 0.12, 0.88), glass) for a, b in panes]
    return parts


def _wheels(
    sideways: float, length: float, radius: float, position: tuple[float, float], rotation_y: float
) -> list[_Part]:
    """Both wheels of one side, nothing where that side faces away."""
    outward = _place([(0, 0, math.copysign(1, sideways))], (0, 0), rotation_y)[0]
    center = _place([(0, radius, sideways)], position, rotation_y)[0]
    if outward[0] * center[0] + outward[2] * center[2] >= 0:
        return []
    parts = []
    angles = np.linspace(0, 2 * math.pi, 14, endpoint=False)
    for share in (-0.31, 0.31):
        for r, color in ((radius, (20, 20, 22)), (0.55 * radius, (128, 130, 134))):
            forward, up = share * length + r * np.cos(angles), radius + r * np.sin(angles)
            corners = _place(np.stack([forward, up, np.full(14, sideways)], axis=1), position, rotation_y)
            parts.append(_Part(corners, color))
    return parts


# ---------------------------------------------------------------------------------------------------- people, clutter


class _Billboard:
    """A flat drawing that faces the camera; local coordinates are metres to the right of x and above the ground."""

    def __init__(self, x: float, z: float, stretch: tuple[float, float] = (1.0, 1.0)):
        self.x, self.z = x, z
        self._stretch = np.array(stretch)
        self.parts: list[_Part] = []

    def polygon(self, points, color: Color, solid: bool = True) -> None:
        local = np.asarray(points, dtype=float) * self._stretch
        corners = np.stack([self.x + local[:, 0], _CAMERA_HEIGHT - local[:, 1], np.full(len(local), self.z)], axis=1)
        self.parts.append(_Part(corners, tuple(color), solid))

    def rectangle(self, left: float, right: float, low: float, high: float, color: Color) -> None:
        self.polygon([(left, low), (right, low), (right, high), (left, high)], color)

    def ellipse(self, center, radii, color: Color, solid: bool = True) -> None:
        angles = np.linspace(0, 2 * math.pi, 14, endpoint=False)
        points = np.stack([center[0] + radii[0] * np.cos(angles), center[1] + radii[1] * np.sin(angles)], axis=1)
        self.polygon(points, color, solid)

    def limb(self, points, width: float, color: Color) -> None:
        """A bent strip through the points."""
        for start, end in zip(np.asarray(points[:-1], float), np.asarray(points[1:], float)):
            along = end - start
            across = np.array([-along[1], along[0]]) * (width / 2 / max(np.linalg.norm(along), 1e-6))
            self.polygon([start + across, end + across, end - across, start - across], color)

    def ring(self, center, radius: float, width: float, color: Color) -> None:
        angles = np.linspace(0, 2 * math.pi, 15)
        self.limb(
            np.stack([center[0] + radius * np.cos(angles), center[1] + radius * np.sin(angles)], axis=1), width, color
        )

    def shadow(self, street: _Street, half_width: float) -> None:
        x = self.x - 0.3 * street.sun[0]
        angles = np.linspace(0, 2 * math.pi, 12, endpoint=False)
        corners = np.stack(
            [x + half_width * np.cos(angles), np.full(12, _CAMERA_HEIGHT), self.z + 0.3 * np.sin(angles)], axis=1
        )
        self.parts.append(_Part(corners, tuple(0.5 * street.ground_color), solid=False))


_SKINS = ((224, 182, 152), (198, 150, 118), (150, 104, 76), (96, 66, 50))
_HAIRS = ((34, 28, 26), (70, 50, 36), (128, 96, 60), (150, 148, 144))


def _cloth(rng: np.random.Generator) -> np.ndarray:
    gray = rng.uniform(25, 170)
    return np.clip(gray + rng.normal(0, 28, 3), 10, 230)


def _pedestrian(street: _Street, rng: np.random.Generator, x: float, z: float) -> _Item:
    height, broad = rng.uniform(1.5, 1.9), rng.uniform(0.75, 1.15)
    figure = _Billboard(x, z, (height / 1.75 * rng.choice([-1, 1]), height / 1.75))
    figure.shadow(street, 0.35)
    skin, hair = _SKINS[rng.integers(len(_SKINS))], _HAIRS[rng.integers(len(_HAIRS))]
    coat, trousers = _cloth(rng), _cloth(rng) * 0.8
    sideways = rng.random() < 0.5
    shoulder = (0.15 if sideways else 0.22) * broad
    stride = rng.uniform(0.1, 0.32) if sideways else rng.uniform(0.05, 0.12)
    swing = rng.uniform(0.05, 0.3) if sideways else 0.05
    hip = 0.88
    figure.limb([(0.03, hip), (-0.4 * stride, 0.46), (-stride, 0.05)], 0.15, trousers * 0.75)
    figure.limb([(-stride - 0.05, 0.03), (-stride + 0.14, 0.03)], 0.07, (30, 28, 28))
    figure.limb([(-0.8 * shoulder, 1.38), (-shoulder - swing, 1.1), (-shoulder - 0.5 * swing, 0.86)], 0.1, coat * 0.7)
    if rng.random() < 0.3:  # a rucksack or bag
        figure.ellipse((-shoulder - 0.06, 1.2), (0.14, 0.22), _cloth(rng))
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
    return _Item(z, figure.parts, "Pedestrian", (height, 0.6, 0.6), (x, _CAMERA_HEIGHT, z), float(rng.uniform(-3, 3)))


def _draw_bicycle(figure: _Billboard, rng: np.random.Generator) -> None:
    frame, tyre = rng.uniform(20, 190, 3), (28, 28, 30)
    for center in (-0.52, 0.52):
        figure.ring((center, 0.34), 0.32, 0.06, tyre)
    figure.limb([(-0.52, 0.34), (-0.05, 0.32), (-0.2, 0.82), (-0.52, 0.34)], 0.05, frame)
    figure.limb([(-0.05, 0.32), (0.4, 0.78), (-0.18, 0.76)], 0.05, frame)
    figure.limb([(0.52, 0.34), (0.4, 0.78), (0.36, 1.0), (0.48, 1.04)], 0.05, frame * 0.8)
    figure.limb([(-0.3, 0.9), (-0.08, 0.9)], 0.07, (30, 26, 24))


def _cyclist(street: _Street, rng: np.random.Generator, x: float, z: float) -> _Item:
    height = rng.uniform(1.6, 1.85)
    scale = height / 1.75
    skin, hair = _SKINS[rng.integers(len(_SKINS))], _HAIRS[rng.integers(len(_HAIRS))]
    shirt, trousers = _cloth(rng), _cloth(rng) * 0.8
    helmet = rng.uniform(40, 235, 3) if rng.random() < 0.5 else hair
    if rng.random() < 0.45:  # riding along the street: seen from behind or in front
        figure = _Billboard(x, z, (scale * rng.choice([-1, 1]), scale))
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
        figure = _Billboard(x, z, (scale * turn * direction, scale))
        figure.shadow(street, 0.75)
        lean = rng.uniform(0.18, 0.42)
        head = (-0.18 + lean * 1.2, 1.62)
        figure.limb([(-0.2, 0.92), (0.12, 0.72), (0.0, 0.42)], 0.13, trousers * 0.75)
        _draw_bicycle(figure, rng)
        figure.limb([(-0.2, 0.92), (0.16, 0.66), (-0.02, 0.24)], 0.15, trousers)
        shoulder = (-0.18 + lean, 1.42)
        figure.limb([(-0.2, 0.88), shoulder], 0.27, shirt)
        figure.limb([shoulder, (0.2 + 0.4 * lean, 1.16), (0.44, 1.06)], 0.09, shirt * 0.8)
        figure.ellipse(head, (0.11, 0.13), skin)
        figure.polygon(
            [(head[0] + a, head[1] + b) for a, b in ((-0.13, 0), (-0.1, 0.1), (0, 0.14), (0.12, 0.05))], helmet
        )
        rotation_y = 0.0 if direction > 0 else math.pi
    return _Item(z, figure.parts, "Cyclist", (height, 0.6, 1.76), (x, _CAMERA_HEIGHT, z), rotation_y)


def _bicycle(street: _Street, rng: np.random.Generator, x: float, z: float) -> _Item:
    figure = _Billboard(x, z, (rng.uniform(0.5, 1.0), 1.0))
    _draw_bicycle(figure, rng)
    return _Item(z, figure.parts)


def _pole(street: _Street, rng: np.random.Generator, x: float, z: float) -> _Item:
    figure = _Billboard(x, z)
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
    return _Item(z, figure.parts)


def _bin(street: _Street, rng: np.random.Generator, x: float, z: float) -> _Item:
    """A litter bin or letter box: about as broad as a person."""
    figure = _Billboard(x, z)
    color, height, half = _cloth(rng), rng.uniform(0.9, 1.5), rng.uniform(0.2, 0.32)
    figure.rectangle(-half, half, 0.02, height, color)
    figure.rectangle(0.2 * half, half, 0.02, height, color * 0.75)
    figure.ellipse((0, height), (half, 0.13), color * 1.2)
    figure.rectangle(-0.6 * half, 0.6 * half, 0.7 * height, 0.8 * height, color * 0.4)
    return _Item(z, figure.parts)


def _bollard(street: _Street, rng: np.random.Generator, x: float, z: float) -> _Item:
    """A post with a round top, in two colours: a poor likeness of a person."""
    figure = _Billboard(x, z)
    lower, upper, height, half = _cloth(rng), _cloth(rng), rng.uniform(1.0, 1.6), rng.uniform(0.09, 0.2)
    figure.rectangle(-0.8 * half, 0.8 * half, 0, 0.5 * height, lower)
    figure.rectangle(-half, half, 0.5 * height, 0.85 * height, upper)
    figure.ellipse((0, 0.92 * height), (0.11, 0.12), _cloth(rng) * 1.2)
    return _Item(z, figure.parts)


def _board(street: _Street, rng: np.random.Generator, x: float, z: float) -> _Item:
    """An advertising board with a dark shape on it."""
    figure = _Billboard(x, z)
    half, height = rng.uniform(0.45, 0.8), rng.uniform(1.7, 2.3)
    figure.rectangle(-half, half, 0.1, height, (70, 72, 74))
    figure.rectangle(-0.88 * half, 0.88 * half, 0.25, height - 0.1, rng.uniform(90, 235, 3))
    figure.ellipse((0, 0.68 * height), (0.3 * half, 0.16 * height), _cloth(rng))
    figure.rectangle(-0.4 * half, 0.4 * half, 0.3, 0.5 * height, _cloth(rng))
    return _Item(z, figure.parts)


def _container(street: _Street, rng: np.random.Generator, x: float, z: float) -> _Item:
    """A skip or stall: about as large as a car, without wheels or windows."""
    height, half, length = rng.uniform(1.1, 1.9), rng.uniform(0.7, 0.9), rng.uniform(1.8, 3.4)
    rotation_y = float(math.pi / 2 + rng.normal(0, 0.2))
    z = max(z, _NEAREST + length)
    color = np.array(_CAR_PAINTS[rng.integers(len(_CAR_PAINTS))])
    ends = (-length / 2, length / 2)
    faces = _visible_faces(ends, ends, (0.0, height), (half, half), (x, z), rotation_y)
    parts = [_ground_shadow(street, (x, z), rotation_y, length, 2 * half), *_painted_faces(street, faces, color)]
    parts += [_Part(f.patch(0, 1, 0.82, 1), tuple(0.6 * color)) for f in faces if f.name != "top"]
    return _Item(z, parts)


def _tree(street: _Street, rng: np.random.Generator, x: float, z: float) -> _Item:
    figure = _Billboard(x, z)
    trunk, height = np.array([86, 68, 52]) * rng.uniform(0.6, 1.2), rng.uniform(3.0, 7.0)
    radius, green = rng.uniform(0.1, 0.26), np.array([70, 98, 48]) * rng.uniform(0.6, 1.3)
    figure.rectangle(-radius, radius, 0, height, trunk)
    figure.rectangle(0, radius, 0, height, trunk * 0.7)
    bottom = rng.uniform(0.35, 0.65) * height
    for _ in range(rng.integers(6, 11)):
        center = (rng.normal(0, 0.9), rng.uniform(bottom + 0.6, height + 1.5))
        figure.ellipse(center, rng.uniform(0.5, 1.3, 2), green * rng.uniform(0.7, 1.25))
    return _Item(z, figure.parts)
