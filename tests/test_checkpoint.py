"""Checkpoints that do not fit are errors."""

import pytest
import torch
from detectron2.modeling import build_model
from tiny import detector_config

from gkd_d2.checkpoint import CompleteCheckpointer, StudentCheckpointer


def save(path, state):
    torch.save({"model": state}, path)
    return str(path)


def test_a_checkpoint_that_matches_nothing_is_refused(tmp_path):
    model = build_model(detector_config("retinanet"))
    path = save(tmp_path / "other.pth", {f"wrapped.{name}": value for name, value in model.state_dict().items()})
    with pytest.raises(ValueError, match="sets none of the model's .* checkpoint wrapped.backbone"):
        StudentCheckpointer(model).load(path)


def test_a_distillers_student_starts_from_backbone_weights(tmp_path, distiller_config):
    """ImageNet checkpoints hold the bare ResNet and are matched by Detectron2's heuristics."""
    distiller = build_model(distiller_config("retinanet"))
    bottom_up = distiller.student.backbone.bottom_up
    state = {name: torch.full_like(value, 2) for name, value in bottom_up.state_dict().items()}
    torch.save({"model": state, "matching_heuristics": True, "__author__": "test"}, tmp_path / "backbone.pth")
    StudentCheckpointer(distiller).load(str(tmp_path / "backbone.pth"))
    assert all((value == 2).all() for value in bottom_up.state_dict().values())
    assert not (distiller.student.head.cls_score.weight == 2).all()


def test_a_partial_checkpoint_is_refused_where_all_is_needed(tmp_path):
    model = build_model(detector_config("retinanet"))
    state = model.state_dict()
    del state["head.cls_score.bias"], state["head.bbox_pred.weight"]
    with pytest.raises(ValueError, match="leaves 2 .* unset: head.bbox_pred.weight, head.cls_score.bias"):
        CompleteCheckpointer(model).load(save(tmp_path / "part.pth", state))
    # Extra tensors, such as a distiller's align convolutions, do no harm.
    extra = model.state_dict() | {"align.p3.weight": torch.zeros(1)}
    CompleteCheckpointer(model).load(save(tmp_path / "more.pth", extra))
