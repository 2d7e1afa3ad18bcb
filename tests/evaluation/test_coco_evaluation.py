"""Ground truth in COCO's form that trains is also evaluated, or refused beforehand."""

import logging

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from tiny import detector_config

from gkd_d2.engine.trainer import Trainer
from gkd_d2.evaluation.coco_evaluation import check_coco_ground_truth


def evaluate(dataset, folder):
    """Average precision of perfect detections of both objects, after the checks that precede a training."""
    check_coco_ground_truth(dataset, masks=False, keypoints=False)
    evaluator = Trainer.build_evaluator(detector_config("retinanet"), dataset, str(folder))
    evaluator.reset()
    for number, record in enumerate(DatasetCatalog.get(dataset)):
        found = Instances((64, 96))
        found.pred_boxes = Boxes(torch.tensor([[10.0, 10, 50, 40], [60, 10, 80, 50]]))
        found.scores, found.pred_classes = torch.tensor([0.9, 0.8]), torch.tensor([0, 1])
        evaluator.process([record], [{"instances": found if number == 0 else found[:0]}])
    return evaluator.evaluate()["bbox"]


def of_all(change):
    """Apply a change to every annotation, with its position."""

    def change_all(content):
        for position, annotation in enumerate(content["annotations"]):
            change(annotation, position)

    return change_all


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("complete", lambda content: None, None),
        ("no_iscrowd", of_all(lambda a, i: a.pop("iscrowd")), "2 annotations without iscrowd got 0"),
        ("null_iscrowd", of_all(lambda a, i: a.update(iscrowd=None)), "2 annotations without iscrowd got 0"),
        ("no_area", of_all(lambda a, i: a.pop("area")), "2 annotations without area got that of the box"),
        ("null_area", of_all(lambda a, i: a.update(area=None)), "2 annotations without area got that of the box"),
        # pycocotools takes the object 0 for one that was not found: an average precision of 50.
        ("ids_from_0", of_all(lambda a, i: a.update(id=i)), "the annotations were numbered from 1"),
        ("ids_of_text", of_all(lambda a, i: a.update(id=f"a{i}")), "the annotations were numbered from 1"),
        ("no_info", lambda content: content.pop("info"), None),
        ("image_ids_of_text", lambda content: texts(content), None),
        ("empty_segmentation", of_all(lambda a, i: a.update(segmentation=[])), None),
    ],
)
def test_what_trains_is_evaluated(coco_dataset, tmp_path, caplog, name, change, said):
    path = coco_dataset(f"evaluation_{name}", change)
    before = path.read_bytes()
    with caplog.at_level(logging.WARNING, logger="gkd_d2"):
        assert evaluate(f"evaluation_{name}", tmp_path)["AP"] == pytest.approx(100)
    warnings = [record.getMessage() for record in caplog.records if record.name.startswith("gkd_d2")]
    assert len(warnings) == (said is not None)
    assert not said or (str(path) in warnings[0] and said in warnings[0])
    assert path.read_bytes() == before


def texts(content):
    for image in content["images"]:
        image["id"] = f"image {image['id']}"
    for annotation in content["annotations"]:
        annotation["image_id"] = f"image {annotation['image_id']}"


def test_given_values_stay(coco_dataset, tmp_path):
    """Only what is absent is supplied: the sizes of objects are those of the file where it has them."""

    def change(content):
        content["annotations"][0].pop("iscrowd")
        content["annotations"][0]["area"] = 96 * 96 + 1
        content["annotations"][1].pop("area")

    coco_dataset("evaluation_partly", change)
    found = evaluate("evaluation_partly", tmp_path)
    assert (found["APl"], found["APs"]) == (pytest.approx(100), pytest.approx(100))


def test_the_warning_comes_once(coco_dataset, tmp_path, caplog):
    coco_dataset("evaluation_twice", of_all(lambda a, i: a.pop("area")))
    for _ in range(2):
        evaluate("evaluation_twice", tmp_path)
    assert sum("evaluation_twice.json" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("no_id", of_all(lambda a, i: a.pop("id")), r"annotations\[0\] has no id"),
        ("equal_ids", of_all(lambda a, i: a.update(id=5)), r"annotations\[1\]: the id 5 stands twice"),
        ("no_bbox", of_all(lambda a, i: a.pop("bbox")), r"annotations\[0\] has no bbox"),
        ("rotated", of_all(lambda a, i: a.update(bbox=[1, 2, 3, 4, 5])), r"\(id 1\): bbox is .* 4 finite numbers"),
        ("text_box", of_all(lambda a, i: a.update(bbox=["1", "2", "3", "4"])), "bbox is .* 4 finite numbers"),
        ("null_box", of_all(lambda a, i: a.update(bbox=None)), "bbox is None; it must be 4 finite numbers"),
        # Any text is a crowd region to pycocotools, even "0".
        ("text_crowd", of_all(lambda a, i: a.update(iscrowd="0")), "iscrowd is '0'; it must be 0 or 1"),
        ("text_area", of_all(lambda a, i: a.update(area="12")), "area is '12'; it must be a finite number"),
        (
            "category",
            of_all(lambda a, i: a.update(category_id=9)),
            r"\(id 1\): category_id is 9, which is the id of none",
        ),
        (
            "ignore",
            of_all(lambda a, i: a.update(ignore=1)),
            r"\(id 1\): Detectron2 does not support ignore",
        ),
        ("no_images", lambda content: content.update(images=[]), "refused_no_images.json: it has no images"),
        ("no_width", lambda content: content["images"][0].pop("width"), r"images\[0\] has no width"),
        (
            "no_categories",
            lambda content: content.pop("categories"),
            "_categories.json: it has no categories",
        ),
        ("nameless", lambda content: content["categories"][0].pop("name"), r"categories\[0\] has no name"),
    ],
)
def test_what_can_not_be_evaluated_is_refused(coco_dataset, name, change, message):
    coco_dataset(f"refused_{name}", change)
    with pytest.raises(ValueError, match=message):
        check_coco_ground_truth(f"refused_{name}", masks=False, keypoints=False)


