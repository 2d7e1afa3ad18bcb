"""From shapes in metres to an image, and to what shows of each object."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from gkd_d2.data.toy.camera import Camera
from gkd_d2.data.toy.labels import Painted, ToyObject, label_objects
from gkd_d2.data.toy.shapes import Item
from gkd_d2.data.toy.street import Color, Street

_SUPERSAMPLING = 2


class Painter:
    """A canvas and, beside it, the number of the object that shows at each of its pixels.

    Attributes:
        camera, street, rng: as given.
        canvas: what is painted so far, supersampled: twice the image's width and height.
    """

    def __init__(self, camera: Camera, street: Street, rng: np.random.Generator):
        self.camera, self.street, self.rng = camera, street, rng
        self._size = (camera.width * _SUPERSAMPLING, camera.height * _SUPERSAMPLING)
        self.canvas = Image.new("RGB", self._size)
        self._draw = ImageDraw.Draw(self.canvas)
        self._owners = Image.new("I", self._size, 0)
        self._painted: list[Painted] = []

    def polygon(self, pixels: np.ndarray, color: Color) -> None:
        """Fill a polygon given in pixels, (n, 2), of the image."""
        self._draw.polygon(_corner_list(pixels), fill=_rgb(color))

    def backdrop(self, pixels: np.ndarray) -> None:
        """Put a picture of the image's width, (h, w, 3) uint8, at the top."""
        picture = Image.fromarray(pixels)
        self.canvas.paste(picture.resize((self._size[0], picture.height * _SUPERSAMPLING), Image.Resampling.BILINEAR))

    def surface(self, corners: np.ndarray, color: Color) -> None:
        """Fill a polygon given in metres, (n, 3), in the colour that the air leaves of it."""
        corners = np.asarray(corners, dtype=float)
        self.polygon(self.camera.project(corners), self.street.in_air(color, float(corners[:, 2].mean())))

    def blur(self, radius: float) -> None:
        """Blur all that is painted so far; the radius is in pixels of the image."""
        self.canvas = self.canvas.filter(ImageFilter.BoxBlur(radius * _SUPERSAMPLING))
        self._draw = ImageDraw.Draw(self.canvas)

    def paint(self, item: Item) -> None:
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
        self._painted.append(Painted(item, whole_box, int(np.asarray(mask).sum())))

    def develop(self) -> Image.Image:
        """The image as a camera would give it: uneven light, exposure, a tint, and noise."""
        rng = self.rng
        image = self.canvas.reduce(_SUPERSAMPLING)
        pixels = np.asarray(image, dtype=np.float32)
        pixels = pixels * smooth_field(rng, image.size, cells=6, amplitude=0.08)[..., None]
        pixels = pixels * smooth_field(rng, image.size, cells=40, amplitude=0.03)[..., None]
        exposure = rng.uniform(0.4, 0.65) if rng.random() < 0.12 else rng.uniform(0.85, 1.2)
        tint = np.array([rng.uniform(0.94, 1.06), 1.0, rng.uniform(0.94, 1.06)], dtype=np.float32)
        pixels = 255 * np.clip(pixels / 255, 0, None) ** rng.uniform(0.8, 1.15) * exposure * tint
        pixels = pixels + rng.normal(0, rng.uniform(2, 7), pixels.shape).astype(np.float32)
        return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))

    def labels(self) -> list[ToyObject]:
        """The objects of which something shows, from far to near, DontCare last."""
        return label_objects(self._painted, np.asarray(self._owners), self.camera)


def smooth_field(rng: np.random.Generator, size: tuple[int, int], cells: int, amplitude: float) -> np.ndarray:
    """A smooth random field about 1 of the image's size, with about that many cells along its width."""
    width, height = size
    grid = rng.normal(1, amplitude, (max(2, round(cells * height / width)), cells)).astype(np.float32)
    return np.asarray(Image.fromarray(grid).resize(size, Image.Resampling.BICUBIC))


def _corner_list(pixels: np.ndarray) -> list[tuple[float, float]]:
    return [(x, y) for x, y in (np.asarray(pixels) * _SUPERSAMPLING).tolist()]


def _rgb(color: Color) -> tuple[int, int, int]:
    return tuple(int(min(max(channel, 0), 255)) for channel in color)
