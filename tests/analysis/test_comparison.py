"""Tables and pictures of hand-written runs."""

import json
from functools import partial

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode
from PIL import Image
from tiny import detector_config

from gkd_d2.analysis.comparison import Cost, find_roles, gain_table, markdown_table, notes, plot_curves, plot_detections


def evaluation(iteration, ap, ap50, **other):
    return {"iteration": iteration, "bbox/AP": ap, "bbox/AP50": ap50} | other


@pytest.fixture
def runs(make_run, distiller_config):
    """A teacher, two students alone, one distilled, and a run that has nothing to do with them."""
    distilled = distiller_config("retinanet", channels=8)
    teacher, alone, other = (detector_config("retinanet", **o) for o in ({"width": 16}, {"channels": 8}, {"width": 4}))
    for cfg in (teacher, alone, other, distilled):
        cfg.DATASETS.TEST = ("val",)
    first = {"iteration": 0, "total_loss": 3.0, "loss_cls": 2.0, "loss_box_reg": 1.0}
    last = {"iteration": 19, "total_loss": 2.0, "loss_cls": 1.5, "loss_box_reg": 0.5}
    repeated = alone.clone()
    repeated.SEED = 8
    return [
        make_run("teacher", teacher, [first, last, evaluation(20, 40.0, 60.0, **{"bbox/AP-Car": 40.0})]),
        make_run("alone", alone, [first, last, evaluation(20, 29.0, 52.0, **{"bbox/AP-Car": 29.0})]),
        make_run("again", repeated, [first, last, evaluation(20, 31.0, 50.0, **{"bbox/AP-Car": 31.0})]),
        make_run(
            "distilled",
            distilled,
            [first, last | {"loss_gkd_gradient": 0.25}, evaluation(20, 34.0, 50.5, **{"kitti/AP_moderate": 22.25})],
        ),
        make_run("other", other, [first, last, evaluation(20, 1.0, float("nan"))]),
    ]


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_roles(runs):
    assert find_roles(runs) == {
        "teacher": "teacher",
        "alone": "student alone",
        "again": "student alone",
        "distilled": "student distilled",
        "other": "",
    }


def test_table_has_a_column_for_what_was_measured(runs):
    costs = {run.name: Cost(12_345_678) for run in runs} | {"alone": Cost(1_000_000, 1.234, 56.78)}
    header, _, *rows = cells(markdown_table(runs, "val", roles=find_roles(runs), costs=costs))
    columns = ["", "role", "AP", "AP50", "KITTI AP moderate", "AP Car"]
    assert header == [*columns, "parameters (M)", "GFLOPs", "ms an image", "iterations"]
    assert rows[1] == ["alone", "student alone", "29.0", "52.0", "–", "29.0", "1.00", "1.23", "56.8", "20"]
    assert rows[3] == ["distilled", "student distilled", "34.0", "50.5", "22.2", "–", "12.35", "–", "–", "20"]
    assert rows[4][2:5] == ["1.0", "nan", "–"]
    header, _, *rows = cells(markdown_table(runs[:2], "val"))
    assert header == ["", "AP", "AP50", "AP Car", "iterations"]


def test_gains_by_hand(runs):
    """AP: 34 over the mean of 29 and 31, 4 of the 10 that the teacher is better. AP50: 50.5 over 51."""
    header, _, *rows = cells(gain_table(runs, "val"))
    assert header == ["", "metric", "distilled", "alone", "gain", "teacher", "of the gap to the teacher"]
    assert rows == [
        ["distilled", "AP", "34.0", "30.0", "+4.0", "40.0", "40 %"],
        ["distilled", "AP50", "50.5", "51.0", "-0.5", "60.0", "-6 %"],
    ]
    # A teacher that is no better than the student alone leaves no gap.
    teacher, alone, _, distilled, _ = runs
    teacher.history[20]["bbox/AP"] = 29.0
    assert cells(gain_table([teacher, alone, distilled], "val"))[2][-2:] == ["29.0", "–"]
    assert cells(gain_table([alone, distilled], "val"))[2][-2:] == ["–", "–"]
    assert gain_table([teacher, distilled], "val") == ""


def test_notes_say_what_is_compared_and_what_else_differs(runs):
    assert notes(runs) == [
        "distilled: the method is gkd; alone is the mean of alone, again; teacher is teacher.",
        "distilled and again were configured differently beside distillation: SEED 7 here, 8 there.",
    ]
    assert notes([runs[3]]) == ["distilled: no run here trained the same MODEL alone, so its gain is not known."]


def test_curves_have_a_panel_for_ap_and_for_every_loss(runs, tmp_path):
    plot_curves(runs, "val", tmp_path / "curves.png", columns=3)
    # AP, total_loss and three terms: two rows.
    with Image.open(tmp_path / "curves.png") as picture:
        picture.load()
        assert picture.width == 1020
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
