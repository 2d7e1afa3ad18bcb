"""Plots of hand-written runs."""

import json
from functools import partial

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode
from PIL import Image

from gkd_d2.analysis.plots import plot_curves, plot_detections


def test_curves_have_a_panel_for_ap_and_for_every_loss(runs, tmp_path):
    plot_curves(runs, "val", tmp_path / "curves.png", columns=3)
    # AP, total_loss and three terms: two rows.
    with Image.open(tmp_path / "curves.png") as picture:
        picture.load()
        # Versions of matplotlib round a pixel up or down.
        assert picture.width == pytest.approx(1020, abs=1)
        assert picture.height == round(100 * (2 * 2.6 + 5 * 0.3))


def test_ground_truth_is_drawn_in_either_form_of_box(runs, tmp_path, request):
    Image.new("RGB", (100, 60)).save(tmp_path / "image.png")
    boxes = {BoxMode.XYWH_ABS: [20, 10, 60, 30], BoxMode.XYXY_ABS: [20, 10, 80, 40]}
    pictures = []
    for mode, box in boxes.items():
        annotation = {"bbox": box, "bbox_mode": mode, "category_id": 1, "iscrowd": 0}
        record = {"file_name": str(tmp_path / "image.png"), "image_id": 1, "annotations": [annotation]}
        name = f"boxes_{mode.name}"
        DatasetCatalog.register(name, lambda record=record: [record])
        request.addfinalizer(partial(DatasetCatalog.pop, name))
        run = runs[0]
        run.config.defrost()
        run.config.DATASETS.TEST = (name,)
        results = run.folder / "inference" / name / "coco_instances_results.json"
        results.parent.mkdir(parents=True)
        found = {"image_id": 1, "category_id": 1, "score": 0.9, "bbox": [20, 10, 60, 30]}
        results.write_text(json.dumps([found, found | {"score": 0.4, "bbox": [0, 0, 9, 9]}]))
        plot_detections([run], name, tmp_path / f"{name}.png", images=1)
        with Image.open(tmp_path / f"{name}.png") as picture:
            pictures.append(np.asarray(picture.convert("RGB")))
    assert (pictures[0] == pictures[1]).all()
    # In the class's colour: the object, and beside it the one detection whose score is high enough.
    green = (pictures[0] == [44, 160, 44]).all(axis=-1)
    left, right = np.split(green, 2, axis=1)
    assert 100 < left.sum() == pytest.approx(right.sum(), rel=0.05)
