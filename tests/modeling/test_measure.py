"""The watch over the distillation losses: what it measures, and that it only looks."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.utils.events import EventStorage
from tiny import ARCHITECTURES, training_batch, watched

from gkd_d2.modeling.measure import TermReport, measure_terms
from gkd_d2.modeling.split import split_detector

TERMS = {
    "loss_gkd_gradient": "gradient",
    "loss_bmfi_box": "box",
    "loss_bmfi_attention": "attention",
    "loss_bmfi_image": "image",
    "loss_bmfi_relation": "relation",
}


def test_ratios_by_hand():
    report = TermReport(
        values={("box", "p3"): 0.5, ("box", "p4"): 0.25},
        norms={("box", "p3"): 3.0, ("box", "p4"): 4.0},
        detection={"p3": 12.0, "p4": 5.0},
        boxes=2,
        factor=1.0,
    )
    assert report.norm("box") == pytest.approx(5)
    assert report.scalars() == {
        "gkd_value/box/p3": 0.5,
        "gkd_value/box/p4": 0.25,
        "gkd_ratio/box/p3": 3 / 12,
        "gkd_ratio/box/p4": 4 / 5,
        "gkd_ratio/box": pytest.approx(5 / 13),
    }


def test_ratios_to_no_detection_gradient_are_left_out():
    values = norms = {("box", "p3"): 3.0, ("box", "p4"): 4.0}
    batch = {"boxes": 2, "factor": 1.0}
    some = TermReport(values=values, norms=norms, detection={"p3": 0.0, "p4": 2.0}, **batch).scalars()
    assert {name: value for name, value in some.items() if "ratio" in name} == {
        "gkd_ratio/box/p4": 2.0,
        "gkd_ratio/box": pytest.approx(2.5),
    }
    none = TermReport(values=values, norms=norms, detection={"p3": 0.0, "p4": 0.0}, **batch).scalars()
    assert list(none) == ["gkd_value/box/p3", "gkd_value/box/p4"]


def test_a_loss_that_is_constant_has_no_gradient():
    """As one of objects in a batch without any, or of one level alone; another may depend on parameters instead."""
    parameter = torch.ones((), requires_grad=True)

    def losses(features):
        return [{"loss_a": f.new_zeros(()), "loss_b": 2 * parameter, "loss_c": 3 * f.sum()} for f in features]

    terms = {"loss_a": "a", "loss_b": "b", "loss_c": "c"}
    report = measure_terms(
        losses, {"p3": torch.ones(1, 4, 2, 2)}, [torch.ones(1, 4, 2, 2)], terms=terms, scale=1.0, boxes=0, factor=1.0
    )
    assert report.norms == {("a", "p3"): 0.0, ("b", "p3"): 0.0, ("c", "p3"): 12.0}
    assert report.values[("a", "p3")] == 0.0 and report.values[("b", "p3")] == 2.0


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize(("channels", "scale"), [(16, 1.0), (8, 2.0**10)])
def test_the_report_equals_the_gradients_of_the_step(kind, channels, scale, distiller_config):
    """The step's own graph, loss by loss, back to the features that the student's backbone gave."""
    cfg = distiller_config(kind, channels=channels)
    cfg.GKD.FEATURES = ["p3", "p4", "p5"]
    cfg.GKD.LOSS_WEIGHTS.RELATION = 1e-5
    cfg.GKD.WARMUP_ITERS = 4
    distiller = build_model(cfg).train()
    for parameter in distiller.method.parameters():
        torch.nn.init.normal_(parameter)
    measurement = watched(distiller)
    distiller.gradient_scale = scale
    features = {}
    handle = distiller.student.backbone.register_forward_hook(lambda module, args, output: features.update(output))
    batch = training_batch()
    with EventStorage():
        torch.manual_seed(1)
        losses = distiller(batch)
        handle.remove()
        split = split_detector(distiller.student)
        leaves = {name: feature.detach().requires_grad_() for name, feature in features.items()}
        distiller.student.loss_normalizer = 100
        torch.manual_seed(1)
        sum(split.losses(split.features(batch)[0], leaves, batch).values()).backward()

    report = measurement.report
    assert report.boxes == 4
    assert report.factor == 1 / 4
    levels = ["p3", "p4", "p5"]
    assert list(report.norms) == list(report.values) == [(term, level) for level in levels for term in TERMS.values()]
    for loss, term in TERMS.items():
        total = sum(report.values[term, level] for level in levels)
        assert total == pytest.approx(losses[loss].item(), rel=1e-5), loss
        gradients = torch.autograd.grad(losses[loss], [features[level] for level in levels], retain_graph=True)
        for level, gradient in zip(levels, gradients):
            assert gradient.shape[1] == channels
            assert report.norms[term, level] == pytest.approx(gradient.norm().item(), rel=1e-4), (loss, level)
            assert report.norms[term, level] > 0
    assert report.detection == pytest.approx({level: leaves[level].grad.norm().item() for level in levels}, rel=1e-4)


def test_losses_of_weight_0_are_not_in_the_report(distiller_config):
    """Without the map loss the student's gradients are computed for the report alone."""
    cfg = distiller_config("retinanet")
    cfg.GKD.LOSS_WEIGHTS.GRADIENT = cfg.GKD.LOSS_WEIGHTS.BOX = 0.0
    cfg.GKD.WEIGHTING = "uniform"
    distiller = build_model(cfg).train()
    measurement = watched(distiller)
    with EventStorage():
        distiller(training_batch())
    assert {term for term, _ in measurement.report.norms} == {"attention", "image"}
    assert list(measurement.report.detection) == distiller.student_features
    assert all(norm > 0 for norm in measurement.report.detection.values())


@pytest.mark.parametrize(
    ("kind", "channels", "gradient", "dtype"), [("faster", 8, 0.5, None), ("retinanet", 16, 0.0, torch.bfloat16)]
)
def test_measuring_changes_nothing(kind, channels, gradient, dtype, distiller_config):
    cfg = distiller_config(kind, channels=channels)
    cfg.GKD.LOSS_WEIGHTS.GRADIENT = gradient
    batch = training_batch()
    results = []
    for watch in (False, True):
        torch.manual_seed(5)
        distiller = build_model(cfg).train()
        measurement = watched(distiller)
        measurement.wanted = watch
        optimizer = build_optimizer(cfg, distiller)
        history = []
        with EventStorage() as storage:
            for _ in range(3):
                with torch.autocast("cpu", dtype, enabled=dtype is not None):
                    losses = distiller(batch)
                optimizer.zero_grad()
                sum(losses.values()).backward()
                optimizer.step()
                storage.step()
                history.append({name: value.item() for name, value in losses.items()})
        assert (measurement.report is not None) == watch
        results.append((history, distiller.state_dict(), torch.get_rng_state(), list(storage.histories())))
    (off, off_state, off_rng, off_scalars), (on, on_state, on_rng, on_scalars) = results
    assert off == on
    assert off[0] != off[2]
    assert all(torch.equal(value, on_state[name]) for name, value in off_state.items())
    assert torch.equal(off_rng, on_rng)
    assert off_scalars == on_scalars
