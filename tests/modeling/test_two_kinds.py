"""A teacher and a student of two kinds, one of two stages and one of one."""

import copy
import math

import pytest
import torch
from detectron2.modeling import build_model
from tiny import train, training_batch

BOTH_WAYS = pytest.mark.parametrize(("student", "teacher"), [("retinanet", "faster"), ("faster", "retinanet")])


@BOTH_WAYS
@pytest.mark.parametrize("method", ["gkd", "fitnet"])
def test_it_trains(student, teacher, method, distiller_config):
    cfg = distiller_config(student, teacher_kind=teacher, channels=8)
    cfg.GKD.METHOD = method
    distiller = build_model(cfg)
    distiller.listeners = []
    assert type(distiller.student).__name__ != type(distiller.teacher).__name__
    # p2 is the R-CNN's alone, and its p6 is p5 pooled, RetinaNet's a convolution of its own.
    assert distiller.student_features == distiller.teacher_features == ["p3", "p4", "p5"]
    before = copy.deepcopy(distiller.teacher.state_dict())
    batch, keys = training_batch(), list(distiller.method.active())
    # By the losses of the method alone.
    first = copy.deepcopy(distiller.student.backbone.state_dict())
    history = train(distiller, cfg, batch, 3, learned=keys)
    assert len(keys) == (4 if method == "gkd" else 1)
    assert all(losses[key] > 0 for losses in history for key in keys)
    assert all(math.isfinite(value) for losses in history for value in losses.values())
    for level in ("3", "4", "5"):
        name = f"fpn_output{level}.weight"
        assert not torch.equal(distiller.student.backbone.state_dict()[name], first[name])
    after = distiller.teacher.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert all(parameter.grad is None for parameter in distiller.teacher.parameters())


@BOTH_WAYS
def test_it_trains_in_one_pass_as_in_two(student, teacher, distiller_config):
    cfg = distiller_config(student, teacher_kind=teacher)
    batch, results = training_batch(), []
    for one_pass in (True, False):
        cfg.GKD.ONE_PASS = one_pass
        torch.manual_seed(1)
        distiller = build_model(cfg)
        distiller.listeners = []
        torch.manual_seed(2)
        results.append(train(distiller, cfg, batch, 1)[0])
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_a_head_of_another_kind_can_not_be_inherited(distiller_config):
    cfg = distiller_config("retinanet", teacher_kind="faster")
    cfg.GKD.STUDENT.INIT_FROM_TEACHER = True
    with pytest.raises(ValueError, match=r"no head of the teacher fits the student \(head: the teacher has no such he"):
        build_model(cfg)
