"""A teacher that detects more or other classes than the student, through a map of names."""

import copy
import logging

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from tiny import ARCHITECTURES, calm, detector_config, train, training_batch

from gkd_d2.engine.hooks.pictures import take_picture
from gkd_d2.modeling.class_map import are_the_same, map_classes, student_class_names
from gkd_d2.modeling.split import split_detector
from gkd_d2.modeling.teacher import FrozenTeacher

# The student's three, of which the second is no class of the teacher.
STUDENT = ["Car", "Pedestrian", "Bus"]
TEACHER = ["bus", "dog", "cat", "car", "tram"]
MAP = [3, None, 0]


@pytest.fixture(autouse=True)
def _names():
    MetadataCatalog.get("map_student").thing_classes = STUDENT
    yield
    for name in [name for name in MetadataCatalog.list() if name.startswith("map_")]:
        MetadataCatalog.remove(name)


def with_classes(kind, number):
    cfg = detector_config(kind)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = number
    return cfg


@pytest.fixture
def mapped(distiller_config):
    """A function that makes the config of a distiller whose teacher detects TEACHER."""

    def make(kind="retinanet", names=TEACHER):
        number = len(names)
        changes = ("MODEL.ROI_HEADS.NUM_CLASSES", number, "MODEL.RETINANET.NUM_CLASSES", number)
        # Of random weights no score is high.
        changes = (*changes, "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0)
        cfg = distiller_config(kind, teacher_options=changes)
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("map_student",), ()
        cfg.GKD.TEACHER.CLASSES = list(names)
        return cfg

    return make


def batch_of(*classes):
    """A batch whose images hold two boxes of these classes each."""
    batch = training_batch(((90, 120),) * len(classes))
    for one, numbers in zip(batch, classes):
        one["instances"] = copy.deepcopy(batch[0]["instances"])
        one["instances"].gt_classes = torch.tensor(numbers)
    return batch


def test_names_in_any_case():
    assert map_classes(STUDENT, TEACHER) == MAP
    assert map_classes(["a", "B"], ["b", "A"]) == [1, 0]


@pytest.mark.parametrize(
    ("names", "teacher", "message"),
    [
        (["a"], ["a", "b", "A"], r"^GKD.TEACHER.CLASSES: a, A: a name may stand there once only"),
        (["a", "A"], ["a"], r"^the student's classes: a, A: a name may stand there once only"),
        # As YAML reads a bare no.
        (["a"], ["a", False], "^GKD.TEACHER.CLASSES: False is no text: write it in quotation marks"),
        (
            ["Pedestrian", "Cyclist"],
            ["person", "bicyclist"],
            r"none of the student's classes, Pedestrian, Cyclist \(did you mean bicyclist\?\). It names person",
        ),
    ],
)
def test_names_that_can_not_be_mapped(names, teacher, message):
    with pytest.raises(ValueError, match=message):
        map_classes(names, teacher)


def test_which_maps_change_nothing():
    assert are_the_same(None, 3) and are_the_same([0, 1, 2], 3)
    for other in ([0, 1, 2], 4), ([1, 0, 2], 3), ([0, None, 2], 3):
        assert not are_the_same(*other)


def test_the_names_are_those_of_the_training_sets():
    MetadataCatalog.get("map_same").thing_classes = [name.upper() for name in STUDENT]
    assert student_class_names(["map_nowhere", "map_student", "map_same"]) == STUDENT
    MetadataCatalog.get("map_other").thing_classes = ["Car", "Bus", "Pedestrian"]
    message = "training set map_student has Pedestrian as class 1, counted from 0, dataset map_other has Bus: give both"
    with pytest.raises(ValueError, match=message):
        student_class_names(["map_student", "map_other"])
    for sets, shown in ((["map_nowhere"], "map_nowhere"), ([], "empty")):
        with pytest.raises(ValueError, match=f"are not known: DATASETS.TRAIN is {shown}. Register a training set with"):
            student_class_names(sets)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_teachers_losses_are_those_of_renumbered_ground_truth(kind):
    """Classes 0, 1 and 2 are 3, unknown and 0 to the teacher; the second image holds unknown ones alone."""
    model = calm(build_model(with_classes(kind, 5)))
    mapped, plain = (
        FrozenTeacher(copy.deepcopy(model), seed=3, classes=MAP),
        FrozenTeacher(copy.deepcopy(model), seed=3),
    )
    batch = batch_of([0, 1], [1, 1], [2, 0])
    before = copy.deepcopy([x["instances"] for x in batch])
    renumbered = copy.deepcopy(batch)
    for one, kept, numbers in zip(renumbered, ([0], [], [0, 1]), ([3], [], [0, 3])):
        one["instances"] = one["instances"][torch.tensor(kept, dtype=torch.int64)]
        one["instances"].gt_classes = torch.tensor(numbers, dtype=torch.int64)
    losses = []
    for teacher, given in ((mapped, batch), (plain, renumbered)):
        split_losses = teacher.split.losses
        teacher.split.losses = lambda *args, compute=split_losses: losses.append(compute(*args)) or losses[-1]
        with EventStorage():
            losses.append(teacher.observe(given, ["p3", "p5"], with_gradients=True).at(["p3", "p5"]))
    ours, (features, gradients), theirs, (plain_features, plain_gradients) = losses
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    for found, expected in zip((*features, *gradients), (*plain_features, *plain_gradients)):
        assert torch.equal(found, expected)
    assert all(gradient[index].abs().sum() > 0 for gradient in gradients for index in range(3))
    # The student's batch is as it was.
    for one, was in zip(batch, before):
        assert torch.equal(one["instances"].gt_classes, was.gt_classes)
        assert torch.equal(one["instances"].gt_boxes.tensor, was.gt_boxes.tensor)


def permuted(model, kind, permutation):
    """A copy that predicts class ``permutation[i]`` where ``model`` predicts class i."""
    state, number = copy.deepcopy(model.state_dict()), len(permutation)
    # Row of the new model -> row of the old.
    rows = torch.tensor([permutation.index(new) for new in range(number)])
    if kind == "retinanet":
        names = ("head.cls_score.weight", "head.cls_score.bias")
        shapes = [(-1, number, *state[name].shape[1:]) for name in names]
        for name, shape in zip(names, shapes):
            state[name] = state[name].view(shape)[:, rows].reshape(state[name].shape)
    else:
        place = "roi_heads.box_predictor."
        # The background comes last.
        for name in ("cls_score.weight", "cls_score.bias"):
            state[place + name] = state[place + name][torch.tensor([*rows, number])]
        for name in ("bbox_pred.weight", "bbox_pred.bias"):
            old = state[place + name]
            state[place + name] = old.view(number, 4, *old.shape[1:])[rows].reshape(old.shape)
    other = copy.deepcopy(model)
    other.load_state_dict(state)
    return other


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_permutation_of_the_classes_changes_nothing(kind):
    """A teacher that calls class 0 of the student 2 has the gradients of one that calls it 0."""
    model = calm(build_model(with_classes(kind, 3)))
    # Classes that random heads hardly tell apart would hide a wrong one.
    for name, tensor in model.state_dict().items():
        if "cls_score.weight" in name:
            tensor.mul_(100)
    permutation = [2, 0, 1]
    plain = FrozenTeacher(model, seed=0)
    mapped = FrozenTeacher(permuted(model, kind, permutation), seed=0, classes=permutation)
    unmapped = FrozenTeacher(permuted(model, kind, permutation), seed=0)
    levels = sorted(plain.split.head_features() - plain.split.pooled_features())
    batch, results = batch_of([0, 1], [2, 2]), []
    for teacher in (plain, mapped, unmapped):
        with EventStorage():
            results.append(teacher.observe(batch, levels, with_gradients=True).at(levels)[1])
    changed = []
    for expected, found, without in zip(*results):
        largest = expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * largest)
        # At some level by far more than the tolerance.
        changed.append((without - expected).abs().max().item() > 1e-3 * largest > 0)
    assert any(changed)


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("method", ["fitnet", "gkd", "fgd", "pkd", "fgfi"])
def test_every_method_trains(kind, method, mapped):
    cfg = mapped(kind)
    cfg.GKD.METHOD = method
    distiller = build_model(cfg)
    distiller.listeners = []
    assert distiller._teacher.classes == MAP
    history = train(distiller, cfg, batch_of([0, 1], [1, 1]), 2)
    for key in distiller.method.active():
        assert all(0 < losses[key] < float("inf") for losses in history)


