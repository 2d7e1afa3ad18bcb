"""Datasets whose classes are not the model's, or whose evaluation would fail, are refused before a run starts."""

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from tiny import detector_config

from gkd_d2.engine.preflight import PreflightError, check_inputs

BOTH = pytest.mark.parametrize(
    ("kind", "key"), [("faster", "MODEL.ROI_HEADS.NUM_CLASSES"), ("retinanet", "MODEL.RETINANET.NUM_CLASSES")]
)


@pytest.fixture
def problems(tmp_path):
    """A function that returns the lines of the problems of a run on given datasets."""
    torch.save({"model": {}}, tmp_path / "weights.pth")

    def check(cfg, train, test, *, eval_only=False):
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = tuple(train), tuple(test)
        cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
        try:
            check_inputs(cfg, eval_only=eval_only, resume=False)
        except PreflightError as error:
            return str(error).split("\n- ")[1:]
        return []

    return check


def set_classes(cfg, number):
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = number


@BOTH
@pytest.mark.parametrize("number", [1, 3, 80])
def test_number_of_classes_of_every_dataset(coco_dataset, problems, kind, key, number):
    for name in ("checks_a", "checks_b", "checks_c"):
        coco_dataset(name)
    cfg = detector_config(kind)
    set_classes(cfg, 2)
    assert problems(cfg, ["checks_a", "checks_b"], ["checks_c"]) == []
    set_classes(cfg, number)
    assert problems(cfg, ["checks_a", "checks_b"], ["checks_c"]) == [
        f"{key} is {number}, but dataset checks_{name} has 2 classes (car, dog): set it to 2" for name in "abc"
    ]
    # An evaluation needs no training set.
    assert problems(cfg, ["checks_nowhere"], ["checks_c"], eval_only=True) == [
        f"{key} is {number}, but dataset checks_c has 2 classes (car, dog): set it to 2"
    ]


def test_records_without_names(coco_dataset, problems):
    record = {"file_name": "1.png", "width": 96, "height": 64, "annotations": [{"category_id": 5}]}
    DatasetCatalog.register("checks_nameless", lambda: [record])
    cfg = detector_config("faster")
    assert problems(cfg, ["checks_nameless"], []) == [
        "MODEL.ROI_HEADS.NUM_CLASSES is 3, but dataset checks_nameless has annotations of category_id 5, counted from "
        "0: set it to at least 6"
    ]
    set_classes(cfg, 6)
    assert problems(cfg, ["checks_nameless"], []) == []


def test_a_loader_that_fails(coco_dataset, problems):
    def load():
        raise RuntimeError("no connection")

    DatasetCatalog.register("checks_failing", load)
    cfg = detector_config("faster")
    assert problems(cfg, ["checks_failing"], []) == [
        "DATASETS names checks_failing, whose classes can't be read: RuntimeError: no connection"
    ]


def test_other_meta_architectures_are_compared_once_they_are_built(coco_dataset, problems):
    coco_dataset("checks_a")
    cfg = detector_config("scorer")
    assert problems(cfg, ["checks_a"], ["checks_a"]) == []


def test_persons_with_keypoints(coco_dataset, problems):
    def change(content):
        for annotation in content["annotations"]:
            annotation.update(category_id=1, keypoints=[5, 5, 2] * 17)

    coco_dataset("checks_persons", change, classes=("person",))
    cfg = detector_config("faster")
    cfg.MODEL.KEYPOINT_ON = True
    assert len(problems(cfg, ["checks_persons"], ["checks_persons"])) == 1
    set_classes(cfg, 1)
    assert problems(cfg, ["checks_persons"], ["checks_persons"]) == []


def test_classes_in_another_order(coco_dataset, problems):
    """The test set's categories have other numbers: every detection would count for another class."""
    coco_dataset("checks_a")
    coco_dataset("checks_turned", classes=("Dog", "Car"))
    cfg = detector_config("faster")
    set_classes(cfg, 2)
    (line,) = problems(cfg, ["checks_a"], ["checks_turned"])
    assert "dog is number 1 of the training set checks_a, but number 0 of the test set checks_turned" in line


def test_a_test_set_that_can_not_be_evaluated(coco_dataset, problems):
    path = coco_dataset("checks_crowd", lambda content: content["annotations"][1].update(iscrowd="no"))
    cfg = detector_config("faster")
    set_classes(cfg, 2)
    # It does not matter where it is trained on.
    assert problems(cfg, ["checks_crowd"], []) == []
    for eval_only in (False, True):
        assert problems(cfg, ["checks_crowd"], ["checks_crowd"], eval_only=eval_only) == [
            f"DATASETS.TEST names checks_crowd: {path}: annotations[1] (id 2): iscrowd is 'no'; it must be 0 or 1"
        ]


@pytest.fixture
def pair(distiller_config, tmp_path):
    """A function that makes a distiller's config, with the number of classes and the datasets of its teacher."""

    def make(kind="faster", *, number=2, train=()):
        def change(cfg):
            set_classes(cfg, number)
            cfg.DATASETS.TRAIN = tuple(train)

        cfg = distiller_config(kind, change=change)
        set_classes(cfg, 2)
        return cfg

    return make


@BOTH
def test_a_teacher_of_another_number_of_classes(coco_dataset, problems, pair, tmp_path, kind, key):
    coco_dataset("checks_a")
    assert problems(pair(kind), ["checks_a"], ["checks_a"]) == []
    assert problems(pair(kind, number=3), ["checks_a"], ["checks_a"]) == [
        f"{key} of {tmp_path / 'teacher.yaml'} is 3, but dataset checks_a has 2 classes (car, dog): take a teacher "
        "that was trained on the student's classes"
    ]


def test_a_teacher_trained_on_other_datasets(coco_dataset, problems, pair):
    for name, classes in (("a", ("car", "dog")), ("b", ("Car", "Dog")), ("c", ("cat", "dog")), ("d", ("dog",))):
        coco_dataset(f"checks_{name}", classes=classes, change=lambda content: content["annotations"].clear())
    assert problems(pair(train=["checks_a", "checks_b"]), ["checks_b", "checks_a"], []) == []
    # The second of each is compared too.
    (line,) = problems(pair(train=["checks_b", "checks_c"]), ["checks_a", "checks_b"], [])
    assert "the student's dataset checks_a has the classes car, dog, the teacher's checks_c has cat, dog" in line
    (line,) = problems(pair(train=["checks_d"]), ["checks_a"], [])
    assert (
        "NUM_CLASSES of" in line
        and "is 2, but dataset checks_d has 1 class (dog): both must be as in the teacher's training" in line
    )


def test_a_teacher_from_elsewhere(coco_dataset, problems, pair):
    """Its datasets are not registered here, or their files are not there."""
    coco_dataset("checks_a")
    coco_dataset("checks_gone").unlink()
    assert problems(pair(train=["checks_gone", "checks_of_nobody"]), ["checks_a"], ["checks_a"]) == []
    assert "checks_of_nobody" not in MetadataCatalog.list()
