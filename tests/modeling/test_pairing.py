"""Levels are paired by name and stride; pairs that do not match are refused."""

import pytest
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from tiny import detector_config

from gkd_d2.config import YacsSpec
from gkd_d2.modeling.pairing import channels_swapped, check_classes, check_pair, pair_levels
from gkd_d2.modeling.split import split_detector


@pytest.fixture(scope="module")
def faster():
    return split_detector(build_model(detector_config("faster")))


@pytest.fixture(scope="module")
def retinanet():
    return split_detector(build_model(detector_config("retinanet")))


def test_default_levels(faster, retinanet):
    assert pair_levels(faster, faster, [], []) == (["p2", "p3", "p4", "p5"],) * 2
    assert pair_levels(retinanet, retinanet, [], []) == (["p3", "p4", "p5", "p6", "p7"],) * 2
    # p6 of a Faster R-CNN is a pooled copy of p5, so it is no partner of RetinaNet's p6.
    assert pair_levels(faster, retinanet, [], []) == (["p3", "p4", "p5"],) * 2
    assert pair_levels(retinanet, faster, [], []) == (["p3", "p4", "p5"],) * 2


def test_chosen_levels(faster, retinanet):
    assert pair_levels(faster, faster, ["p4", "p6"], []) == (["p4", "p6"], ["p4", "p6"])
    assert pair_levels(faster, retinanet, ["p4"], ["p4"]) == (["p4"], ["p4"])


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        (["p2"], [], "GKD.TEACHER.FEATURES names p2, but the heads use p3, p4, p5, p6, p7 only"),
        (["p9"], ["p4"], "GKD.FEATURES names p9, but the heads use p2"),
        (["p3"], ["p4"], "student's p3 has stride 8, the teacher's p4 has stride 16"),
        (["p3", "p4"], ["p3"], "GKD.FEATURES has 2 levels, p3, p4, but GKD.TEACHER.FEATURES has 1"),
        (["p3", "p3"], [], "names a level twice"),
        ([], ["p3"], "GKD.FEATURES must name the student's level"),
    ],
)
def test_levels_that_do_not_match(faster, retinanet, ours, theirs, message):
    with pytest.raises(ValueError, match=message):
        pair_levels(faster, retinanet, ours, theirs)


def test_no_common_level(faster):
    cfg = detector_config("retinanet")
    cfg.MODEL.RETINANET.IN_FEATURES = ["p6", "p7"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[128], [256]]
    with pytest.raises(ValueError, match="share no level"):
        pair_levels(faster, split_detector(build_model(cfg)), [], [])


def test_other_number_of_classes(faster):
    teacher_cfg = detector_config("faster")
    teacher_cfg.MODEL.ROI_HEADS.NUM_CLASSES = 4
    with pytest.raises(ValueError, match="student detects 3 classes, the teacher 4"):
        check_pair(faster, split_detector(build_model(teacher_cfg)))


def spec(*train_sets):
    cfg = detector_config("faster")
    cfg.DATASETS.TRAIN = train_sets
    return YacsSpec(cfg)


def test_same_number_of_other_classes(faster):
    MetadataCatalog.get("pairing_cars").thing_classes = ["Car", "Pedestrian", "Cyclist"]
    MetadataCatalog.get("pairing_pets").thing_classes = ["cat", "dog", "fish"]
    with pytest.raises(ValueError, match="Car, Pedestrian, Cyclist.*cat, dog, fish"):
        check_classes(faster, spec("pairing_cars"), spec("pairing_pets"), ())
    # Without registered names the number decides.
    check_classes(faster, spec("pairing_cars"), spec("pairing_not_registered"), ())


def test_a_dataset_of_another_number_of_classes(faster):
    MetadataCatalog.get("pairing_four").thing_classes = ["a", "b", "c", "d"]
    with pytest.raises(ValueError, match=r"detects 3 classes, but dataset pairing_four has 4 classes \(a, b, c, d\)"):
        check_classes(faster, spec(), spec(), ("pairing_four",))


def test_classes_of_annotation_files_that_are_not_loaded_yet(faster, coco_dataset):
    for name, classes in (("a", ("car", "dog", "bus")), ("b", ("Car", "Dog", "Bus")), ("c", ("dog", "car", "bus"))):
        coco_dataset(f"pairing_{name}", classes=classes)
    check_classes(faster, spec("pairing_a"), spec("pairing_b"), ())
    with pytest.raises(ValueError, match="pairing_a has the classes car, dog, bus, .* pairing_c has dog, car, bus: "):
        check_classes(faster, spec("pairing_a"), spec("pairing_b", "pairing_c"), ())


@pytest.mark.parametrize(
    ("pair", "swapped"), [("BGR BGR", False), ("RGB BGR", True), ("BGR RGB", True), ("L L", False)]
)
def test_orders_of_channels(pair, swapped):
    assert channels_swapped(*pair.split()) == swapped


def test_formats_that_are_no_orders_of_the_same_channels():
    with pytest.raises(ValueError, match="given images in BGR, which can't be made into the teacher's YUV-BT.601"):
        channels_swapped("BGR", "YUV-BT.601")


def test_other_number_of_channels(faster):
    cfg = detector_config("faster")
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [100.0], [1.0]
    with pytest.raises(ValueError, match="student's images have 3 channels, the teacher's 1 .*PIXEL_MEAN"):
        check_pair(faster, split_detector(build_model(cfg)))
