"""FCOS, where Detectron2 has it: its split, and a student and a teacher of it."""

import copy

import pytest
import torch
from detectron2.utils.events import EventStorage
from tiny import detector_config, make_fcos, train, training_batch

from gkd_d2 import GKDDistiller
from gkd_d2.analysis.importance_maps import take_importance_picture
from gkd_d2.engine.hooks.pictures import take_picture
from gkd_d2.methods import FGFI, GKD, CrossKD, Logits
from gkd_d2.modeling.pairing import pair_levels
from gkd_d2.modeling.split import SplitFCOS, running_state, split_detector
from gkd_d2.modeling.teacher import FrozenTeacher
from gkd_d2.visualize.legend import SCORE

pytest.importorskip("detectron2.modeling.meta_arch.fcos", reason="this Detectron2 has no FCOS")


def make_distiller(method):
    frozen = FrozenTeacher(make_fcos(16), seed=0)
    student = make_fcos(8)
    ours, theirs = pair_levels(split_detector(student), frozen.split, [], [])
    return GKDDistiller(
        student=student, teacher=frozen, student_features=ours, teacher_features=theirs, method=method
    ).train()


def test_losses_are_those_of_its_own_forward():
    model = make_fcos().train()
    twin = copy.deepcopy(model)
    split = split_detector(twin)
    assert type(split) is SplitFCOS and split.num_classes == 3
    batch = training_batch(((90, 120), (96, 100), (64, 64)))
    with EventStorage():
        for _ in range(2):  # the moving average of objects, by which losses are divided, moves with every call
            losses, found = model(batch), split.losses(*split.features(batch), batch)
            assert list(losses) == list(found)
            assert all(torch.equal(value, found[name]) for name, value in losses.items())
        sum(losses.values()).backward()
        sum(found.values()).backward()
    assert running_state(twin) == {"loss_normalizer": model.loss_normalizer} != {"loss_normalizer": 300.0}
    for parameter, other in zip(model.parameters(), twin.parameters()):
        assert torch.equal(parameter.grad, other.grad)


def test_scores_are_the_largest_that_it_detects_by(monkeypatch):
    model = make_fcos().eval()
    torch.nn.init.normal_(model.head.cls_score.weight)
    split, batch = split_detector(model), training_batch(((96, 128),))
    single, scores = model.inference_single_image, []
    monkeypatch.setattr(model, "inference_single_image", lambda *args: scores.extend(args[1]) or single(*args))
    with torch.no_grad():
        maps = split.score_maps(split.features(batch)[1])
        model(batch)
    assert [tuple(values.shape) for values in maps.values()] == [
        (1, height, width) for height, width in ((12, 16), (6, 8), (3, 4), (2, 2), (1, 1))
    ]
    for values, expected in zip(maps.values(), scores, strict=True):
        torch.testing.assert_close(values.flatten(), expected.amax(dim=1))


def test_anchors_are_its_cells():
    split = split_detector(make_fcos())
    (anchors,) = split.anchors({"p4": torch.zeros(1, 16, 2, 3)}).values()
    assert anchors.shape == (2, 3, 1, 4)
    assert anchors[1, 2, 0].tolist() == [32, 16, 48, 32]


def test_the_losses_of_classes_and_boxes_follow_from_its_predictions():
    model = make_fcos().train()
    split, batch = split_detector(model), training_batch(((90, 120), (96, 100), (64, 64)))
    with EventStorage():
        images, features = split.features(batch)
        expected = split.losses(images, features, batch)
        found = split.predictions(features)
        assert split.cell_norm(3) == model.loss_normalizer
        cells = [level.cells for level in found.values()]
        anchors = model.anchor_generator([features[name] for name in found])
        labels, boxes = model.label_anchors(anchors, split.instances(batch))
        _, _, centerness = model.head([features[name] for name in found])
        model.loss_normalizer = 300
        losses = model.losses(
            anchors,
            [level.logits.view(3, -1, 3) for level in cells],
            labels,
            [level.deltas.view(3, -1, 4) for level in cells],
            boxes,
            [level.flatten(2).transpose(1, 2) for level in centerness],
        )
    assert all(torch.equal(losses[name], expected[name]) for name in expected)


@pytest.mark.parametrize("method", [GKD, FGFI, CrossKD, Logits])
def test_a_student_learns_from_a_teacher(method):
    distiller = make_distiller(method())
    before = copy.deepcopy(distiller.teacher.state_dict())
    history = train(distiller, detector_config("retinanet"), training_batch(), 3)
    names = set(distiller.method.active())
    assert names and all(0 < losses[name] < float("inf") for losses in history for name in names)
    assert all(torch.equal(value, before[name]) for name, value in distiller.teacher.state_dict().items())
    # Not moved, and so not even set.
    assert running_state(distiller.student) and not running_state(distiller.teacher)


def test_pictures():
    distiller = make_distiller(GKD())
    with EventStorage():
        seen = distiller.observe(training_batch(), student_grad=True, teacher_grad=True).detached()
        taken, importances = take_picture(distiller, seen), take_importance_picture(distiller, seen)
    assert [level.name for level in taken.levels] == ["p3", "p4", "p5", "p6", "p7"]
    assert all(level.maps[SCORE].values.any() for level in importances.levels)
