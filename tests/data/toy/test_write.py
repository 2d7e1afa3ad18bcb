"""The files of toy data: the same on every run, whole or absent, and readable as KITTI."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gkd_d2.data.datasets.kitti import load_kitti
from gkd_d2.data.toy import FIRST_VAL_ID, make_scene, make_toy_kitti, write

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
    def break_at_the_third(seed, index, image_size):
        if index == 2:
            raise KeyboardInterrupt
        return make_scene(seed, index, image_size)

    monkeypatch.setattr(write, "make_scene", break_at_the_third)
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


def test_the_command(project: Path, tmp_path: Path) -> None:
    def run_tool(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(project / "tools" / "make_toy_kitti.py"), *arguments]
        environment = os.environ | {"PYTHONPATH": str(project)}
        return subprocess.run(command, capture_output=True, text=True, env=environment)

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
