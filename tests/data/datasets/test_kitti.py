"""The KITTI loader: what it reads, what it refuses, and what COCO's evaluation makes of its records."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_json
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, BoxMode, Instances
from kitti_folder import CAR, CYCLIST, DONT_CARE, PEDESTRIAN, SIZE, VAN, write_kitti
from PIL import Image

from gkd_d2.data import register_kitti
from gkd_d2.data.datasets.kitti import (
    check_kitti_root,
    check_kitti_testing,
    load_kitti,
    load_kitti_testing,
    split_by_hash,
)
from gkd_d2.data.datasets.kitti_labels import CLASSES

# Of the ids 000000 to 000009, those with the largest SHA-256, computed outside the project. Another split by hash would
# silently move users' images between training and validation.
EXPECTED_VAL = ["000002", "000008"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    labels = {
        "000007": "\n".join([CAR, PEDESTRIAN, CYCLIST, VAN, DONT_CARE]) + "\n",
        "000003": "",
        "000009": CAR + "\n",
    }
    return write_kitti(tmp_path / "data", labels, {"train": "000007\n000003\n", "val": "000009\n"})


def test_records(root: Path) -> None:
    records = load_kitti(root, "train")
    assert [record["image_id"] for record in records] == ["000007", "000003"]  # the list's order
    record = records[0]
    assert record["file_name"] == str(root / "training/image_2/000007.png")
    assert (record["width"], record["height"]) == SIZE
    expected = [
        ([10, 20, 60, 50], 0, 0),
        ([100, 10, 120, 70], 1, 0),
        ([130, 10, 150, 50], 2, 0),
        *[([80, 60, 99, 90], category, 1) for category in range(3)],
        *[([155, 5, 195, 45], category, 1) for category in range(3)],
    ]
    found = [(ann["bbox"], ann["category_id"], ann["iscrowd"]) for ann in record["annotations"]]
    assert found == expected
    assert all(ann["bbox_mode"] == BoxMode.XYXY_ABS for ann in record["annotations"])
    # for the official metric: each line once, with its own type
    assert [(obj["type"], obj["truncation"], obj["occlusion"]) for obj in record["kitti_objects"]] == [
        ("Car", 0.0, 0),
        ("Pedestrian", 0.25, 1),
        ("Cyclist", 0.0, 2),
        ("Van", 0.0, 0),
        ("DontCare", -1.0, -1),
    ]
    assert records[1]["annotations"] == [] and records[1]["kitti_objects"] == []


def test_jpg_windows_line_ends_and_a_last_line_without_end(tmp_path: Path) -> None:
    labels = {"a": f"{CAR}\r\n{VAN}", "b": CAR}
    root = write_kitti(tmp_path, labels, {"train": "a\r\n", "val": "b"}, suffix=".jpg")
    record = load_kitti(root, "train")[0]
    assert [obj["type"] for obj in record["kitti_objects"]] == ["Car", "Van"]
    assert record["file_name"].endswith("a.jpg")
    assert [record["image_id"] for record in load_kitti(root, "val")] == ["b"]


@pytest.mark.parametrize(
    ("train", "val", "kind", "place", "message"),
    [
        ("000007\n000004\n", "000009\n", FileNotFoundError, "train.txt:2: ", "id '000004' has no image"),
        ("000007\n\n000003\n", "000009\n", ValueError, "train.txt:2: ", "a blank line"),
        ("000007\n000003\n000007\n", "000009\n", ValueError, "train.txt:3: ", "listed already at .*train.txt:1"),
        ("000007\n", "000009\n000007\n", ValueError, "val.txt:2: ", "id '000007' is listed already at .*train.txt:1"),
        ("", "000009\n", ValueError, "train.txt: ", "the list is empty"),
    ],
)
def test_a_wrong_list_is_named(root: Path, train: str, val: str, kind: type, place: str, message: str) -> None:
    write_kitti(root, {}, {"train": train, "val": val})
    with pytest.raises(kind, match=message) as error:
        load_kitti(root, "train")
    assert str(error.value).startswith(f"{root}/ImageSets/{place}")


def test_an_image_without_labels(root: Path) -> None:
    (root / "training/label_2/000003.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"train.txt:2: id '000003' has no labels: .*label_2/000003.txt"):
        load_kitti(root, "train")


@pytest.mark.parametrize("suffix", [".PNG", ".JPG", ".jpeg", ".Jpg"])
def test_images_of_any_usual_suffix(root: Path, suffix: str) -> None:
    (root / "training/image_2/000003.png").unlink()
    Image.new("RGB", SIZE).save(root / f"training/image_2/000003{suffix}")
    assert load_kitti(root, "train")[1]["file_name"] == str(root / f"training/image_2/000003{suffix}")
    (root / "testing/image_2").mkdir(parents=True)
    for image_id in ("000000", "000001"):
        Image.new("RGB", SIZE).save(root / f"testing/image_2/{image_id}{suffix}")
    check_kitti_testing(root)
    assert [record["image_id"] for record in load_kitti_testing(root)] == ["000000", "000001"]
    Image.new("RGB", SIZE).save(root / "testing/image_2/000001.png")
    with pytest.raises(ValueError, match="its id has two images, keep one"):
        load_kitti_testing(root)


def test_two_images_of_one_id(root: Path) -> None:
    Image.new("RGB", SIZE).save(root / "training/image_2/000003.jpg")
    with pytest.raises(ValueError, match=r"train.txt:2: id '000003' has two images.*000003.jpg.*000003.png"):
        load_kitti(root, "train")


def test_an_unreadable_image(root: Path) -> None:
    path = root / "training/image_2/000003.png"
    path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match="not a readable image") as error:
        load_kitti(root, "train")
    assert str(error.value).startswith(f"{path}: ")


def test_an_unknown_split(root: Path) -> None:
    with pytest.raises(ValueError, match="split is 'test'"):
        load_kitti(root, "test")


@pytest.mark.parametrize("remove", ["", "training/image_2", "training/label_2"])
@pytest.mark.parametrize("function", [check_kitti_root, lambda root: load_kitti(root, "train")])
def test_a_missing_folder_says_what_to_do(root: Path, monkeypatch, remove: str, function) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", "/my/data")
    (root / remove).rename(root.parent / "moved")
    with pytest.raises(FileNotFoundError) as error:
        function(root)
    for part in (f"no KITTI dataset at {root}", remove, "'/my/data'", "DETECTRON2_DATASETS", "tools/make_toy_kitti.py"):
        assert part in str(error.value)


def test_an_empty_folder_is_no_dataset(root: Path) -> None:
    for path in (root / "training/image_2").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"training/image_2 holds no .png, .jpg or .jpeg file"):
        check_kitti_root(root)


@pytest.mark.parametrize("missing", ["train", "val"])
def test_half_a_split(root: Path, missing: str) -> None:
    (root / "ImageSets" / f"{missing}.txt").unlink()
    with pytest.raises(FileNotFoundError, match=f"ImageSets/{missing}.txt is missing"):
        check_kitti_root(root)


def test_split_by_hash() -> None:
    ids = [f"{number:06d}" for number in range(10)]
    expected_train = [image_id for image_id in ids if image_id not in EXPECTED_VAL]
    assert split_by_hash(reversed(ids)) == {"train": expected_train, "val": EXPECTED_VAL}
    sizes = {n: len(split_by_hash(map(str, range(n)))["train"]) for n in (2, 5, 11, 7481)}
    assert sizes == {2: 1, 5: 4, 11: 8, 7481: 5984}


def test_without_lists_the_split_is_by_hash(tmp_path: Path) -> None:
    ids = [f"{number:06d}" for number in range(10)]
    root = write_kitti(tmp_path, dict.fromkeys(ids, CAR))
    assert [record["image_id"] for record in load_kitti(root, "val")] == EXPECTED_VAL
    assert len(load_kitti(root, "train")) == 8
    (root / "training/image_2/000004.png").unlink()  # its label file still speaks of it
    with pytest.raises(FileNotFoundError, match="'000004' has no image"):
        for split in ("train", "val"):
            load_kitti(root, split)


def test_one_image_is_too_few_for_a_split(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train would be empty"):
        load_kitti(write_kitti(tmp_path, {"000000": CAR}), "val")


def test_the_summary_leaves_nothing_out(root: Path, caplog) -> None:
    write_kitti(root, {"000011": CAR})  # in no list
    with caplog.at_level(logging.INFO, logger="gkd_d2.data.datasets.kitti"):
        load_kitti(root, "train")
    text = caplog.text
    assert "images: 2 (1 without an object of the classes; 1 of the folder are in no list)" in text
    assert "objects: Car 1, Pedestrian 1, Cyclist 1" in text
    assert "ignored regions: Van 1, Truck 0, Person_sitting 0, Tram 0, Misc 0, DontCare 1" in text


def test_ignored_regions_are_no_training_targets(root: Path) -> None:
    mapper = DatasetMapper(is_train=True, augmentations=[], image_format="BGR")
    instances = mapper(load_kitti(root, "train")[0])["instances"]
    assert instances.gt_classes.tolist() == [0, 1, 2]
    assert instances.gt_boxes.tensor[0].tolist() == [10, 20, 60, 50]


@pytest.fixture
def dataset(root: Path):
    """The folder's train split under a name of its own."""
    register_kitti("kitti_under_test", root)
    yield "kitti_under_test_train"
    for split in ("train", "val"):
        DatasetCatalog.remove(f"kitti_under_test_{split}")
        MetadataCatalog.remove(f"kitti_under_test_{split}")


