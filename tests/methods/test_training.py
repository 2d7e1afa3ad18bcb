"""Every method in the distiller, on tiny detectors."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from tiny import ARCHITECTURES, Scorer, SplitScorer, train, training_batch, watched, with_sure_teacher

from gkd_d2 import register_split
from gkd_d2.config import detector_config
from gkd_d2.methods import build_method
from gkd_d2.modeling.split import registry

FEATURE_METHODS = ("fitnet", "fgfi", "fgd", "pkd")
RESPONSE_METHODS = ("crosskd", "logits")
METHODS = (*FEATURE_METHODS, *RESPONSE_METHODS)
# At which each loss of a tiny detector falls, in the order of the method's terms.
WEIGHTS = {
    "fitnet": [0.2],
    "fgfi": [0.02],
    "fgd": [5e-4, 5e-4, 5e-4, 1e-5],
    "pkd": [2.0],
    "crosskd": [1.0, 1.0],
    "logits": [1.0, 1.0],
}


def weighted(cfg, name):
    """The config with a method and WEIGHTS; its teacher predicts other things for other cells."""
    with_sure_teacher(cfg, 10.0)
    cfg.GKD.METHOD = name
    keys = [term.key for term in build_method(cfg).terms.values()]
    cfg.merge_from_list([item for pair in zip(keys, WEIGHTS[name]) for item in pair])
    return cfg


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("name", METHODS)
def test_losses_fall_on_a_repeated_batch(kind, name, distiller_config):
    cfg = weighted(distiller_config(kind, channels=8), name)
    cfg.SOLVER.BASE_LR = 0.005 if name in RESPONSE_METHODS else 0.02
    distiller = build_model(cfg).train()
    assert list(distiller.align) == (distiller.student_features if name != "logits" else [])
    learned = None
    if name in RESPONSE_METHODS:
        # What a random teacher predicts contradicts the ground truth.
        learned = distiller.method.terms
        # A RetinaNet's losses grow while its normaliser falls from 100.
        distiller.student.loss_normalizer = 5.0
    history = train(distiller, cfg, training_batch(), 20, learned)
    for key in distiller.method.terms:
        first, last = (sum(losses[key] for losses in part) for part in (history[:3], history[-3:]))
        assert 0 < last < 0.8 * first, key


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("name", METHODS)
def test_the_watch_sees_every_loss_at_every_level(kind, name, distiller_config):
    """With the warm-up, an image without boxes, and losses that are the sums of what the levels' values are."""
    cfg = distiller_config(kind, channels=8)
    cfg.GKD.METHOD, cfg.GKD.WARMUP_ITERS = name, 4
    distiller = build_model(cfg).train()
    measurement = watched(distiller)
    with EventStorage():
        losses = distiller(training_batch(((90, 120), (96, 100), (64, 64))))
    report = measurement.report
    for key, term in distiller.method.active().items():
        values = [report.values[term, level] for level in distiller.student_features]
        assert sum(values) == pytest.approx(losses[key].item(), rel=1e-5)
        alive = [report.norms[term, level] > 0 for level in distiller.student_features]
        # Objects may cover a level of few cells, which has no background then; they are near anchors of their size.
        assert any(alive) if term in ("background", "fgfi") else all(alive)


@pytest.mark.parametrize("name", FEATURE_METHODS)
def test_the_teachers_heads_do_not_run(name, distiller_config, monkeypatch):
    cfg = distiller_config("faster")
    cfg.GKD.METHOD = name
    distiller = build_model(cfg).train()
    for heads in ("losses", "predictions", "cell_predictions", "region_predictions"):
        monkeypatch.setattr(distiller._teacher.split, heads, None)
    with EventStorage():
        assert distiller.method.terms.keys() < distiller(training_batch()).keys()


@pytest.mark.parametrize("name", METHODS)
def test_autocast(name, distiller_config):
    """The losses stay float32, and near those of a training without it."""
    cfg = weighted(distiller_config("retinanet", channels=8), name)
    distiller, batch = build_model(cfg).train(), training_batch()
    results = []
    for enabled in (False, True):
        with EventStorage(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            results.append(distiller(batch))
    for key in distiller.method.terms:
        plain, half = (losses[key] for losses in results)
        assert half.dtype == torch.float32
        # Those of boxes and classes are far from linear in what the sure teacher's heads compute in bfloat16.
        torch.testing.assert_close(half, plain, rtol=0.2 if name in RESPONSE_METHODS else 0.05, atol=0)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_none_trains_exactly_as_the_student_alone(kind, distiller_config):
    cfg = distiller_config(kind, channels=8)
    cfg.GKD.METHOD = "none"
    batch, results = training_batch(), []
    for config in (cfg, detector_config(cfg)):
        torch.manual_seed(5)
        model = build_model(config).train()
        if config is cfg:
            # The teacher does not run at all.
            model._teacher.observe = None
        results.append((train(model, config, batch, 3), model.state_dict(), torch.rand(4)))
    (distilled, distilled_state, draw), (alone, alone_state, alone_draw) = results
    assert distilled == alone
    assert list(distilled_state) == list(alone_state)
    assert all(torch.equal(value, alone_state[name]) for name, value in distilled_state.items())
    assert torch.equal(draw, alone_draw)


def test_a_loss_that_the_student_has_already_is_refused(distiller_config):
    distiller = build_model(weighted(distiller_config("retinanet"), "fitnet")).train()
    distiller.method.terms["loss_cls"] = distiller.method.terms.pop("loss_fitnet")
    distiller.method.level_losses = lambda level: {"loss_cls": level.student.mean()}
    with EventStorage(), pytest.raises(ValueError, match="calls a loss loss_cls, which is the name of one of the stud"):
        distiller(training_batch())


def test_a_level_without_anchors_is_refused(distiller_config):
    """The region proposal network does not look at p2, which the ROI heads use."""
    cfg = distiller_config("faster")
    cfg.GKD.METHOD = "fgfi"
    cfg.MODEL.RPN.IN_FEATURES = ["p3", "p4", "p5", "p6"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16]]
    with pytest.raises(ValueError, match="GKD.METHOD asks for anchors, but GeneralizedRCNN has none at p2: choose"):
        build_model(cfg)


def test_a_detector_without_anchors_is_refused(distiller_config, monkeypatch):
    monkeypatch.setattr(registry, "_SPLITS", dict(registry._SPLITS))
    register_split(Scorer)(SplitScorer)
    cfg = distiller_config("scorer")
    cfg.GKD.METHOD = "fgfi"
    with pytest.raises(ValueError, match="but Scorer has none at p3, p4: choose"):
        build_model(cfg)
    cfg.GKD.METHOD = "fgd"
    assert build_model(cfg).student_features == ["p3", "p4"]