def test_masks_and_keypoints_that_are_not_there(coco_dataset):
    coco_dataset("refused_boxes")
    with pytest.raises(ValueError, match="has no segmentation, which is needed as MODEL.MASK_ON is True"):
        check_coco_ground_truth("refused_boxes", masks=True, keypoints=False)
    with pytest.raises(ValueError, match="has no keypoints, which the evaluation needs as MODEL.KEYPOINT_ON is True"):
        check_coco_ground_truth("refused_boxes", masks=False, keypoints=True)


def test_records_without_a_file(coco_dataset):
    """They are converted for the evaluation, which needs names."""
    record = {"file_name": "1.png", "image_id": 1, "width": 96, "height": 64, "annotations": []}
    DatasetCatalog.register("refused_records", lambda: [record])
    with pytest.raises(ValueError, match="it has no thing_classes in its metadata"):
        check_coco_ground_truth("refused_records", masks=False, keypoints=False)
    MetadataCatalog.get("refused_records").thing_classes = ["car"]
    check_coco_ground_truth("refused_records", masks=False, keypoints=False)
    record["annotations"] = [{"bbox": [1, 2, 3, 4], "category_id": 0}]
    with pytest.raises(ValueError, match="can't be converted .* KeyError: 'bbox_mode'"):
        check_coco_ground_truth("refused_records", masks=False, keypoints=False)


def test_names_that_are_not_those_of_the_file(coco_dataset):
    """As of a loader of one's own."""
    path = coco_dataset("refused_file")
    DatasetCatalog.register("refused_names", lambda: DatasetCatalog.get("refused_file"))
    MetadataCatalog.get("refused_names").set(json_file=str(path), thing_classes=["car", "dog", "bus"])
    with pytest.raises(ValueError, match="3 classes in its metadata, but .* has 2 categories"):
        check_coco_ground_truth("refused_names", masks=False, keypoints=False)


def test_the_metadata_of_a_dataset_that_detectron2_loads(coco_dataset):
    """Its loader sets the classes, and Detectron2 refuses to change what is set."""
    path = coco_dataset("refused_metadata", thing_classes=["dog", "car"])
    message = f"thing_classes dog, car, but the categories of {path} are car, dog, in the order of their ids"
    with pytest.raises(ValueError, match=message):
        check_coco_ground_truth("refused_metadata", masks=False, keypoints=False)
    coco_dataset("refused_ids", thing_dataset_id_to_contiguous_id={1: 0, 3: 1})
    with pytest.raises(ValueError, match="thing_dataset_id_to_contiguous_id of its metadata is not that of"):
        check_coco_ground_truth("refused_ids", masks=False, keypoints=False)


def test_detectron2_loads_what_is_not_loaded_for_the_checks(coco_dataset):
    """The checks take the place of a load, which takes longer."""
    coco_dataset("evaluation_unloaded")
    assert check_coco_ground_truth("evaluation_unloaded", masks=False, keypoints=False).class_names == ["car", "dog"]
    assert MetadataCatalog.get("evaluation_unloaded").get("thing_classes") is None
    assert len(DatasetCatalog.get("evaluation_unloaded")) == 2


def test_a_loader_of_ones_own_for_an_annotation_file(coco_dataset):
    """It is called, and may find images in its own way."""

    path = coco_dataset("refused_own")
    path.write_text(path.read_text().replace("file_name", "url"))
    records = [{"file_name": "1.png", "image_id": 1, "width": 96, "height": 64, "annotations": []}]
    DatasetCatalog.register("evaluation_own", lambda: records)
    MetadataCatalog.get("evaluation_own").set(json_file=str(path), thing_classes=["car", "dog"])
    assert check_coco_ground_truth("evaluation_own", masks=False, keypoints=False).images == ("1.png", "1.png")
    records.clear()
    with pytest.raises(ValueError, match="it has no images"):
        check_coco_ground_truth("evaluation_own", masks=False, keypoints=False)
