"""A training whose frozen parts would stay random says so before it starts."""

import logging

import pytest
import torch
from detectron2.modeling import build_model
from tiny import detector_config

from gkd_d2.engine.from_scratch import (
    consider_loaded,
    has_frozen_random_weights,
    warn_of_frozen_random_weights,
)
from gkd_d2.engine.trainer import Trainer


def warnings(cfg, caplog):
    with caplog.at_level(logging.WARNING, logger="gkd_d2"):
        warn_of_frozen_random_weights(build_model(cfg))
    return [record.getMessage() for record in caplog.records if record.name == "gkd_d2.engine.from_scratch"]


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, ()),
        ({"MODEL.BACKBONE.FREEZE_AT": 2}, ("frozen by MODEL.BACKBONE.FREEZE_AT",)),
        ({"MODEL.RESNETS.NORM": "FrozenBN"}, ("MODEL.RESNETS.NORM or MODEL.FPN.NORM is FrozenBN",)),
        ({"MODEL.FPN.NORM": "FrozenBN"}, ("MODEL.RESNETS.NORM or MODEL.FPN.NORM is FrozenBN",)),
        (
            {"MODEL.BACKBONE.FREEZE_AT": 1, "MODEL.RESNETS.NORM": "FrozenBN"},
            ("frozen by MODEL.BACKBONE.FREEZE_AT", ", and MODEL.RESNETS.NORM or MODEL.FPN.NORM is FrozenBN"),
        ),
    ],
)
def test_what_is_frozen_is_named(caplog, changes, names):
    cfg = detector_config("retinanet")
    cfg.merge_from_list([x for change in changes.items() for x in change])
    said = warnings(cfg, caplog)
    assert len(said) == bool(names)
    for name in names:
        assert name in said[0]
        for advice in ("MODEL.BACKBONE.FREEZE_AT to 0", "MODEL.RESNETS.NORM and MODEL.FPN.NORM to BN"):
            assert advice in said[0]


def test_weights_to_start_from(training, caplog, tmp_path):
    """With weights nothing of it is random."""
    cfg = detector_config("retinanet")
    cfg.MODEL.BACKBONE.FREEZE_AT, cfg.MODEL.RESNETS.NORM = 2, "FrozenBN"
    cfg.DATASETS.TRAIN, cfg.OUTPUT_DIR = training("retinanet", iterations=1).DATASETS.TRAIN, str(tmp_path / "out")
    (tmp_path / "out").mkdir()
    cfg.MODEL.WEIGHTS = str(tmp_path / "start.pth")
    torch.save({"model": build_model(cfg).state_dict()}, cfg.MODEL.WEIGHTS)
    with caplog.at_level(logging.WARNING, logger="gkd_d2"):
        Trainer(cfg).resume_or_load(resume=False)
    assert not [r for r in caplog.records if r.name == "gkd_d2.engine.from_scratch"]


def test_a_distilled_training_says_it_once(training, caplog):
    """At its start, not where it is resumed."""
    cfg = training("retinanet", iterations=1)
    cfg.MODEL.BACKBONE.FREEZE_AT = 2
    said = []
    for resume in (False, True):
        caplog.clear()
        trainer = Trainer(cfg)
        with caplog.at_level(logging.WARNING, logger="gkd_d2"):
            trainer.resume_or_load(resume=resume)
        said.append([r for r in caplog.records if r.name == "gkd_d2.engine.from_scratch"])
        trainer.train()
    assert [len(records) for records in said] == [1, 0]


@pytest.mark.parametrize(
    ("changes", "weights", "names"),
    [
        ({}, False, ()),
        ({"FREEZE_AT": 2}, False, ("frozen by MODEL.TIMM.FREEZE_AT",)),
        ({"NORM": "FrozenBN"}, False, ("MODEL.TIMM.NORM or MODEL.FPN.NORM is FrozenBN",)),
        ({"FREEZE_AT": 2, "NORM": "FrozenBN"}, True, ()),
    ],
)
def test_a_backbone_of_timm_may_start_with_weights_of_its_own(caplog, tmp_path, changes, weights, names):
    timm = pytest.importorskip("timm")
    cfg = timm_config()
    for key, value in changes.items():
        cfg.MODEL.TIMM[key] = value
    if weights:
        cfg.MODEL.TIMM.WEIGHTS = str(tmp_path / "weights.pth")
        torch.save(timm.create_model("mobilenetv2_050").state_dict(), cfg.MODEL.TIMM.WEIGHTS)
    said = warnings(cfg, caplog)
    assert len(said) == bool(names)
    for name in names:
        assert name in said[0]
        assert "set MODEL.TIMM.FREEZE_AT to 0, and MODEL.TIMM.NORM and MODEL.FPN.NORM to BN" in said[0]
        assert "RESNETS" not in said[0] and "BACKBONE" not in said[0]
    if weights:
        # Its pyramid starts at random all the same.
        cfg.MODEL.FPN.NORM = "FrozenBN"
        assert "MODEL.TIMM.NORM or MODEL.FPN.NORM is FrozenBN" in warnings(cfg, caplog)[0]


def test_a_part_that_a_run_resumes_with_is_not_random():
    pytest.importorskip("timm")
    cfg = timm_config()
    cfg.MODEL.TIMM.NORM = "FrozenBN"
    model = build_model(cfg)
    assert has_frozen_random_weights(model)
    consider_loaded(model)
    assert not has_frozen_random_weights(model)


def test_what_no_feature_needs_is_not_taken_for_frozen(caplog):
    pytest.importorskip("timm")
    cfg = timm_config("faster", "build_timm_fpn_backbone")
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3"]
    cfg.MODEL.RPN.IN_FEATURES = cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[8], [16]]
    model = build_model(cfg)
    assert any(not p.requires_grad for p in model.backbone.bottom_up.parameters())
    assert not warnings(cfg, caplog)


def timm_config(kind="retinanet", builder="build_retinanet_timm_fpn_backbone"):
    cfg = detector_config(kind)
    cfg.MODEL.BACKBONE.NAME = builder
    cfg.MODEL.TIMM.NAME, cfg.MODEL.TIMM.NORM, cfg.MODEL.TIMM.FREEZE_AT = "mobilenetv2_050", "BN", 0
    cfg.MODEL.PIXEL_STD = [57.375, 57.12, 58.395]
    return cfg