def test_what_the_student_does_not_know_is_warned_of(mapped, caplog):
    distiller = build_model(mapped()).train()
    with EventStorage(), caplog.at_level(logging.INFO, logger="gkd_d2"):
        distiller(batch_of([0, 1]))
    (warning,) = [r.getMessage() for r in caplog.records if "does not name these" in r.getMessage()]
    assert "does not name these of the student's classes: Pedestrian. The teacher's own losses leave out" in warning
    assert "teacher.yaml; 2 of its 5 classes are the student's, which has 1 more\n" in f"{caplog.text}\n"


def test_a_near_name_is_proposed(mapped, caplog):
    build_model(mapped(names=["bus", "pedestrians", "car"]))
    assert "the student's classes: Pedestrian (did you mean pedestrians?). The" in caplog.text
    # But not one that is another class of the student.
    MetadataCatalog.get("map_cats").thing_classes = ["Cat", "Pedestrian", "Car"]
    cfg = mapped(names=["car", "pedestrian"])
    cfg.DATASETS.TRAIN = ("map_cats",)
    build_model(cfg)
    assert "the student's classes: Cat. The" in caplog.text


def test_all_known_is_no_reason_to_warn(mapped, caplog):
    distiller = build_model(mapped(names=["bus", "pedestrian", "CAR", "cat"])).train()
    with EventStorage(), caplog.at_level(logging.INFO, logger="gkd_d2"):
        distiller(batch_of([0, 1]))
    assert "does not name these" not in caplog.text
    assert "teacher.yaml; 3 of its 4 classes are the student's\n" in f"{caplog.text}\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda cfg: cfg.GKD.TEACHER.CLASSES.pop(),
            "GKD.TEACHER.CLASSES has 4 names, but the teacher detects 5: name all of the teacher's classes, in the ord",
        ),
        (lambda cfg: cfg.GKD.TEACHER.CLASSES.clear(), "detects 3 classes, the teacher 5: .* in GKD.TEACHER.CLASSES"),
        (lambda cfg: setattr(cfg.DATASETS, "TRAIN", ("map_nowhere",)), "are not known: DATASETS.TRAIN is map_nowhere"),
        (
            lambda cfg: setattr(cfg.MODEL.RETINANET, "NUM_CLASSES", 4),
            "student detects 4 classes, but the names of its classes are 3, Car, Pedestrian, Bus",
        ),
        (
            lambda cfg: cfg.GKD.TEACHER.OPTS.extend(["DATASETS.TRAIN", "('map_teacher',)"]),
            "GKD.TEACHER.CLASSES has car as class 3, counted from 0, dataset map_teacher has lorry: the teacher's conf",
        ),
        (
            lambda cfg: cfg.GKD.TEACHER.OPTS.extend(["DATASETS.TRAIN", "('map_student',)"]),
            "GKD.TEACHER.CLASSES has 5 classes, dataset map_student has 3: the teacher's config says",
        ),
    ],
)
def test_maps_that_are_refused(change, message, mapped):
    MetadataCatalog.get("map_teacher").thing_classes = ["Bus", "dog", "cat", "lorry", "tram"]
    cfg = mapped()
    change(cfg)
    with pytest.raises(ValueError, match=message):
        build_model(cfg)


