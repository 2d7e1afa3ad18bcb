"""Splits are the detectors' own forward, to the bit."""

import copy
import math

import pytest
import torch
from detectron2.modeling import GeneralizedRCNN, RetinaNet, build_model
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.utils.events import EventStorage
from tiny import ARCHITECTURES, Scorer, SplitScorer, detector_config, training_batch

from gkd_d2.modeling.feature_gradients import feature_gradients
from gkd_d2.modeling.split import (
    SplitGeneralizedRCNN,
    SplitRetinaNet,
    load_running_state,
    register_split,
    registry,
    running_state,
    split_detector,
)


@pytest.mark.parametrize("kind", ["faster", "cascade", "mask", "retinanet"])
def test_split_is_bit_equal_to_own_forward(kind):
    model = build_model(detector_config(kind)).train()
    twin = copy.deepcopy(model)
    batch = training_batch(((90, 120), (96, 100), (64, 64)), masks=kind == "mask")
    split = split_detector(twin)
    with EventStorage(), EventStorage() as storage:
        for _ in range(2):  # RetinaNet's normaliser moves with every call
            torch.manual_seed(3)
            losses = model(batch)
            state = torch.get_rng_state()
            torch.manual_seed(3)
            split_losses = split.losses(*split.features(batch), batch)
            assert torch.equal(state, torch.get_rng_state())
            assert list(losses) == list(split_losses)
            for name in losses:
                assert torch.equal(losses[name], split_losses[name]), name
        sum(losses.values()).backward()
        sum(split_losses.values()).backward()
        assert storage.histories()
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or torch.equal(p.grad, q.grad), name
    for name, p in model.state_dict().items():
        assert torch.equal(p, twin.state_dict()[name]), name


@pytest.mark.parametrize("kind", ["faster", "retinanet"])
def test_training_pictures_are_made_as_by_the_detector(kind):
    cfg = detector_config(kind)
    cfg.VIS_PERIOD = 1
    model = build_model(cfg).train()
    batch = training_batch()
    pictures = []
    for compute in (model, lambda b: split_detector(model).losses(*split_detector(model).features(b), b)):
        with EventStorage() as storage:
            torch.manual_seed(3)
            compute(batch)
            pictures.append([name for name, *_ in storage._vis_data])
    assert pictures[0] == pictures[1]


def test_what_the_heads_use():
    faster, retinanet = (split_detector(build_model(detector_config(kind))) for kind in ("faster", "retinanet"))
    assert faster.head_features() == {"p2", "p3", "p4", "p5", "p6"}
    assert faster.pooled_features() == {"p6"}
    assert retinanet.head_features() == {"p3", "p4", "p5", "p6", "p7"}
    assert retinanet.pooled_features() == set()
    # By what makes the level, for pyramids of other classes have it too.
    retinanet.model.backbone.top_block = LastLevelMaxPool()
    assert retinanet.pooled_features() == {"p7"}
    assert faster.num_classes == retinanet.num_classes == 3


def test_other_meta_architectures_are_refused():
    with pytest.raises(
        ValueError, match="Linear can't be distilled: known .* GeneralizedRCNN, RetinaNet .*own_detector"
    ):
        split_detector(torch.nn.Linear(1, 1))


