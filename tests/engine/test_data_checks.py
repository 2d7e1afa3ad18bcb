"""Datasets whose classes are not the model's, or whose evaluation would fail, are refused before a run starts."""

import json

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, PanopticFPN, RetinaNet, build_model
from tiny import Scorer, SplitScorer, detector_config

from gkd_d2.engine.preflight import PreflightError, check_inputs
from gkd_d2.engine.run import YacsRun
from gkd_d2.modeling.split import registry

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
            check_inputs(YacsRun(cfg), eval_only=eval_only, resume=False)
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
        f"{key} is {number}, but dataset checks_c has 2 classes (car, dog): both must be as in the model's training"
    ]


@pytest.mark.parametrize(
    ("base", "key"), [(GeneralizedRCNN, "ROI_HEADS"), (RetinaNet, "RETINANET"), (PanopticFPN, "ROI_HEADS")]
)
def test_classes_of_a_detector_of_ones_own(coco_dataset, problems, monkeypatch, base, key):
    """One that derives from Detectron2's has its NUM_CLASSES."""
    monkeypatch.setitem(META_ARCH_REGISTRY._obj_map, "ChecksNet", type("ChecksNet", (base,), {}))
    coco_dataset("checks_a")
    cfg = detector_config("faster")
    cfg.MODEL.META_ARCHITECTURE = "ChecksNet"
    set_classes(cfg, 1)
    assert problems(cfg, ["checks_a"], ["checks_a"]) == [
        f"MODEL.{key}.NUM_CLASSES is 1, but dataset checks_a has 2 classes (car, dog): set it to 2"
    ]


def test_detectors_that_are_compared_once_they_are_built(coco_dataset, problems, distiller_config, monkeypatch):
    """Of a function, or a class that derives from none of Detectron2's, only the split knows the number of classes."""
    coco_dataset("checks_a")
    coco_dataset("checks_one", classes=("car",), change=lambda content: content["annotations"].pop())
    cfg = detector_config("faster")
    monkeypatch.setitem(META_ARCH_REGISTRY._obj_map, "checks_function", lambda cfg: GeneralizedRCNN(cfg))
    cfg.MODEL.META_ARCHITECTURE = "checks_function"
    assert problems(cfg, ["checks_a"], ["checks_a"]) == []
    monkeypatch.setattr(registry, "_SPLITS", {**registry._SPLITS, Scorer: SplitScorer})
    cfg = distiller_config("scorer")
    assert problems(cfg, ["checks_a"], ["checks_a"]) == []
    with pytest.raises(ValueError, match=r"student detects 1 class, but dataset checks_a has 2 classes \(car, dog\)"):
        build_model(cfg)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("checks_one",), ("checks_a",)
    with pytest.raises(ValueError, match="detects 1 class, but dataset checks_a has 2 classes"):
        build_model(cfg)
    cfg.DATASETS.TEST = ("checks_one",)
    build_model(cfg)


def test_datasets_that_disagree_about_the_classes(coco_dataset, problems, pair):
    """No NUM_CLASSES suits both, so that none is proposed, neither the student's nor a teacher's."""
    coco_dataset("checks_a")
    coco_dataset("checks_sub", classes=("car",), change=lambda content: content["annotations"].pop())
    line = (
        "dataset checks_sub has 1 class (car), but dataset checks_a has 2 classes (car, dog): give both the same "
        "classes in the same order, those without objects too"
    )
    for cfg in (detector_config("faster"), pair()):
        for number in (1, 2, 3):
            set_classes(cfg, number)
            assert problems(cfg, ["checks_a"], ["checks_sub"]) == [line]
            assert problems(cfg, ["checks_a", "checks_sub"], []) == [line]
    # The model's own number decides where nothing is trained.
    cfg = detector_config("faster")
    set_classes(cfg, 2)
    assert problems(cfg, [], ["checks_sub", "checks_a"], eval_only=True) == [
        "MODEL.ROI_HEADS.NUM_CLASSES is 2, but dataset checks_sub has 1 class (car): both must be as in the model's "
        "training"
    ]


