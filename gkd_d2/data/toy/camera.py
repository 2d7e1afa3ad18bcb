"""The camera, and the coordinates that all of a scene stands in."""

from __future__ import annotations

import numpy as np

CAMERA_HEIGHT = 1.65  # metres above the ground
NEAREST = 4.5  # metres; the depth from which on things stand


class Camera:
    """A pinhole camera like KITTI's: focal length 0.58 of the width, horizon at 46 % of the height."""

    def __init__(self, width: int, height: int):
        self.width, self.height = width, height
        self.focal = 0.58 * width
        self.center = (width / 2, 0.46 * height)

    def project(self, points: np.ndarray) -> np.ndarray:
        """Points in metres, (n, 3), to pixels, (n, 2). Every z must be positive."""
        points = np.asarray(points, dtype=float)
        return self.focal * points[:, :2] / points[:, 2:] + self.center
