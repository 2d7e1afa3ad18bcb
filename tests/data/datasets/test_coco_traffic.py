"""The registered datasets of COCO-Traffic, and what their loader refuses."""

from __future__ import annotations

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from gkd_d2.data.datasets.builtin import check_datasets
from gkd_d2.data.datasets.coco_traffic import class_names, load_coco_traffic
from gkd_d2.data.prepare.coco_traffic import prepare_coco_traffic


def prepare(datasets, folder, split, classes):
    """Write the annotations of a split; returns where."""
    path = datasets / folder / "annotations" / f"instances_{split}.json"
    prepare_coco_traffic(datasets / f"coco/annotations/instances_{split}2017.json", path, classes)
    return path


def test_the_thirteen_classes(datasets):
    path = prepare(datasets, "coco_traffic", "train", "thirteen")
    records = DatasetCatalog.get("coco_traffic_train")
    assert [(r["image_id"], len(r["annotations"])) for r in records] == [(1, 2), (3, 1), (4, 2)]
    assert records[0]["file_name"] == str(datasets / "coco" / "train2017" / "000000000001.jpg")
    metadata = MetadataCatalog.get("coco_traffic_train")
    assert [metadata.thing_classes[a["category_id"]] for a in records[0]["annotations"]] == ["car", "person"]
    assert metadata.json_file == str(path)
    assert metadata.evaluator_type == "coco"
    check_datasets(["coco_traffic_train"])


def test_the_nine_classes(datasets):
    path = prepare(datasets, "coco_traffic9", "val", "nine")
    assert len(DatasetCatalog.get("coco_traffic9_val")) == 3
    assert MetadataCatalog.get("coco_traffic9_val").thing_classes == class_names("nine")
    with pytest.raises(ValueError, match="not those of COCO-Traffic with thirteen classes"):
        load_coco_traffic(path, datasets / "coco" / "val2017", "x", "thirteen")


def test_missing_images_and_the_environment_now(datasets, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError, match="no images of COCO 2017 at .*elsewhere/coco/val2017"):
        check_datasets(["coco_traffic_val"])
    assert MetadataCatalog.get("coco_traffic_val").image_root == str(tmp_path / "elsewhere" / "coco" / "val2017")