def average_precision(dataset: str, output: Path, detections: list[tuple[list[float], int, float]]) -> dict[str, float]:
    """COCO's AP where all detections (box, class, score) are in the first image."""
    evaluator = COCOEvaluator(dataset, tasks=("bbox",), distributed=False, output_dir=str(output), use_fast_impl=False)
    evaluator.reset()
    for number, record in enumerate(load_kitti(MetadataCatalog.get(dataset).kitti_root, "train")):
        found = detections if number == 0 else []
        instances = Instances((record["height"], record["width"]))
        instances.pred_boxes = Boxes(torch.tensor([box for box, _, _ in found], dtype=torch.float32).reshape(-1, 4))
        instances.pred_classes = torch.tensor([category for _, category, _ in found], dtype=torch.int64)
        instances.scores = torch.tensor([score for _, _, score in found], dtype=torch.float32)
        evaluator.process([record], [{"instances": instances}])
    return evaluator.evaluate()["bbox"]


PERFECT = [([10, 20, 60, 50], 0, 0.9), ([100, 10, 120, 70], 1, 0.9), ([130, 10, 150, 50], 2, 0.9)]


def test_perfect_detections_give_100(dataset: str, tmp_path: Path) -> None:
    result = average_precision(dataset, tmp_path / "out", PERFECT)
    assert [result[key] for key in ("AP", *(f"AP-{name}" for name in CLASSES))] == pytest.approx([100] * 4)


