"""The classes of a dataset are found whatever way it was registered."""

import json

import pytest
from coco_json import COCO
from detectron2.data import DatasetCatalog, MetadataCatalog

from gkd_d2.data.classes import class_names, known_class_names


def test_in_the_annotation_file_before_it_is_loaded(coco_dataset):
    def change(content):
        # In another order, with gaps between the ids and with the annotations after them.
        content["categories"] = [{"id": 7, "name": "dog"}, {"id": 3, "name": "car"}, {"id": 90, "name": "bus"}]
        content["annotations"] = content.pop("annotations")
        for annotation in content["annotations"]:
            annotation["category_id"] = 7

    coco_dataset("classes_file", change)
    assert class_names("classes_file") == ["car", "dog", "bus"]
    # Nothing was loaded for it.
    assert MetadataCatalog.get("classes_file").get("thing_classes") is None
    DatasetCatalog.get("classes_file")
    assert MetadataCatalog.get("classes_file").thing_classes == ["car", "dog", "bus"]


def test_a_changed_file_is_read_again(coco_dataset):
    path = coco_dataset("classes_changed")
    assert class_names("classes_changed") == ["car", "dog"]
    path.write_text(json.dumps(COCO | {"categories": [{"id": 1, "name": "lorry"}]}))
    assert class_names("classes_changed") == ["lorry"]


def test_in_the_metadata_without_reading_a_file(coco_dataset):
    coco_dataset("classes_metadata", thing_classes=["a", "b", "c"]).unlink()
    assert class_names("classes_metadata") == ["a", "b", "c"]
    assert class_names("coco_2017_train")[0] == "person"


def test_after_loading_a_dataset_of_records(coco_dataset):
    def load():
        MetadataCatalog.get("classes_records").thing_classes = ["a", "b"]
        return []

    DatasetCatalog.register("classes_records", load)
    assert class_names("classes_records") == ["a", "b"]
    loaded = []
    DatasetCatalog.register("classes_nameless", lambda: loaded.append(1) or [])
    assert class_names("classes_nameless") is class_names("classes_nameless") is None and loaded == [1]


def test_unknown(coco_dataset):
    assert class_names("classes_of_nobody") is None
    assert "classes_of_nobody" not in MetadataCatalog.list()
    path = coco_dataset("classes_absent")
    path.unlink()
    with pytest.raises(FileNotFoundError):
        class_names("classes_absent")
    assert known_class_names("classes_absent") is None


@pytest.mark.parametrize(
    ("categories", "message"),
    [
        ([{"id": 1}], r"classes_wrong.json: categories\[0\] is {'id': 1}; it must be an object with id and name"),
        ([{"id": 1, "name": "a"}, {"id": "b", "name": "b"}], "the ids of its categories are of several types"),
    ],
)
def test_wrong_categories(coco_dataset, categories, message):
    coco_dataset("classes_wrong", lambda content: content.update(categories=categories))
    with pytest.raises(ValueError, match=message):
        class_names("classes_wrong")


def test_a_file_that_is_no_json(coco_dataset):
    coco_dataset("classes_broken").write_text("version https://git-lfs")
    with pytest.raises(ValueError, match="classes_broken.json: no valid JSON"):
        class_names("classes_broken")
