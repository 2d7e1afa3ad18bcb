"""Preparing a KITTI folder: archives, the split, the counts, the images, the export."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetMapper
from detectron2.data.detection_utils import read_image
from kitti_folder import SIZE, TAIL, write_kitti
from PIL import Image
from pycocotools.coco import COCO

from gkd_d2.data.datasets.kitti import check_kitti_testing, image_size, load_kitti, load_kitti_testing
from gkd_d2.data.mapper import FileNamingMapper
from gkd_d2.data.prepare.kitti import check_images, count_objects, export_coco, unpack, write_split
from gkd_d2.utils import progress


def car(truncation=0.0, occlusion=0, height=50, kind="Car"):
    return f"{kind} {truncation} {occlusion} 0 10 10 60 {10 + height} {TAIL}\n"


def png(path: Path, mode="RGB", size=SIZE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size).save(path)
    return path


@pytest.fixture
def root(tmp_path):
    """Ten images with a car and a van each."""
    return write_kitti(tmp_path / "kitti", {f"{i:06d}": car() + car(kind="Van") for i in range(10)})


def archive(path, entries):
    with zipfile.ZipFile(path, "w") as file:
        for name, content in entries:
            file.writestr(name, content)
    return path


LABELS = [("training/", ""), ("training/label_2/", ""), ("training/label_2/000000.txt", car())]


def test_unpack(tmp_path):
    root = tmp_path / "new" / "kitti"
    path = archive(tmp_path / "a.zip", [*LABELS, ("testing/image_2/000000.png", b"picture")])
    assert unpack(path, root) == 2
    assert (root / "training/label_2/000000.txt").read_text() == car()
    assert (root / "testing/image_2/000000.png").read_bytes() == b"picture"
    assert unpack(path, root) == 0  # the same content stays
    (root / "training/label_2/000000.txt").write_text("other")
    (root / "testing/image_2/000000.png").unlink()
    with pytest.raises(FileExistsError, match="label_2/000000.txt is there with other content .*--force"):
        unpack(path, root)
    assert not (root / "testing/image_2/000000.png").exists()  # nothing was written
    assert unpack(path, root, force=True) == 2
    assert (root / "training/label_2/000000.txt").read_text() == car()
    assert not list(root.rglob("*.tmp"))


def test_archives_of_images_of_any_usual_suffix(root, tmp_path):
    names = [f"training/image_2/00000{i}.{suffix}" for i, suffix in enumerate(("PNG", "jpg", "JPEG"))]
    assert unpack(archive(tmp_path / "a.zip", [(name, "picture") for name in names]), root) == 3
    with pytest.raises(ValueError, match="its entry 'training/label_2/000001.TXT' is none of KITTI's"):
        unpack(archive(tmp_path / "b.zip", [("training/label_2/000001.TXT", car())]), root)


@pytest.mark.parametrize(
    "name",
    [
        "../training/label_2/000001.txt",
        "training/label_2/../../../evil.txt",
        "/training/label_2/000001.txt",
        "C:\\training\\label_2\\000001.txt",
        "training/label_2/..txt",
        "training/label_2/sub/000001.txt",
        "training/velodyne/000001.bin",
        "training/label_2/000001.sh",
        "../evil/",
        "training/label_2/000001.txt\n",
    ],
)
def test_an_entry_that_is_not_kittis_stops_everything(tmp_path, name):
    path = archive(tmp_path / "a.zip", [*LABELS, (name, "x")])
    with pytest.raises(ValueError, match="is none of KITTI's") as error:
        unpack(path, tmp_path / "kitti")
    assert str(error.value).startswith(f"{path}: ")
    assert not (tmp_path / "kitti").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.zip"]


def test_links_twins_and_damage_in_archives(tmp_path):
    link = zipfile.ZipInfo("training/label_2/000001.txt")
    link.external_attr = 0o120777 << 16
    with pytest.raises(ValueError, match="is none of KITTI's"):
        unpack(archive(tmp_path / "a.zip", [*LABELS, (link, "/etc/passwd")]), tmp_path / "kitti")
    with pytest.warns(UserWarning):
        twins = archive(tmp_path / "b.zip", LABELS[2:] * 2)
    with pytest.raises(ValueError, match="stands there twice"):
        unpack(twins, tmp_path / "kitti")
    with pytest.raises(ValueError, match="c.zip: can't be unpacked: File is not a zip file"):
        (tmp_path / "c.zip").write_text("no archive")
        unpack(tmp_path / "c.zip", tmp_path / "kitti")
    with pytest.raises(FileNotFoundError, match="d.zip"):
        unpack(tmp_path / "d.zip", tmp_path / "kitti")
    with pytest.raises(ValueError, match="e.zip: it is empty"):
        unpack(archive(tmp_path / "e.zip", []), tmp_path / "kitti")
    damaged = archive(tmp_path / "f.zip", LABELS)
    damaged.write_bytes(damaged.read_bytes().replace(b"Car 0.0 0", b"Cat 0.0 0"))
    with pytest.raises(ValueError, match="f.zip: can't be unpacked: Bad CRC-32"):
        unpack(damaged, tmp_path / "kitti")
    assert not list((tmp_path / "kitti").rglob("*.t*"))


def test_the_split_is_written_once(root):
    assert write_split(root)
    assert (root / "ImageSets/val.txt").read_text() == "000002\n000008\n"
    assert [record["image_id"] for record in load_kitti(root, "val")] == ["000002", "000008"]
    (root / "ImageSets/val.txt").write_text("000002\n")
    assert not write_split(root)
    assert (root / "ImageSets/val.txt").read_text() == "000002\n"


@pytest.mark.parametrize("number", [1, 0])
def test_a_split_with_an_empty_part_is_not_written(root, number):
    for path in (root / "training/image_2", root / "training/label_2"):
        for extra in sorted(path.iterdir())[number:]:
            extra.unlink()
    with pytest.raises(ValueError, match="kitti has too few images for an 8:2 split, .*: train would be empty"):
        write_split(root)
    assert not (root / "ImageSets").exists()


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: [path.unlink() for path in root.glob("training/*/00000[1-9].*")], "too few images"),
        (lambda root: (root / "training/label_2/000002.txt").write_text("Car\n"), "000002.txt:1: 1 field"),
        (lambda root: (root / "training/label_2/000008.txt").unlink(), "id '000008' has no labels"),
        (lambda root: (root / "training/image_2/000002.png").write_text("no image"), "not a readable image"),
    ],
)
def test_a_folder_that_is_refused_stays_as_it_is(root, tmp_path, run_here, change, message):
    change(root)
    before = files(tmp_path)
    status, said = run_here("prepare_kitti.py", "--root", root, "--coco", tmp_path / "coco")
    assert status == 1 and message in said
    assert files(tmp_path) == before


def test_an_export_that_is_there_is_said_before_the_split_is_written(root, tmp_path, run_here):
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco/kitti_val.json").touch()
    status, said = run_here("prepare_kitti.py", "--root", root, "--coco", tmp_path / "coco")
    assert status == 1 and "kitti_val.json is there already" in said
    assert not (root / "ImageSets").exists() and len(list((tmp_path / "coco").iterdir())) == 1


def test_counts(root):
    lines = [car(), car(occlusion=1), car(truncation=0.4, occlusion=2), car(height=20), car(height=30)]
    (root / "training/label_2/000002.txt").write_text("".join(lines) + car(kind="Van"))
    counts = count_objects(load_kitti(root, "val"))
    assert counts["Car"] == {"all": 6, "easy": 2, "moderate": 4, "hard": 5}
    assert counts["Van"] == {"all": 2} and counts["Cyclist"]["hard"] == 0
    assert list(counts)[:3] == ["Car", "Pedestrian", "Cyclist"] and len(counts) == 9


def test_export(root, tmp_path):
    paths = export_coco(root, tmp_path / "coco")
    assert [path.name for path in paths] == ["kitti_train.json", "kitti_val.json"]
    coco = COCO(str(paths[1]))
    assert [image["file_name"] for image in coco.dataset["images"]] == ["000002.png", "000008.png"]
    assert coco.dataset["annotations"][0] == {
        "id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 50, 50], "area": 2500, "iscrowd": 0,
    }  # fmt: skip
    assert [(a["category_id"], a["iscrowd"]) for a in coco.dataset["annotations"][1:4]] == [(1, 1), (2, 1), (3, 1)]
    with pytest.raises(FileExistsError, match="kitti_train.json is there already"):
        export_coco(root, tmp_path / "coco")
    export_coco(root, tmp_path / "coco", force=True)


def sideways(path, orientation=6, size=SIZE):
    image = Image.new("RGB", size)
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(path, exif=exif)
    return path


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_sizes_are_those_detectron2_sees(tmp_path, suffix, orientation):
    path = sideways(tmp_path / f"a{suffix}", orientation)
    height, width = read_image(str(path), "BGR").shape[:2]
    assert image_size(path) == (width, height)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "I;16", "1"])
def test_images_of_other_modes_are_detectron2s_own(root, mode):
    values = (np.arange(20000) % 251).astype(np.uint8).reshape(100, 200)
    image = Image.fromarray(values)
    image = Image.fromarray(values.astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
    image.save(root / "training/image_2/000002.png")
    record = load_kitti(root, "val")[0]
    assert check_images([record]) == {mode: 1}
    made = FileNamingMapper(DatasetMapper(is_train=False, augmentations=[], image_format="BGR"))(dict(record))
    expected = DatasetMapper(is_train=False, augmentations=[], image_format="BGR")(dict(record))
    assert (made["image"] == expected["image"]).all() and made["image"].shape == (3, 100, 200)


def test_an_image_that_can_not_be_used_is_named(root):
    path = root / "training/image_2/000002.png"
    noise = np.random.default_rng(0).integers(0, 255, (100, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-5000])
    record = load_kitti(root, "val")[0]  # its header is whole
    mapper = FileNamingMapper(DatasetMapper(is_train=True, augmentations=[], image_format="BGR"))
    with pytest.raises(ValueError, match="Detectron2 can't use this image") as error:
        mapper(record)
    assert str(error.value).startswith(f"{path}: ")
    with pytest.raises(ValueError, match="Detectron2 can't read this image") as error:
        check_images([record])
    assert str(error.value).startswith(f"{path}: ")
    # The label's picture and the picture disagree.
    png(path, size=(100, 200))
    with pytest.raises(ValueError, match=f"^{path}: .*Mismatched image shape.*"):
        mapper(record)
    with pytest.raises(ValueError, match="100 x 200 pixels, its header says 200 x 100"):
        check_images([record])


def test_labels_beyond_a_turned_picture_are_refused(root):
    (root / "training/label_2/000002.txt").write_text(f"Car 0 0 0 110 10 160 60 {TAIL}\n")
    assert load_kitti(root, "val")
    (root / "training/image_2/000002.png").unlink()
    sideways(root / "training/image_2/000002.jpg")
    with pytest.raises(ValueError, match="outside its image of 100 x 200 pixels"):
        load_kitti(root, "val")


def test_testing_images(root):
    with pytest.raises(FileNotFoundError, match="testing/image_2 holds no .png, .jpg or .jpeg file"):
        check_kitti_testing(root)
    for name in ("000001.png", "000000.jpg"):
        png(root / "testing/image_2" / name)
    records = load_kitti_testing(root)
    assert [(r["image_id"], r["width"], r["height"]) for r in records] == [("000000", 200, 100), ("000001", 200, 100)]
    png(root / "testing/image_2/000001.jpg")
    with pytest.raises(ValueError, match="two images"):
        load_kitti_testing(root)


def test_the_command(project, root, tmp_path):
    labels = archive(tmp_path / "labels.zip", [("training/label_2/000002.txt", car() + car(height=20))])
    png(root / "training/image_2/000008.png", mode="L")

    def run(*arguments):
        return subprocess.run(
            [sys.executable, str(project / "tools/prepare_kitti.py"), "--root", root, "--archives", labels, *arguments],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONWARNINGS": "ignore"},
        )

    done = run()
    assert done.returncode == 1 and "--force" in done.stderr
    done = run("--force", "--coco", tmp_path / "coco")
    assert done.returncode == 0, done.stderr
    assert f"{labels}: 1 file written" in done.stdout and "split: written to" in done.stdout
    table = done.stdout.split("val: 2 images")[1].split()
    assert table[table.index("Car") :][:5] == ["Car", "3", "2", "2", "2"]
    assert "val: 1 image of mode L, converted by Detectron2\n" in done.stdout
    assert len(json.loads((tmp_path / "coco/kitti_val.json").read_text())["images"]) == 2


def test_progress_is_shown(root, project, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "FIRST_SECONDS", 0)
    labels = archive(tmp_path / "labels.zip", LABELS)
    arguments = ["prepare_kitti.py", "--root", str(root), "--archives", str(labels), "--force"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(project / "tools" / "prepare_kitti.py"), run_name="__main__")
    assert end.value.code == 0
    lines = capsys.readouterr().err.splitlines()
    starts = {line.partition(", ")[0] for line in lines}
    assert {"labels.zip: files looked for: 1 of 1", "labels.zip: files written: 1 of 1"} <= starts
    checked = [len(load_kitti(root, split)) for split in ("train", "val")]
    assert {f"{s}: images checked: {n} of {n}" for s, n in zip(("train", "val"), checked)} <= starts