@pytest.mark.parametrize("box", [[160, 10, 190, 40], [155, 5, 195, 45], [82, 62, 98, 88]])
@pytest.mark.parametrize("category", range(3))
def test_a_detection_in_an_ignored_region_costs_nothing(dataset: str, tmp_path: Path, box, category: int) -> None:
    result = average_precision(dataset, tmp_path / "out", [*PERFECT, (box, category, 0.99)])
    assert result["AP"] == pytest.approx(100)


@pytest.mark.parametrize("category", range(3))
def test_a_false_detection_elsewhere_costs(dataset: str, tmp_path: Path, category: int) -> None:
    result = average_precision(dataset, tmp_path / "out", [*PERFECT, ([10, 60, 40, 90], category, 0.99)])
    # the one object of the class is found second: precision 1/2 at every recall
    assert result[f"AP-{CLASSES[category]}"] == pytest.approx(50)


def test_a_missed_ignored_region_costs_nothing_and_a_missed_object_does(dataset: str, tmp_path: Path) -> None:
    result = average_precision(dataset, tmp_path / "out", PERFECT[:2])
    assert (result["AP-Car"], result["AP-Pedestrian"], result["AP-Cyclist"]) == pytest.approx((100, 100, 0))


def test_conversion_to_coco_keeps_boxes_areas_and_crowds(dataset: str, tmp_path: Path) -> None:
    path = tmp_path / "coco.json"
    convert_to_coco_json(dataset, str(path), allow_cached=False)
    annotations = json.loads(path.read_text())["annotations"]
    found = [(ann["bbox"], ann["area"], ann["iscrowd"], ann["category_id"]) for ann in annotations]
    assert found[0] == ([10, 20, 50, 30], 1500, 0, 0)
    assert found[3:6] == [([80, 60, 19, 30], 570, 1, category) for category in range(3)]


# Objects per type of the sample, as its README counts them.
SAMPLE_COUNTS = {
    "train": (65, [195, 31, 11], [22, 9, 5, 8, 4, 148]),
    "val": (16, [48, 7, 3], [5, 2, 0, 2, 1, 32]),
}


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_sample_of_real_images(split: str, kitti_sample: Path) -> None:
    records = load_kitti(kitti_sample, split)
    num_images, objects, ignored = SAMPLE_COUNTS[split]
    types = [obj["type"] for record in records for obj in record["kitti_objects"]]
    assert len(records) == num_images
    assert [types.count(name) for name in CLASSES] == objects
    kinds = ("Van", "Truck", "Person_sitting", "Tram", "Misc", "DontCare")
    assert [types.count(name) for name in kinds] == ignored
    annotations = [annotation for record in records for annotation in record["annotations"]]
    assert sum(annotation["iscrowd"] for annotation in annotations) == 3 * sum(ignored)
    for record in records:
        with Image.open(record["file_name"]) as image:
            assert image.size == (record["width"], record["height"])