@pytest.fixture
def forgetful(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(registry, "_SPLITS", dict(registry._SPLITS))


def test_a_registered_split_is_used_by_the_distiller(forgetful, distiller_config):
    cfg = distiller_config("scorer", channels=8)
    with pytest.raises(ValueError, match="Scorer can't be distilled"):
        build_model(cfg)
    assert register_split(Scorer)(SplitScorer) is SplitScorer
    distiller = build_model(cfg).train()
    assert distiller.student_features == ["p3", "p4"]
    teacher = distiller._teacher.model
    with EventStorage():
        losses = distiller(training_batch())
    assert list(losses)[:2] == ["loss_p3", "loss_p4"]
    assert all(value > 0 for value in losses.values())
    # The student's moving average has moved, the teacher's was put back.
    assert (distiller.student.average == 100.0, teacher.average) == (False, 100.0)
    distillation = sum(value for name, value in losses.items() if name.startswith(("loss_gkd", "loss_bmfi")))
    stem = distiller.student.backbone.bottom_up.stem.conv1.weight
    (gradient,) = torch.autograd.grad(distillation, stem)
    assert torch.isfinite(gradient).all() and gradient.abs().max() > 0


def test_the_nearest_class_with_a_split_decides(forgetful):
    class Derived(RetinaNet):
        pass

    class MoreDerived(Derived):
        pass

    class SplitDerived(SplitRetinaNet):
        running_attributes = ("average",)

    model = build_model(detector_config("retinanet"))
    model.average, model.loss_normalizer = 7.0, 8.0
    model.__class__ = MoreDerived
    assert type(split_detector(model)) is SplitRetinaNet
    assert running_state(model) == {"loss_normalizer": 8.0}
    register_split(Derived)(SplitDerived)
    assert type(split_detector(model)) is SplitDerived
    assert running_state(model) == {"average": 7.0}
    load_running_state(model, {"average": 9.0})
    assert model.average == 9.0
    assert running_state(torch.nn.Linear(1, 1)) == {}
    model.__class__ = RetinaNet
    assert type(split_detector(model)) is SplitRetinaNet


def test_a_derived_class_with_its_own_forward_is_refused(forgetful):
    """PanopticFPN's has the losses of a semantic head too, which the split of GeneralizedRCNN would leave out."""
    cfg = detector_config("mask")
    cfg.MODEL.META_ARCHITECTURE = "PanopticFPN"
    model = build_model(cfg)
    assert isinstance(model, GeneralizedRCNN)
    with pytest.raises(ValueError, match="PanopticFPN can't be distilled as a GeneralizedRCNN: .*register one"):
        split_detector(model)
    register_split(type(model))(SplitGeneralizedRCNN)
    assert type(split_detector(model)) is SplitGeneralizedRCNN


def test_wrong_registrations_are_refused(forgetful):
    with pytest.raises(ValueError, match="RetinaNet has a split already: SplitRetinaNet"):
        register_split(RetinaNet)(SplitRetinaNet)
    with pytest.raises(TypeError, match="split of Scorer .*tiny.Scorer.* must derive from SplitDetector"):
        register_split(Scorer)(Scorer)
    with pytest.raises(TypeError, match="given .*SplitScorer.* but must be given the detector's class"):
        register_split(SplitScorer)  # the decorator without its argument
    assert Scorer not in registry._SPLITS


def test_batch_without_ground_truth_is_refused():
    split = split_detector(build_model(detector_config("faster")).train())
    batch = training_batch()
    del batch[1]["instances"]
    with EventStorage(), pytest.raises(ValueError, match="without 'instances'"):
        split.losses(*split.features(batch), batch)


def test_feature_gradients_equal_a_finite_difference():
    split = split_detector(build_model(detector_config("retinanet")).train().double())
    batch = training_batch()
    with EventStorage():
        with torch.no_grad():
            images, features = split.features(batch)
        features = {name: f.detach().requires_grad_() for name, f in features.items()}

        def loss(shift):
            split.model.loss_normalizer = 100
            moved = features | {"p4": features["p4"].detach() + shift}
            return sum(split.losses(images, moved, batch).values()).item()

        split.model.loss_normalizer = 100
        (gradient,) = feature_gradients(split.losses(images, features, batch), features, ["p4"], retain_graph=False)
        # Along the gradient itself: Detectron2 keeps anchors and targets in float32, so a small slope would drown.
        direction = gradient / gradient.norm()
        slope = (loss(1e-2 * direction) - loss(-1e-2 * direction)) / 2e-2
    assert slope == pytest.approx(gradient.norm().item(), rel=1e-2)


def test_a_level_without_part_in_the_losses_is_named():
    used, unused = (torch.ones(1, requires_grad=True) for _ in range(2))
    with pytest.raises(RuntimeError, match="levels p9 have no part in the losses loss_cls"):
        feature_gradients({"loss_cls": 2 * used}, {"p2": used, "p9": unused}, ["p2", "p9"], retain_graph=False)
    with pytest.raises(RuntimeError, match="returned no loss"):
        feature_gradients({}, {"p2": used}, ["p2"], retain_graph=False)


# --- anchors


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_anchors_are_those_that_the_detector_uses(kind, offset):
    cfg = detector_config(kind)
    cfg.MODEL.ANCHOR_GENERATOR.OFFSET = offset
    model = build_model(cfg).train()
    split = split_detector(model)
    generator, levels = split.anchor_generator()
    used = []
    handle = generator.register_forward_hook(lambda module, args, output: used.extend(output))
    batch = training_batch()
    with EventStorage():
        images, features = split.features(batch)
        split.losses(images, features, batch)
    handle.remove()
    sizes = {name: (*features[name].shape[2:], -1, 4) for name in levels}
    expected = {name: boxes.tensor.view(sizes[name]) for name, boxes in zip(levels, used)}
    everywhere = split.anchors({name: features[name] for name in levels})
    assert list(everywhere) == levels
    assert all(torch.equal(anchors, expected[name]) for name, anchors in everywhere.items())
    # A level by itself has the same ones, and each lies about its cell.
    (p4,) = split.anchors({"p4": features["p4"]}).values()
    assert torch.equal(p4, expected["p4"])
    centres = (p4[..., :2] + p4[..., 2:]) / 2
    stride = split.output_shape()["p4"].stride
    assert centres[1, 2].tolist() == [pytest.approx([(2 + offset) * stride, (1 + offset) * stride])] * centres.shape[2]


def test_levels_and_detectors_without_anchors():
    split = split_detector(build_model(detector_config("faster")))
    with pytest.raises(ValueError, match="GeneralizedRCNN has none at res2, p9"):
        split.anchors({"p3": torch.zeros(1, 1, 2, 2), "res2": torch.zeros(1, 1, 2, 2), "p9": torch.zeros(1, 1, 2, 2)})
    split.model.proposal_generator = None
    assert split.anchor_generator() is None
    with pytest.raises(ValueError, match="GeneralizedRCNN has none at p3"):
        split.anchors({"p3": torch.zeros(1, 1, 2, 2)})


# --- scores of cells


@pytest.mark.parametrize(("kind", "levels"), [("faster", 5), ("retinanet", 5)])
def test_scores_are_the_largest_probabilities_that_the_detector_finds_in_a_cell(kind, levels):
    cfg = detector_config(kind)
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[size, 2 * size] for size in (8, 16, 32, 64, 128)]
    model = build_model(cfg).eval()
    split = split_detector(model)
    head = model.proposal_generator.rpn_head if kind == "faster" else model.head
    logits = []
    # A RetinaNet's inference overwrites them.
    handle = head.register_forward_hook(lambda module, args, output: logits.extend(x.clone() for x in output[0]))
    batch = training_batch()
    with torch.no_grad():
        model(batch)
        _, features = split.features(batch)
        handle.remove()
        scores = split.score_maps(features)
    assert list(scores) == [f"p{(2 if kind == 'faster' else 3) + level}" for level in range(levels)]
    for name, level in zip(scores, logits):
        n, channels, height, width = level.shape
        # 2 sizes of 3 shapes, and 3 classes.
        assert channels == (6 if kind == "faster" else 18)
        assert (n, height, width) == (2, *features[name].shape[2:])
        expected = [
            [[max(1 / (1 + math.exp(-logit)) for logit in cell) for cell in row] for row in image]
            for image in level.movedim(1, 3).tolist()
        ]
        torch.testing.assert_close(scores[name], torch.tensor(expected))


def test_detectors_whose_heads_score_no_cell():
    split = split_detector(build_model(detector_config("faster")))
    split.model.proposal_generator = None
    assert split.score_maps({"p3": torch.zeros(1, 16, 2, 2)}) == {}
    assert SplitScorer(build_model(detector_config("scorer"))).score_maps({"p3": torch.zeros(1, 16, 2, 2)}) == {}