def test_the_teachers_own_training_set_may_say_the_same(mapped):
    MetadataCatalog.get("map_teacher").thing_classes = [name.upper() for name in TEACHER]
    cfg = mapped()
    cfg.GKD.TEACHER.OPTS = ["DATASETS.TRAIN", "('map_teacher',)"]
    assert build_model(cfg)._teacher.classes == MAP


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_detections_in_a_picture_have_the_students_classes(kind, mapped):
    distiller = build_model(mapped(kind)).train()
    batch = batch_of([0, 1])
    with EventStorage():
        seen = distiller.observe(batch, student_grad=True, teacher_grad=True)
        taken = take_picture(distiller, seen.detached())
    with torch.no_grad():
        (own,) = copy.deepcopy(distiller.teacher).eval()(batch)
    own = own["instances"]
    known = (own.pred_classes == 3) | (own.pred_classes == 0)
    assert known.any() and not known.all()
    assert torch.equal(taken.teacher.scores, own.scores[known])
    # Car is 3 and Bus is 0 to the teacher, 0 and 2 to the student.
    assert torch.equal(taken.teacher.pred_classes, torch.where(own.pred_classes[known] == 3, 0, 2))
    assert taken.truth.gt_classes.tolist() == [0, 1]


CLASS_HEADS = {"retinanet": "head", "faster": "roi_heads.box"}


def test_heads_that_predict_classes_are_not_inherited_in_another_order(mapped, caplog):
    cfg = mapped("faster", names=["bus", "car", "pedestrian"])
    cfg.GKD.STUDENT.INIT_FROM_TEACHER = True
    distiller = build_model(cfg)
    assert "roi_heads.box: it predicts classes, which are others in the teacher, or in another order" in caplog.text
    ours, theirs = distiller.student.state_dict(), distiller.teacher.state_dict()
    score, objectness = "roi_heads.box_predictor.cls_score.weight", "proposal_generator.rpn_head.conv.weight"
    assert ours[score].shape == theirs[score].shape and not torch.equal(ours[score], theirs[score])
    assert torch.equal(ours[objectness], theirs[objectness])


def test_a_retinanets_head_can_not_be_inherited_in_another_order(mapped):
    cfg = mapped("retinanet", names=["bus", "car", "pedestrian"])
    cfg.GKD.STUDENT.INIT_FROM_TEACHER = True
    with pytest.raises(ValueError, match=r"no head of the teacher fits the student \(head: it predicts classes, which"):
        build_model(cfg)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_heads_of_the_same_classes_are_inherited(kind, mapped, caplog):
    cfg = mapped(kind, names=[name.upper() for name in STUDENT])
    cfg.GKD.STUDENT.INIT_FROM_TEACHER = True
    distiller = build_model(cfg)
    assert distiller._teacher.classes == [0, 1, 2]
    ours, theirs = distiller.student.state_dict(), distiller.teacher.state_dict()
    heads = [name for name in ours if split_detector(distiller.student).head_of(name) == CLASS_HEADS[kind]]
    assert heads and all(torch.equal(ours[name], theirs[name]) for name in heads)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