def test_records_without_names(coco_dataset, problems, tmp_path):
    (tmp_path / "1.png").touch()
    record = {"file_name": tmp_path / "1.png", "width": 96, "height": 64, "annotations": [{"category_id": 5}]}
    DatasetCatalog.register("checks_nameless", lambda: [record])
    cfg = detector_config("faster")
    assert problems(cfg, ["checks_nameless"], []) == [
        "MODEL.ROI_HEADS.NUM_CLASSES is 3, but dataset checks_nameless has annotations of category_id 5, counted from "
        "0: set it to at least 6"
    ]
    set_classes(cfg, 6)
    assert problems(cfg, ["checks_nameless"], []) == []
    coco_dataset("checks_a")
    (line,) = problems(cfg, ["checks_a", "checks_nameless"], [])
    assert "checks_nameless has annotations of category_id 5, counted from 0, but dataset checks_a has 2 cl" in line
    del record["annotations"][0]["category_id"]
    assert problems(cfg, ["checks_nameless"], []) == [
        "DATASETS.TRAIN names checks_nameless: an annotation of its records has no category_id"
    ]


def test_a_loader_that_fails(coco_dataset, problems):
    def load():
        raise RuntimeError("no connection")

    DatasetCatalog.register("checks_failing", load)
    MetadataCatalog.get("checks_failing").thing_classes = ["car", "dog", "bus"]
    cfg = detector_config("faster")
    assert problems(cfg, ["checks_failing"], []) == [
        "DATASETS.TRAIN names checks_failing: loading it fails with RuntimeError: no connection"
    ]


def other_image_ids(content):
    for image in content["images"]:
        image["id"] = str(image["id"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: c["annotations"][1].update(category_id=9), "annotations[1] (id 2): category_id is 9, which is the"),
        (lambda c: c["annotations"][1].pop("bbox"), "annotations[1] has no bbox"),
        (lambda c: c["annotations"][0].update(bbox=[]), "annotations[0] (id 1): bbox is []; it must be 4 finite"),
        (lambda c: c["annotations"][1].update(id=1), "annotations[1]: the id 1 stands twice among the annotations"),
        (lambda c: c["annotations"][1].update(image_id=None), "annotations[1]: image_id is None; it must be a number"),
        (lambda c: c["images"][1].pop("id"), "images[1] has no id"),
        (lambda c: c["images"][1].update(id=1), "images[1]: the id 1 stands twice among the images"),
        (other_image_ids, " no annotation has the id of one of the file's images: the first image_id is 1, the first"),
        (lambda c: c.update(annotations=None), " annotations is not an array"),
    ],
)
def test_a_training_set_that_can_not_be_loaded(coco_dataset, problems, change, reason):
    def change_and_turn(content):
        change(content)
        content["images"] = content.pop("images")

    # Whatever the order of the arrays in the file.
    path = coco_dataset("checks_broken", change_and_turn)
    cfg = detector_config("faster")
    set_classes(cfg, 2)
    (line,) = problems(cfg, ["checks_broken"], [])
    assert line.startswith(f"DATASETS.TRAIN names checks_broken: {path}: {reason.strip()}")


def test_masks_of_a_training_set(coco_dataset, problems):
    """Crowd regions are not trained on."""
    coco_dataset("checks_a")
    coco_dataset("checks_crowds", lambda content: [a.update(iscrowd=1) for a in content["annotations"]])
    cfg = detector_config("mask")
    set_classes(cfg, 2)
    (line,) = problems(cfg, ["checks_a", "checks_crowds"], [])
    assert "annotations[0] (id 1) has no segmentation, which is needed as MODEL.MASK_ON is True" in line


def test_annotations_of_images_that_are_left_out(coco_dataset, problems):
    """Detectron2 trains with the others, and warns."""
    coco_dataset("checks_part", lambda content: content["annotations"][1].update(image_id=77))
    cfg = detector_config("faster")
    set_classes(cfg, 2)
    assert problems(cfg, ["checks_part"], []) == []
    assert len(DatasetCatalog.get("checks_part")) == 2


