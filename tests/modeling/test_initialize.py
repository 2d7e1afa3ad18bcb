"""Heads are inherited from the teacher whole or not at all."""

import logging
import re

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from tiny import calm, train, training_batch

PREDICTOR = "roi_heads.box_predictor.cls_score.weight"
BOX_HEAD = ("roi_heads.box_head.", "roi_heads.box_predictor.")


def tensors(distiller):
    """The student's and the teacher's tensors outside the backbone, by name."""
    models = distiller.student, distiller._teacher.model
    return [{k: v for k, v in m.state_dict().items() if not k.startswith("backbone.")} for m in models]


def inheriting(distiller_config, *args, **kwargs):
    cfg = distiller_config(*args, **kwargs)
    cfg.GKD.STUDENT.INIT_FROM_TEACHER = True
    return cfg


def test_all_heads_are_copied(distiller_config, caplog):
    cfg = inheriting(distiller_config)
    distiller = build_model(cfg)
    student, teacher = tensors(distiller)
    assert len(student) == 12 and all(torch.equal(student[name], teacher[name]) for name in student)
    backbones = [m.backbone.state_dict()["fpn_output3.weight"] for m in (distiller.student, distiller._teacher.model)]
    assert not torch.equal(*backbones)
    # A copy, not the teacher's own tensors.
    distiller.listeners = []
    before = teacher[PREDICTOR].clone()
    train(distiller, cfg, training_batch(), 1)
    student, teacher = tensors(distiller)
    assert torch.equal(teacher[PREDICTOR], before) and not torch.equal(student[PREDICTOR], before)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        # fc1 differs, and box_predictor fits.
        (
            "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION",
            5,
            r"box_head.fc1.weight is \(32, 784\), the teacher's \(32, 400\)",
        ),
        # All of the student's tensors fit, but behind fc1 the teacher has another layer.
        ("MODEL.ROI_BOX_HEAD.NUM_FC", 2, "the student has no roi_heads.box_head.fc2.weight"),
    ],
)
def test_partly_fitting_head_is_not_copied(key, value, reason, distiller_config, caplog):
    distiller = build_model(inheriting(distiller_config, teacher_options=(key, value)))
    student, teacher = tensors(distiller)
    assert student[PREDICTOR].shape == teacher[PREDICTOR].shape
    for name, tensor in student.items():
        if tensor.std() > 0:
            assert torch.equal(tensor, teacher.get(name, torch.empty(0))) == (not name.startswith(BOX_HEAD)), name
    assert "proposal_generator.rpn_head.conv.weight" in student
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "do not start with the teacher's weights. roi_heads.box: " in warning
    assert re.search(reason, warning)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        (
            "MODEL.ANCHOR_GENERATOR.SIZES",
            [[10.0], [20.0], [40.0], [80.0], [160.0]],
            "proposal_generator.anchor_generator sizes",
        ),
        (
            "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS",
            [[0.25, 1.0, 2.0]],
            "proposal_generator.anchor_generator aspect ratios",
        ),
        ("MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3", "p4"], "roi_heads.box_in_features"),
        ("MODEL.RPN.BBOX_REG_WEIGHTS", [2.0, 2.0, 2.0, 2.0], "proposal_generator.box2box_transform.weights"),
    ],
)
def test_heads_that_were_trained_for_others_are_named(key, value, named, distiller_config, caplog):
    """All shapes fit, but the weights mean something else."""
    build_model(inheriting(distiller_config, teacher_options=(key, value)))
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert f"{named} is " in warning and f", the teacher's {str(value)[:-1]}" in warning


def test_mask_head_of_the_student_alone(distiller_config, caplog):
    cfg = inheriting(distiller_config, "mask", teacher_options=("MODEL.MASK_ON", False))
    distiller = build_model(cfg)
    student, teacher = tensors(distiller)
    assert all(torch.equal(student[name], teacher[name]) for name in teacher)
    assert "roi_heads.mask: the teacher has no such head" in caplog.text


def test_no_fitting_head_is_an_error(distiller_config):
    cfg = inheriting(distiller_config, "retinanet", channels=8)
    message = (
        r"INIT_FROM_TEACHER is True, but no head of the teacher fits the student \(head: head.cls_subnet.0.weight is "
        r"\(8, 8, 3, 3\), the teacher's \(16, 16, 3, 3\)\)"
    )
    with pytest.raises(ValueError, match=message):
        build_model(cfg)


def test_heads_replaced_by_the_weights_are_named(distiller_config, caplog):
    cfg = inheriting(distiller_config)
    cfg.MODEL.WEIGHTS = "detector.pth"
    distiller = build_model(cfg)
    calm(distiller.student)
    state = {name: tensor + 1 for name, tensor in distiller.state_dict().items() if name.startswith(BOX_HEAD)}
    distiller.load_state_dict(state, strict=False)
    with EventStorage(), caplog.at_level(logging.INFO, logger="gkd_d2"):
        distiller.train()(training_batch())
    assert "  heads:   inherited from the teacher: proposal_generator\n" in caplog.text
    assert (
        "MODEL.WEIGHTS detector.pth replaced the heads that were copied from the teacher: roi_heads.box." in caplog.text
    )
