"""Datasets that several tests of data load."""

from __future__ import annotations

import numpy as np
import pytest
from coco_2017 import DATA, write_json
from detectron2.data import DatasetCatalog
from PIL import Image
from tiny import detector_config

# Width and height: 7 wide images, 5 tall ones.
SIZES = [(60, 40)] * 5 + [(40, 60)] * 4 + [(50, 30)] * 2 + [(40, 40)]


@pytest.fixture
def records(tmp_path):
    """Dataset dicts of 12 images, registered as "loader_test"; a test may change them."""
    generator = np.random.default_rng(0)
    made = []
    for number, (width, height) in enumerate(SIZES):
        path = tmp_path / f"{number}.png"
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        box = {"bbox": [5, 5, 30, 20], "bbox_mode": 0, "category_id": 0}
        made.append(
            {"file_name": str(path), "image_id": number, "width": width, "height": height, "annotations": [box]}
        )
    DatasetCatalog.register("loader_test", lambda: made)
    yield made
    DatasetCatalog.remove("loader_test")


@pytest.fixture
def cfg(records):
    """Batches of 2 with random sizes and flips, loaded in the trainer's own process."""
    cfg = detector_config("retinanet")
    cfg.DATASETS.TRAIN = ("loader_test",)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.INPUT.MIN_SIZE_TRAIN = (24, 32, 40)
    return cfg


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    """A folder of datasets, which holds COCO 2017 without its pictures."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    for split in ("train", "val"):
        write_json(tmp_path / "coco" / "annotations" / f"instances_{split}2017.json", DATA)
        (tmp_path / "coco" / f"{split}2017").mkdir()
    return tmp_path