@pytest.mark.parametrize("number", [1, 2])
def test_images_that_are_not_there(coco_dataset, problems, tmp_path, number):
    """The first and the last are looked for, in training and test sets."""
    folder = coco_dataset("checks_a").parent
    DatasetCatalog.register("checks_records", lambda: DatasetCatalog.get("checks_a"))
    MetadataCatalog.get("checks_records").thing_classes = ["car", "dog"]
    (folder / f"{number}.png").unlink()
    cfg = detector_config("faster")
    set_classes(cfg, 2)
    for name in ("checks_a", "checks_records"):
        for train, test in (([name], []), ([], [name])):
            assert problems(cfg, train, test, eval_only=bool(test)) == [
                f"DATASETS names {name}, whose image {folder / f'{number}.png'} does not exist: put its images into "
                f"the folder {folder}, or register the dataset with the folder that holds them"
            ]


def test_images_of_coco_traffic_that_are_not_there(problems, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    for folder in ("coco/train2017", "coco_traffic/annotations"):
        (tmp_path / folder).mkdir(parents=True)
    content = json.dumps({"images": [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "2.jpg"}]})
    (tmp_path / "coco_traffic/annotations/instances_train.json").write_text(content)
    (tmp_path / "coco/train2017/1.jpg").touch()
    cfg = detector_config("faster")
    set_classes(cfg, 13)
    (line,) = problems(cfg, ["coco_traffic_train"], [])
    assert line.startswith(f"DATASETS names coco_traffic_train, whose image {tmp_path}/coco/train2017/2.jpg does not")
    (tmp_path / "coco/train2017/2.jpg").touch()
    assert problems(cfg, ["coco_traffic_train"], []) == []


def test_one_process_of_a_machine_reads_the_annotations(coco_dataset, problems, monkeypatch):
    coco_dataset("checks_a")
    cfg = detector_config("faster")
    monkeypatch.setenv("RANK", "5")
    for local_rank, found in (("0", 1), ("1", 0)):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert len(problems(cfg, ["checks_a"], ["checks_a"])) == found
    assert len(problems(cfg, ["checks_of_nobody"], [])) == 1


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
        "that was trained on the student's classes, or name all of the teacher's classes in GKD.TEACHER.CLASSES"
    ]


@BOTH
def test_a_map_of_names_to_a_teachers(coco_dataset, problems, pair, tmp_path, kind, key):
    """What is refused here is refused by the model too, if nothing was checked before."""
    coco_dataset("checks_a")
    coco_dataset("checks_b", classes=("bus", "Car", "cat"), change=lambda content: content["annotations"].clear())
    cfg = pair(kind, number=3, train=["checks_b"])
    setting = f"{key} of {tmp_path / 'teacher.yaml'}"

    def refused(*names):
        cfg.GKD.TEACHER.CLASSES = list(names)
        (line,) = problems(cfg, ["checks_a"], [])
        with pytest.raises(ValueError) as error:
            build_model(cfg)
        # Only the built teacher's number of classes has no setting to name.
        assert str(error.value) == line.replace(f"{setting} is 3", "the teacher detects 3")
        return line

    # Of the student's car and dog the teacher knows one.
    cfg.GKD.TEACHER.CLASSES = ["bus", "CAR", "cat"]
    assert problems(cfg, ["checks_a"], ["checks_a"]) == []
    assert build_model(cfg)._teacher.classes == [1, None]
    names = refused("car", "cat")
    assert names.startswith(f"GKD.TEACHER.CLASSES has 2 names, but {setting} is 3: name all of the teacher's classes")
    assert refused("car", "bus", "Car").startswith("GKD.TEACHER.CLASSES: car, Car: a name may stand there once only")
    none = refused("bus", "lorry", "tree")
    assert none.startswith("GKD.TEACHER.CLASSES names none of the student's classes, car, dog")
    assert "has car as class 0, counted from 0, dataset checks_b has bus" in refused("car", "bus", "cat")


def test_a_map_of_names_that_are_not_known(coco_dataset, problems, pair):
    DatasetCatalog.register("checks_nameless", list)
    cfg = pair(number=3)
    cfg.GKD.TEACHER.CLASSES = ["bus", "car", "cat"]
    lines = problems(cfg, ["checks_nameless"], [])
    DatasetCatalog.remove("checks_nameless")
    expected = "the names of the student's classes are not known: DATASETS.TRAIN is checks_nameless. Register a"
    assert any(expected in line for line in lines)


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
