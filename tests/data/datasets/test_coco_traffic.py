"""COCO-Traffic: which images and annotations are kept, what is refused, and the registered datasets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from gkd_d2.data.datasets.builtin import check_datasets
from gkd_d2.data.datasets.coco_traffic import TRAFFIC_IDS, class_names, load_coco_traffic, prepare_coco_traffic

NAMES = {
    1: "person", 2: "bicycle", 3: "car", 4: "motorcycle", 5: "airplane", 6: "bus", 7: "train", 8: "truck", 9: "boat",
    10: "traffic light", 11: "fire hydrant", 13: "stop sign", 14: "parking meter", 15: "bench", 17: "cat", 18: "dog",
}  # fmt: skip
THIRTEEN = "person bicycle car motorcycle bus train truck traffic_light fire_hydrant stop_sign parking_meter cat dog"


def annotation(number, image, category, bbox=(1.25, 2, 30, 40), **other):
    return {
        "id": number, "image_id": image, "category_id": category, "bbox": list(bbox), "area": bbox[2] * bbox[3],
        "iscrowd": 0, "segmentation": [[1.25, 2, 31.25, 2, 31.25, 42]],
    } | other  # fmt: skip


def coco(annotations, num_images=6):
    return {
        "info": {"description": "toy"},
        "licenses": [{"id": 1, "name": "a licence"}],
        "images": [
            {"id": i, "file_name": f"{i:012d}.jpg", "width": 100, "height": 80, "license": 1}
            for i in range(num_images, 0, -1)
        ],
        "annotations": annotations,
        "categories": [{"id": i, "name": name, "supercategory": "s"} for i, name in NAMES.items()],
    }


DATA = coco(
    [
        annotation(10, 1, 3),  # image 1: a car, a person and a bench
        annotation(11, 1, 1),
        annotation(12, 1, 15),
        annotation(13, 2, 1),  # image 2: a person and a dog only
        annotation(14, 2, 18),
        annotation(15, 3, 13, bbox=(50, 60, 50.5, 20)),  # image 3: a stop sign out of its right side
        annotation(
            16, 4, 7, iscrowd=1, segmentation={"size": [80, 100], "counts": [10, 20, 7970]}
        ),  # image 4: a crowd alone
        annotation(17, 4, 17, bbox=(3, 3, 0, 5)),
        annotation(18, 5, 5),  # image 5: an airplane; image 6: nothing
    ]
)


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def prepare(tmp_path, data, classes="thirteen"):
    source = write(tmp_path / "source.json", data)
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


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    for split in ("train", "val"):
        write(tmp_path / "coco" / "annotations" / f"instances_{split}2017.json", DATA)
        (tmp_path / "coco" / f"{split}2017").mkdir()
    return tmp_path


def run(project, datasets, *arguments):
    return subprocess.run(
        [sys.executable, str(project / "tools" / "prepare_coco_traffic.py"), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"DETECTRON2_DATASETS": str(datasets), "PYTHONWARNINGS": "ignore"},
    )


def test_the_command_and_the_datasets(project, datasets):
    with pytest.raises(
        FileNotFoundError, match=r"coco_traffic/annotations/instances_val.json.*prepare_coco_traffic.py"
    ):
        check_datasets(["coco_traffic_val"])
    done = run(project, datasets)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("images: 3 of 6") == 2
    records = DatasetCatalog.get("coco_traffic_train")
    assert [(r["image_id"], len(r["annotations"])) for r in records] == [(1, 2), (3, 1), (4, 2)]
    assert records[0]["file_name"] == str(datasets / "coco" / "train2017" / "000000000001.jpg")
    metadata = MetadataCatalog.get("coco_traffic_train")
    assert [metadata.thing_classes[a["category_id"]] for a in records[0]["annotations"]] == ["car", "person"]
    assert metadata.json_file == str(datasets / "coco_traffic" / "annotations" / "instances_train.json")
    assert metadata.evaluator_type == "coco"
    check_datasets(["coco_traffic_train", "coco_traffic_val"])

    prepare_coco_traffic(
        datasets / "coco/annotations/instances_val2017.json",
        datasets / "coco_traffic9/annotations/instances_val.json",
        "nine",
    )
    assert len(DatasetCatalog.get("coco_traffic9_val")) == 3
    assert MetadataCatalog.get("coco_traffic9_val").thing_classes == class_names("nine")
    nine = datasets / "coco_traffic9/annotations/instances_val.json"
    with pytest.raises(ValueError, match="not those of COCO-Traffic with thirteen classes"):
        load_coco_traffic(nine, datasets / "coco" / "val2017", "x", "thirteen")


def test_missing_images_and_the_environment_now(datasets, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError, match="no images of COCO 2017 at .*elsewhere/coco/val2017"):
        check_datasets(["coco_traffic_val"])
    assert MetadataCatalog.get("coco_traffic_val").image_root == str(tmp_path / "elsewhere" / "coco" / "val2017")


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
