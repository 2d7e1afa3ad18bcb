"""Preparing COCO-Traffic: which images and annotations are kept, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from coco_2017 import DATA, NAMES, annotation, coco, write_json

from gkd_d2.data.datasets.builtin import check_datasets
from gkd_d2.data.datasets.coco_traffic import TRAFFIC_IDS, class_names, load_coco_traffic
from gkd_d2.data.prepare.coco_traffic import prepare_coco_traffic

THIRTEEN = "person bicycle car motorcycle bus train truck traffic_light fire_hydrant stop_sign parking_meter cat dog"


def prepare(tmp_path, data, classes="thirteen"):
    source = write_json(tmp_path / "source.json", data)
    summary = prepare_coco_traffic(source, tmp_path / "out" / "target.json", classes)
    return summary, json.loads((tmp_path / "out" / "target.json").read_text())


def test_what_is_kept(tmp_path):
    summary, made = prepare(tmp_path, DATA)
    assert [image["id"] for image in made["images"]] == [4, 3, 1]  # the source's order
    assert made["images"][2] == DATA["images"][5]
    assert [(a["id"], a["image_id"], a["category_id"]) for a in made["annotations"]] == [
        (10, 1, 3),
        (11, 1, 1),
        (15, 3, 10),
        (16, 4, 6),
        (17, 4, 12),
    ]
    unchanged = {key: value for key, value in DATA["annotations"][6].items() if key != "category_id"}
    assert {key: value for key, value in made["annotations"][3].items() if key != "category_id"} == unchanged
    assert [(c["id"], c["name"].replace(" ", "_")) for c in made["categories"]] == list(
        enumerate(THIRTEEN.split(), start=1)
    )
    assert made["licenses"] == DATA["licenses"]
    assert (summary.num_images, summary.num_source_images) == (3, 6)
    assert (summary.num_crowds, summary.num_without_area, summary.num_clipped) == (1, 1, 1)
    assert list(summary.objects) == class_names("thirteen")
    assert summary.objects["car"] == summary.images["person"] == 1 and summary.objects["truck"] == 0
    assert "  stop sign: 1 object in 1 image" in summary.text()
    assert "images: 3 of 6" in summary.text()


def test_nine_classes(tmp_path):
    summary, made = prepare(tmp_path, DATA, "nine")
    assert [image["id"] for image in made["images"]] == [4, 3, 1]
    assert [(a["id"], a["category_id"]) for a in made["annotations"]] == [(10, 2), (15, 9), (16, 5)]
    assert [c["name"] for c in made["categories"]] == [NAMES[i] for i in TRAFFIC_IDS] == class_names("nine")


def test_the_same_bytes_again_and_nothing_left_behind(tmp_path):
    prepare(tmp_path, DATA)
    first = (tmp_path / "out" / "target.json").read_bytes()
    prepare(tmp_path, DATA)
    assert (tmp_path / "out" / "target.json").read_bytes() == first
    with pytest.raises(ValueError, match="bbox"):
        prepare(tmp_path, coco([annotation(1, 1, 3), annotation(2, 1, 3) | {"bbox": [1, 2, 3]}]))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["target.json"]
    assert (tmp_path / "out" / "target.json").read_bytes() == first


def changed(**change):
    return json.dumps(coco([annotation(9, 1, 3), annotation(10, 1, 3) | change]))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (changed(image_id=7), r"annotations\[1\] \(id 10\): image_id is 7; it has to be among the file's own ids"),
        (changed(category_id=99), r"annotations\[1\] \(id 10\): category_id is 99"),
        (changed(category_id="3"), r"category_id is '3'; it has to be an integer"),
        (changed(id=9), "id 9 stands twice among the annotations"),
        (changed(id=True), "id is True; it has to be an integer"),
        (changed(bbox=[1, 2, 3]), "bbox is .* 4 finite numbers"),
        (changed(bbox=[1, 2, "3", 4]), "4 finite numbers"),
        (changed(bbox=[1, 2, 3, 1e300]), "4 finite numbers"),
        (changed(bbox=[1, 2, 3, float("nan")]), "no valid JSON"),
        (changed(bbox=[1, 2, 3, float("inf")]), "no valid JSON"),
        (changed(bbox=[1, 2, -3, 4]), "without a negative size"),
        (changed(bbox=[90, 2, 30, 4]), r"bbox is \[90, 2, 30, 4\], outside its image 1 of 100 x 80 pixels"),
        (changed(bbox=[-11, 2, 30, 4]), "outside its image"),
        (changed(iscrowd=2), "iscrowd is 2; it has to be 0 or 1"),
        (changed(area=-1), "area is -1"),
        (changed(area=None), "area is None"),
        (changed(segmentation="x"), "segmentation is 'x'"),
        (changed(segmentation=[[1, "a"]]), "polygons of finite numbers"),
        (changed(segmentation={"size": [1, 2], "counts": "x"}), "segmentation's size"),
        (changed(segmentation={"size": [80, 100], "counts": [5]}), "run lengths of the whole image"),
        (changed(keypoints=["x"]), "keypoints"),
        (coco([3]), r"annotations\[0\] is 3, not an object"),
        (coco([]), "no array 'annotations'"),
        (coco([annotation(1, 1, 1)]), "no image has an object of the traffic classes"),
        (coco([annotation(1, 1, 3)]) | {"images": 5}, "no array 'images'"),
        (coco([annotation(1, 1, 3)]) | {"categories": [{"id": 1, "name": "person"}]}, "category 2 is None.*'bicycle'"),
        (coco([annotation(1, 1, 3)]) | {"categories": [{"id": 1}]}, r"categories\[0\] \(id 1\): name is missing"),
        (coco([annotation(1, 1, 3)]) | {"images": [{"id": 1, "width": 0}]}, "width is 0; it has to be a positive"),
        ("[]", "no array 'categories'"),
        ("", "no valid JSON"),
        ('{"categories": [{"id": 1, "name": "p', "no valid JSON"),
        ("[" * 100000, "nested more than 32 deep at byte 32"),
    ],
)
def test_what_is_refused(tmp_path, data, message):
    with pytest.raises(ValueError, match=message) as error:
        prepare(tmp_path, data)
    assert str(error.value).startswith(f"{tmp_path / 'source.json'}: ")


def test_the_command(run_tool, datasets):
    with pytest.raises(
        FileNotFoundError, match=r"coco_traffic/annotations/instances_val.json.*prepare_coco_traffic.py"
    ):
        check_datasets(["coco_traffic_val"])
    said = run_tool("prepare_coco_traffic.py", DETECTRON2_DATASETS=str(datasets))
    assert said.count("images: 3 of 6") == 2
    check_datasets(["coco_traffic_train", "coco_traffic_val"])


def test_the_sample_of_real_annotations(coco_sample, tmp_path):
    """Counts by the sample's own README."""
    for split, num_images, cars in (("train", 25, (46, 12)), ("val", 24, (24, 10))):
        source = next(Path(coco_sample).rglob(f"instances_{split}.json"))
        summary = prepare_coco_traffic(source, tmp_path / "t.json")
        assert summary.num_images == num_images
        assert (summary.objects["car"], summary.images["car"]) == cars
        records = load_coco_traffic(tmp_path / "t.json", coco_sample / "images", f"sample_{split}", "thirteen")
        assert len(records) == num_images
        assert all(Path(record["file_name"]).is_file() for record in records)
