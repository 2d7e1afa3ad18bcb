"""Toy scenes: the same everywhere, other ones by another seed, of a sensible difficulty, in any size."""

from __future__ import annotations

import functools
import hashlib
from collections import Counter

import numpy as np
import PIL
import pytest

from gkd_d2.data.toy import make_scene
from gkd_d2.data.toy.scene import paint_scene

SMALL = (160, 64)
# Arguments of a scene -> the start of the SHA-256 of its label lines, and of what is painted; the mean of each channel
# in 2 x 4 parts of the image, rounded, in hexadecimal digits.
SCENES = {
    (0, 0, (320, 128)): ("c07b4de376e8", "30f567053ec6", "66625e788a9d7993a95d757044474b42464b404348464a48"),
    (0, 1, (320, 128)): ("9c0ddfc9743a", "9889bce878d9", "7384838396a3737279494b4075776787848269666848464a"),
    (0, 500_000, (320, 128)): ("e72b133611bb", "e5a1be141865", "444e5157646d4f5b634953593f42383f3c3a3b3936373930"),
    (1, 0, (320, 128)): ("4468838919cf", "b334082d18f5", "a5b4b9b0bfce9fa7b26a646a9e9f967e858a757171866b5e"),
    (5, 7, (320, 128)): ("12a3a7656eb8", "a501a97c3ac2", "798360939b9d7a887f6f81626e5c586f6a695b605f7a7f6e"),
    (3, 2, (160, 64)): ("bce974592ac4", "b0f17c9cb6d6", "82756d88949997a4a17e81727871736a6e7263686c8b8560"),
    (3, 500_001, (160, 64)): ("481bd30031ff", "b31e3a7979b1", "7f6d5a8888938a7e64826d4b84787694888a816e598d7a67"),
    (2, 11, (641, 193)): ("033d70431bac", "3638a929adc2", "8196839eb2be87959273785d5f655d5d635d585d5b66665c"),
    (4, 5, (200, 300)): ("90127725758d", "113a20f3986e", "616f746d798668727d61666d363a3a353839393c3d383c3c"),
    (6, 3, (640, 256)): ("4060def5375a", "f690880dd9e4", "6c807d7489927488956a8074545c54555a58565656818883"),
}
# These fill polygons alike; others differ in pixels at the edges.
PILLOW = (11, 2), (13, 0)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


@functools.cache
def painter_of(scene):
    return paint_scene(*scene)


@pytest.mark.parametrize("scene", SCENES)
def test_labels_and_light_are_the_same_everywhere(scene) -> None:
    labels, _, means = SCENES[scene]
    painter = painter_of(scene)
    assert digest("".join(obj.label_line() + "\n" for obj in painter.labels()).encode()) == labels
    pixels = np.asarray(painter.develop(), dtype=float)
    height, width = pixels.shape[0] // 2, pixels.shape[1] // 4
    parts = pixels[: 2 * height, : 4 * width].reshape(2, height, 4, width, 3).mean(axis=(1, 3))
    # The last bit of a pixel depends on the processor, by NumPy's float32 powers.
    assert parts.ravel() == pytest.approx(list(bytes.fromhex(means)), abs=1)


@pytest.mark.skipif(
    not PILLOW[0] <= tuple(map(int, PIL.__version__.split(".")[:2])) <= PILLOW[1],
    reason=f"Pillow {PIL.__version__} may fill polygons otherwise than those compared",
)
@pytest.mark.parametrize("scene", SCENES)
def test_every_painted_pixel_is_the_same(scene) -> None:
    assert digest(np.asarray(painter_of(scene).canvas).tobytes()) == SCENES[scene][1]


def test_another_seed_gives_other_scenes() -> None:
    first, other, next_one = make_scene(0, 0, SMALL), make_scene(1, 0, SMALL), make_scene(0, 1, SMALL)
    assert np.any(np.asarray(first[0]) != np.asarray(other[0]))
    assert np.any(np.asarray(first[0]) != np.asarray(next_one[0]))


def test_what_the_scenes_hold() -> None:
    scenes = [make_scene(0, index)[1] for index in range(100)]
    labels = [obj for scene in scenes for obj in scene]
    counts = Counter(obj.type for obj in labels)
    assert counts.keys() == {"Car", "Van", "Truck", "Pedestrian", "Cyclist", "DontCare"}
    assert counts["Car"] > 150 and counts["Pedestrian"] > 60 and counts["Cyclist"] > 40 and counts["DontCare"] > 30
    objects = [obj for obj in labels if obj.type != "DontCare"]
    heights = np.array([obj.bbox[3] - obj.bbox[1] for obj in objects])
    assert heights.min() >= 7
    # scale with depth: box height times depth is about focal length times the object's height
    whole = [o for o in objects if o.type == "Pedestrian" and o.truncation == 0]
    ratios = [(o.bbox[3] - o.bbox[1]) * o.location[2] / (0.58 * 320 * o.dimensions[0]) for o in whole]
    assert min(ratios) > 0.95 and max(ratios) < 1.05
    assert np.percentile(heights, 90) > 2.5 * np.percentile(heights, 10)
    occlusions = Counter(obj.occlusion for obj in objects)
    assert all(occlusions[level] >= 0.05 * len(objects) for level in (0, 1, 2))
    assert any(obj.truncation > 0.1 for obj in objects)
    # what is truncated ends at the border
    for obj in objects:
        left, top, right, bottom = obj.bbox
        assert (obj.truncation < 0.02) or left == 0 or top == 0 or right == 319 or bottom == 127


@pytest.mark.parametrize("size", [SMALL, (200, 300), (641, 193)])
def test_other_sizes(size: tuple[int, int]) -> None:
    for index in range(4):
        image, objects = make_scene(1, index, size)
        assert image.size == size
        for obj in objects:
            left, top, right, bottom = obj.bbox
            assert 0 <= left < right <= size[0] - 1 and 0 <= top < bottom <= size[1] - 1
