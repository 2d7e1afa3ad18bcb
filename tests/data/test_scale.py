"""The tools that prepare data, and the start of a training, on data sets of the true size: time and memory."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gkd_d2.data.datasets.coco_traffic import NAMES, TRAFFIC_IDS
from gkd_d2.data.datasets.kitti import load_kitti
from gkd_d2.data.prepare.kitti import write_split
from gkd_d2.data.toy import make_toy_kitti

pytestmark = pytest.mark.stress

# Of KITTI's training archives, and of instances_train2017.json.
KITTI_IMAGES = 7481
COCO_IMAGES, COCO_ANNOTATIONS = 118_287, 860_001
# COCO's ids of 80 categories, which leave out 10 numbers.
COCO_IDS = sorted(set(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83})
# Scenes that are drawn; the others repeat them.
SCENES = 40


def measure(title: str, *arguments, folder: Path, expected: str, project: Path) -> str:
    """Run a tool to its end, print its time and peak memory, and return its output."""
    environment = os.environ | {"DETECTRON2_DATASETS": str(folder), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(project / "tools" / arguments[0]), *map(str, arguments[1:])]
    log = folder / "output.txt"
    start = time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT)
        # Of this child and those that it waited for, unlike getrusage.
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    output = log.read_text()
    assert process.returncode == 0 and expected in output, output[-4000:]
    print(
        f"\n{title}: {seconds:.0f} s, of CPU {usage.ru_utime + usage.ru_stime:.0f} s, "
        f"peak memory {usage.ru_maxrss / 1024**2:.2f} GiB"
    )
    return output


@pytest.fixture(scope="module")
def kitti(tmp_path_factory) -> Path:
    """A folder of data sets with one of KITTI's form, as large, of drawn scenes with a camera's noise."""
    folder = tmp_path_factory.mktemp("datasets")
    make_toy_kitti(folder / "scenes", SCENES, 1, image_size=(1242, 375))
    root = folder / "kitti" / "training"
    for name in ("image_2", "label_2"):
        (root / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for scene in range(SCENES):
        source = folder / "scenes" / "training" / "image_2" / f"{scene:06d}.png"
        pixels = np.asarray(Image.open(source)).astype(np.int16)
        # Flat colours would decode several times as fast as photographs.
        noisy = np.clip(pixels + rng.integers(-3, 4, pixels.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(root / "image_2" / source.name)
    for image in range(KITTI_IMAGES):
        scene = f"{image % SCENES:06d}"
        if image >= SCENES:
            os.link(root / "image_2" / f"{scene}.png", root / "image_2" / f"{image:06d}.png")
        label = folder / "scenes" / "training" / "label_2" / f"{scene}.txt"
        os.link(label, root / "label_2" / f"{image:06d}.txt")
    return folder


def test_kitti(kitti, project):
    size = (kitti / "kitti" / "training" / "image_2" / "000000.png").stat().st_size
    print(f"\n{KITTI_IMAGES} images of 1242 x 375 pixels, {size / 1e6:.2f} MB the first of them")
    measure("prepare_kitti", "prepare_kitti.py", "--coco", "coco", folder=kitti, expected="\nval: ", project=project)
    train, val = (len(load_kitti(kitti / "kitti", split)) for split in ("train", "val"))
    assert train + val == KITTI_IMAGES and 0.75 < train / KITTI_IMAGES < 0.85
    exported = [json.loads((kitti / "coco" / f"kitti_{split}.json").read_text()) for split in ("train", "val")]
    assert [len(file["images"]) for file in exported] == [train, val]


def test_start_of_a_training(kitti, project):
    """From the command to the end of its first iteration, with the config of the teacher on KITTI but for its size."""
    write_split(kitti / "kitti")
    settings = """
        MODEL.DEVICE cpu MODEL.BACKBONE.FREEZE_AT 0 MODEL.RESNETS.NORM BN MODEL.FPN.NORM BN
        INPUT.MIN_SIZE_TRAIN (96,) SOLVER.IMS_PER_BATCH 2 SOLVER.MAX_ITER 1 DATASETS.TEST () OUTPUT_DIR run
    """.split()  # noqa: SIM905
    config = project / "configs" / "teachers" / "frcnn_kitti.yaml"
    output = measure(
        "start of a training, with its first iteration and its end",
        *("train_net.py", "--config-file", config, *settings, "MODEL.WEIGHTS", ""),
        folder=kitti,
        expected="Starting training from iteration 0",
        project=project,
    )
    assert "kitti_train" in output


def test_coco_traffic(tmp_path, project):
    source = tmp_path / "coco" / "annotations"
    source.mkdir(parents=True)
    path = source / "instances_train2017.json"
    kept = write_coco(path)
    print(
        f"\n{COCO_IMAGES} images, {COCO_ANNOTATIONS} annotations, {path.stat().st_size / 1e6:.0f} MB: "
        f"{kept} images have traffic"
    )
    output = measure(
        "prepare_coco_traffic",
        *("prepare_coco_traffic.py", "--splits", "train"),
        folder=tmp_path,
        expected=f"images: {kept} of {COCO_IMAGES}",
        project=project,
    )
    assert "objects" in output


def write_coco(path: Path) -> int:
    """Write annotations of COCO's form and number; returns how many images have one of traffic."""
    rng = random.Random(0)
    traffic = set()
    with path.open("w") as file:
        file.write('{"info":{"year":2017},"licenses":[],"images":[')
        for image in range(COCO_IMAGES):
            record = {
                "license": 3,
                "file_name": f"{image + 1:012d}.jpg",
                "coco_url": f"http://images.cocodataset.org/train2017/{image + 1:012d}.jpg",
                "height": 480,
                "width": 640,
                "date_captured": "2013-11-14 11:18:45",
                "id": image + 1,
            }
            file.write("," * (image > 0) + json.dumps(record))
        file.write('],"annotations":[')
        for number in range(COCO_ANNOTATIONS):
            image = rng.randrange(COCO_IMAGES) + 1
            category = rng.choice(COCO_IDS)
            if category in TRAFFIC_IDS:
                traffic.add(image)
            x, y, width, height = rng.randrange(500), rng.randrange(400), rng.randrange(1, 140), rng.randrange(1, 80)
            outline = [round(c + rng.random(), 2) for _ in range(10) for c in (x, y)]
            record = {
                "segmentation": [outline],
                "area": width * height / 2,
                "iscrowd": 0,
                "image_id": image,
                "bbox": [x, y, width, height],
                "category_id": category,
                "id": number + 1,
            }
            file.write("," * (number > 0) + json.dumps(record))
        categories = [{"supercategory": "thing", "id": i, "name": NAMES.get(i, f"thing {i}")} for i in COCO_IDS]
        file.write(f'],"categories":{json.dumps(categories)}}}')
    return len(traffic)
