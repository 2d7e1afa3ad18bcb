"""A random student works on as much as a trained one may."""

import pytest
import torch
from tiny import detector_config

from gkd_d2.analysis.cost import random_image
from gkd_d2.analysis.random_student import random_student


@pytest.fixture
def image():
    return random_image((128, 192))


def moments(output):
    """Mean and variance of each channel, before a ReLU overwrites the tensor."""
    return output.mean(dim=(0, 2, 3)), output.var(dim=(0, 2, 3), correction=0)


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_features_of_a_deep_network_stay_moderate(norm, image):
    cfg = detector_config("faster")
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.NORM = 101, norm
    model = random_student(cfg, image, seed=0)
    assert not model.training
    seen = []
    for module in model.backbone.modules():
        if hasattr(module, "running_var"):
            module.register_forward_hook(lambda module, inputs, output: seen.append(moments(output)))
    with torch.no_grad():
        levels = model.backbone(model.preprocess_image([{"image": image}]).tensor)
    # Of the stem, 33 blocks of three convolutions, and four shortcuts.
    assert len(seen) == 1 + 3 * 33 + 4
    for mean, variance in seen:
        assert mean.abs().max() < 1e-3
        # eps takes its share of a small variance.
        assert variance.median() == pytest.approx(1, abs=1e-2)
    assert all(0.1 < level.std() < 20 for level in levels.values())


def test_heads_get_as_many_proposals_as_the_config_allows(image):
    cfg = detector_config("faster")
    cfg.MODEL.RPN.PRE_NMS_TOPK_TEST, cfg.MODEL.RPN.POST_NMS_TOPK_TEST, cfg.TEST.DETECTIONS_PER_IMAGE = 200, 70, 60
    model = random_student(cfg, image, seed=0)
    pooled = []
    model.roi_heads.box_head.register_forward_hook(lambda module, inputs, output: pooled.append(len(output)))
    with torch.no_grad():
        (found,) = model([{"image": image}])
    assert pooled == [70]
    assert len(found["instances"]) == 60
    assert cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST > 0


def test_a_retinanet_detects_what_the_limit_allows(image):
    model = random_student(detector_config("retinanet"), image, seed=0)
    with torch.no_grad():
        (found,) = model([{"image": image}])
    assert len(found["instances"]) == 100


def test_the_seed_decides(image):
    cfg = detector_config("retinanet")
    first, again, other = (random_student(cfg, image, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    name = "head.cls_score.weight"
    assert not torch.equal(first[name], other[name])
