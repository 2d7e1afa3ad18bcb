"""The toy data: the same on every run, whole or absent, readable as KITTI, and of a sensible difficulty."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from gkd_d2.data.datasets.kitti import load_kitti
from gkd_d2.data.toy import FIRST_VAL_ID, ToyObject, make_scene, make_toy_kitti
from gkd_d2.data.toy import scene as toy_kitti

TOOL = Path(__file__).resolve().parents[2] / "tools" / "make_toy_kitti.py"
SMALL = (160, 64)


def content(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def toy_root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("toy") / "toy_kitti"
    make_toy_kitti(root, num_train=6, num_val=3, seed=5)
    return root


def test_files_of_the_form_of_kitti(toy_root: Path) -> None:
    ids = [f"{number:06d}" for number in range(6)] + ["500000", "500001", "500002"]
    expected = {"toy_kitti.json", "ImageSets/train.txt", "ImageSets/val.txt"}
    expected |= {f"training/image_2/{i}.png" for i in ids} | {f"training/label_2/{i}.txt" for i in ids}
    assert content(toy_root).keys() == expected
    assert (toy_root / "ImageSets/val.txt").read_text() == "500000\n500001\n500002\n"


def test_a_second_run_gives_the_same_bytes(toy_root: Path, tmp_path: Path) -> None:
    make_toy_kitti(tmp_path / "again", num_train=6, num_val=3, seed=5)
    assert content(tmp_path / "again") == content(toy_root)


def test_an_image_does_not_depend_on_the_number_of_images(toy_root: Path, tmp_path: Path) -> None:
    make_toy_kitti(tmp_path / "fewer", num_train=2, num_val=1, seed=5)
    whole = content(toy_root)
    for name, data in content(tmp_path / "fewer").items():
        if name.startswith("training/"):
            assert data == whole[name]


def test_another_seed_gives_other_scenes() -> None:
    first, other, next_one = make_scene(0, 0, SMALL), make_scene(1, 0, SMALL), make_scene(0, 1, SMALL)
    assert np.any(np.asarray(first[0]) != np.asarray(other[0]))
    assert np.any(np.asarray(first[0]) != np.asarray(next_one[0]))


def test_the_loader_reads_what_the_generator_made(toy_root: Path) -> None:
    for split, first in (("train", 0), ("val", FIRST_VAL_ID)):
        for number, record in enumerate(load_kitti(toy_root, split)):
            image, objects = make_scene(5, first + number)
            assert image.size == (record["width"], record["height"]) == (320, 128)
            assert record["kitti_objects"] == [
                {
                    "type": obj.type,
                    "truncation": pytest.approx(obj.truncation),
                    "occlusion": obj.occlusion,
                    "bbox": pytest.approx(list(obj.bbox)),
                }
                for obj in objects
            ]


def test_label_lines() -> None:
    car = ToyObject("Car", 0.25, 1, (1, 2.5, 30.25, 40), 0.5, (1.5, 1.75, 4), (-2, 1.65, 12.5), -1.57)
    assert car.label_line() == ("Car 0.25 1 0.50 1.00 2.50 30.25 40.00 1.50 1.75 4.00 -2.00 1.65 12.50 -1.57")
    ignored = ToyObject("DontCare", -1, -1, (1, 2.5, 30.25, 40))
    assert ignored.label_line() == "DontCare -1 -1 -10 1.00 2.50 30.25 40.00 -1 -1 -1 -1000 -1000 -1000 -10"


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


def test_occlusion_follows_from_what_is_visible() -> None:
    street = toy_kitti._Street.draw(np.random.default_rng(0))
    painter = toy_kitti._Painter(toy_kitti._Camera(320, 128), street, np.random.default_rng(0))

    def square(left: float, right: float, z: float, kind: str | None) -> None:
        """A block 2 m high, whose sides are given in metres at depth z."""
        corners = np.array([(left, 1.65, z), (right, 1.65, z), (right, -0.35, z), (left, -0.35, z)])
        painter.paint(toy_kitti._Item(z, [toy_kitti._Part(corners, (9, 9, 9))], kind, (2, 1, 1), (0, 1.65, z), 0))

    # Rays through the edges: a block at 10 m spans half the metres of one at 20 m that looks as broad.
    for place in (-12, -6, 0, 6, 12):
        square(place, place + 4, 20, "Car")
    for place, hidden in ((-6, 0.3), (0, 0.7), (6, 0.9), (12, 1.0)):
        square(place / 2, place / 2 + 2 * hidden, 10, None)
    labels = painter.labels()
    assert [(obj.type, obj.occlusion) for obj in labels] == [("Car", 0), ("Car", 1), ("Car", 2), ("DontCare", -1)]
    # 18.56 pixels a metre at 10 m, the centre at 160: the rest of the block from 6 m at 20 m, 90 % hidden
    assert labels[3].bbox[0::2] == pytest.approx((160 + 9.28 * 9.6, 160 + 9.28 * 10), abs=0.6)


def test_truncation_follows_from_what_lies_outside() -> None:
    street = toy_kitti._Street.draw(np.random.default_rng(0))
    painter = toy_kitti._Painter(toy_kitti._Camera(320, 128), street, np.random.default_rng(0))
    # At 18.56 m a metre is 10 pixels and the left border is at -16 m: a quarter of the block is outside.
    corners = np.array([(-17, 1.65, 18.56), (-13, 1.65, 18.56), (-13, 0, 18.56), (-17, 0, 18.56)])
    painter.paint(toy_kitti._Item(18.56, [toy_kitti._Part(corners, (9, 9, 9))], "Van", (2, 1, 1), (0, 1.65, 19), 0))
    (label,) = painter.labels()
    assert label.truncation == 0.25
    assert label.bbox == pytest.approx((0, 58.88, 30, 58.88 + 16.5), abs=0.01)


@pytest.mark.parametrize("size", [SMALL, (200, 300), (641, 193)])
def test_other_sizes(size: tuple[int, int]) -> None:
    for index in range(4):
        image, objects = make_scene(1, index, size)
        assert image.size == size
        for obj in objects:
            left, top, right, bottom = obj.bbox
            assert 0 <= left < right <= size[0] - 1 and 0 <= top < bottom <= size[1] - 1


def test_an_equal_run_leaves_the_folder_and_another_needs_force(tmp_path: Path) -> None:
    root = tmp_path / "toy"
    make_toy_kitti(root, 2, 1, image_size=SMALL)
    before = content(root)
    times = [path.stat().st_mtime_ns for path in sorted(root.rglob("*"))]
    make_toy_kitti(root, 2, 1, image_size=SMALL)
    assert [path.stat().st_mtime_ns for path in sorted(root.rglob("*"))] == times
    with pytest.raises(FileExistsError, match="'num_train': 2.*'num_train': 3.*--force"):
        make_toy_kitti(root, 3, 1, image_size=SMALL)
    assert content(root) == before
    make_toy_kitti(root, 3, 1, image_size=SMALL, force=True)
    assert len(load_kitti(root, "train")) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]


def test_nothing_but_toy_data_is_ever_replaced(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="never replaced"):
        make_toy_kitti(tmp_path, 1, 1, image_size=SMALL, force=True)
    assert content(tmp_path) == {"precious.txt": b"mine"}


def test_a_broken_run_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    scene = toy_kitti.make_scene

    def break_at_the_third(seed, index, image_size):
        if index == 2:
            raise KeyboardInterrupt
        return scene(seed, index, image_size)

    monkeypatch.setattr(toy_kitti, "make_scene", break_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        make_toy_kitti(tmp_path / "toy", 4, 1, image_size=SMALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_train": 0}, "num_train is 0"),
        ({"num_val": FIRST_VAL_ID + 1}, "num_val is 500001"),
        ({"seed": -1}, "seed is -1"),
        ({"image_size": (320, 32)}, "image_size is 320 x 32"),
    ],
)
def test_arguments_out_of_range(tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_toy_kitti(tmp_path / "toy", **arguments)
    assert list(tmp_path.iterdir()) == []


def run_tool(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(TOOL.parents[1])}
    return subprocess.run([sys.executable, str(TOOL), *arguments], capture_output=True, text=True, env=environment)


def test_the_command(tmp_path: Path) -> None:
    root = tmp_path / "deep" / "toy"
    arguments = ["--output", str(root), "--train", "2", "--val", "1", "--seed", "3", "--size", "160x64"]
    done = run_tool(*arguments)
    assert done.returncode == 0, done.stderr
    make_toy_kitti(tmp_path / "called", 2, 1, 3, SMALL)
    assert content(root) == content(tmp_path / "called")
    arguments[3] = "3"
    refused = run_tool(*arguments)
    assert refused.returncode == 1 and "error: " in refused.stderr and "Traceback" not in refused.stderr
    assert run_tool(*arguments, "--size", "160").returncode == 2
