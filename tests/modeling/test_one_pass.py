"""One backward pass through the heads gives what two give."""

import subprocess
import sys

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.proposal_generator import proposal_utils
from detectron2.utils.events import EventStorage
from devices import DEVICES
from distributed_steps import build, nms
from tiny import training_batch, watched

from gkd_d2.modeling.one_pass import one_pass_losses

ALL = (0.5, 1e-3, 5e-4, 1e-3)


def accumulate(distiller, parts):
    """The losses of each part, and the parameters' gradients of the parts' mean."""
    torch.manual_seed(5)
    history = []
    with EventStorage():
        for part in parts:
            losses = distiller(part)
            (sum(losses.values()) / len(parts)).backward()
            history.append(losses)
    return history, {name: p.grad for name, p in distiller.named_parameters()}


def in_both_ways(cfg, parts):
    """What a float64 distiller gives with one pass and with two."""
    results = []
    for one_pass in (True, False):
        cfg.GKD.ONE_PASS = one_pass
        distiller = build(cfg)
        # With it the student's gradients are computed whether or not a loss needs them.
        watched(distiller)
        results.append(accumulate(distiller, parts))
    return results


@pytest.mark.parametrize(
    ("kind", "channels", "weights", "levels"),
    [
        ("faster", 16, ALL, []),
        ("faster", 8, ALL, []),
        ("faster", 16, (0.5, 0.0, 0.0, 0.0), ["p4"]),
        ("retinanet", 8, (*ALL, 1e-5), []),
        ("retinanet", 16, (0.0, 1e-3, 0.0, 0.0), ["p5", "p6"]),
        ("cascade", 8, (0.5, 0.0, 5e-4, 1e-3), []),
        ("mask", 16, ALL, []),
    ],
)
def test_losses_and_gradients_are_those_of_two_passes(kind, channels, weights, levels, distiller_config, monkeypatch):
    """In float64, of a batch in two parts; levels that are not distilled, or pooled, carry their gradients too."""
    monkeypatch.setattr(proposal_utils, "batched_nms", nms)
    cfg = distiller_config(kind, channels=channels)
    cfg.GKD.FEATURES = levels
    for key, weight in zip(("GRADIENT", "BOX", "ATTENTION", "IMAGE", "RELATION"), weights):
        cfg.GKD.LOSS_WEIGHTS[key] = weight
    batch = training_batch(((90, 120), (96, 100), (64, 64)), masks=kind == "mask")
    (ours, gradients), (expected, expected_gradients) = in_both_ways(cfg, [batch[:1], batch[1:]])
    for part, expected_part in zip(ours, expected):
        assert list(part) == list(expected_part)
        for name, value in expected_part.items():
            assert torch.equal(part[name], value), name
    assert any("align" in name for name in gradients) == (channels == 8)
    for name, gradient in expected_gradients.items():
        if gradient is None:
            assert gradients[name] is None, name
        else:
            assert (gradients[name] - gradient).abs().max() <= 1e-12 * gradient.abs().max(), name
    assert all(gradient is not None for name, gradient in gradients.items() if "backbone" not in name)


@pytest.mark.parametrize(("one_pass", "passes"), [(True, 1), (False, 2)])
def test_number_of_passes(one_pass, passes, distiller_config):
    cfg = distiller_config("faster")
    cfg.GKD.ONE_PASS = one_pass
    distiller = build_model(cfg).train()
    calls = []
    head = distiller.student.roi_heads.box_head
    head.register_full_backward_hook(lambda *_: calls.append(head))
    accumulate(distiller, [training_batch()])
    assert len(calls) == passes


def test_half_precision(distiller_config):
    cfg = distiller_config("retinanet", channels=8)
    parts = [training_batch((size,)) for size in ((90, 120), (96, 100))]
    results = []
    for one_pass in (True, False):
        cfg.GKD.ONE_PASS = one_pass
        torch.manual_seed(3)
        distiller = build_model(cfg).train()
        distiller.gradient_scale = 2.0**16
        with torch.autocast("cpu", torch.bfloat16):
            results.append(accumulate(distiller, parts))
    (ours, gradients), (expected, expected_gradients) = results
    assert all(torch.equal(ours[0][name], value) for name, value in expected[0].items())
    for name, gradient in expected_gradients.items():
        assert (gradients[name] - gradient).abs().max() <= 2**-7 * gradient.abs().max(), name


def test_an_unknown_scaler_in_float16_gets_two_passes(distiller_config):
    """It would scale stored gradients that have underflowed already."""
    distiller = build_model(distiller_config("retinanet")).train()
    weight = distiller.student.head.cls_score.weight
    with EventStorage():
        for scale, refused in ((1.0, False), (2.0**10, True)):
            distiller.gradient_scale = scale
            with torch.autocast("cpu", torch.float16):
                losses = distiller(training_batch())
            if refused:
                with pytest.raises(RuntimeError, match="unequal weights"):
                    torch.autograd.grad(losses["loss_cls"], weight)
            else:
                (gradient,) = torch.autograd.grad(losses["loss_cls"], weight)
                assert gradient.abs().max() > 0


def test_a_hook_changes_a_gradient_once(distiller_config):
    distiller = build_model(distiller_config("retinanet")).train()
    weight = distiller.student.head.cls_score.weight
    batch = training_batch()
    found = []
    for _ in range(2):
        distiller.student.loss_normalizer = 100
        distiller.zero_grad()
        accumulate(distiller, [batch])
        found.append(weight.grad.clone())
        weight.register_hook(lambda gradient: gradient / 2)
    torch.testing.assert_close(found[1], found[0] / 2)


def test_unequal_weights_are_refused(distiller_config):
    distiller = build_model(distiller_config("retinanet")).train()
    head = distiller.student.head.cls_score.weight
    stem = distiller.student.backbone.bottom_up.stem.conv1.weight

    def losses():
        with EventStorage():
            torch.manual_seed(5)
            distiller.student.loss_normalizer = 100
            return distiller(training_batch())

    for change in (lambda own: own["loss_cls"], lambda own: own["loss_cls"] + 2 * own["loss_box_reg"]):
        with pytest.raises(RuntimeError, match="unequal weights.*set GKD.ONE_PASS to False"):
            change(losses()).backward()
        assert head.grad is None
        distiller.one_pass = False
        change(losses()).backward()
        assert head.grad.abs().max() > 0
        distiller.one_pass = True
        distiller.zero_grad()
    # Without them, or with a common weight of 0, the distillation losses alone train.
    distillation = [value for name, value in losses().items() if name.startswith(("loss_gkd", "loss_bmfi"))]
    (alone,) = torch.autograd.grad(sum(distillation), stem)
    sum(value * float(name.startswith(("loss_gkd", "loss_bmfi"))) for name, value in losses().items()).backward()
    assert torch.equal(head.grad, torch.zeros_like(head))
    torch.testing.assert_close(stem.grad, alone)


WEIGH = """
import sys
import torch
from gkd_d2.modeling.one_pass import one_pass_losses

for weight in (1, 2):
    x = torch.ones(3, device=sys.argv[1], requires_grad=True)
    heads = lambda given: {"a": given["p2"].sum(), "b": given["p2"].square().sum()}
    losses, _ = one_pass_losses(heads, {"p2": 1 * x}, ["p2"], [])
    (losses["a"] + weight * losses["b"]).backward()
    print(x.grad.tolist(), flush=True)
"""


@pytest.mark.parametrize("device", DEVICES)
def test_unequal_weights_end_the_process(device):
    """Those of the second step: on a GPU nothing waits for the assertion, which leaves the device unusable."""
    done = subprocess.run([sys.executable, "-c", WEIGH, device], capture_output=True, text=True)
    assert done.stdout == "[3.0, 3.0, 3.0]\n", done.stderr
    assert done.returncode != 0
    assert {"cpu": "unequal weights", "cuda": "device-side assert"}[device] in done.stderr


def test_heads_under_torch_compile(distiller_config):
    """Two passes through a compiled graph fail where it gives its buffers away."""
    distiller = build_model(distiller_config("faster")).train()
    batch = training_batch()
    (expected,), gradients = accumulate(distiller, [batch])
    gradients = {name: gradient.clone() for name, gradient in gradients.items() if gradient is not None}
    distiller.zero_grad()
    distiller.student.roi_heads.box_head.compile(backend="aot_eager")
    distiller.student.proposal_generator.rpn_head.compile(backend="aot_eager")
    (losses,), compiled = accumulate(distiller, [batch])
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, msg=name)
    for name, gradient in gradients.items():
        assert (compiled[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max(), name


def test_numbers_by_hand():
    """Of a = sum of w x and b = sum of x^2: w + 2x with respect to x, sum of x with respect to w."""
    x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    w, unused, frozen = (torch.tensor(value, requires_grad=value < 7) for value in (5.0, 6.0, 7.0))
    features = {"p2": 1 * x, "p3": torch.ones(1)}

    def heads(given):
        assert not given["p3"].requires_grad
        return {"a": (w * frozen / 7 * given["p2"]).sum(), "b": given["p2"].square().sum() * given["p3"].sum()}

    losses, (gradient,) = one_pass_losses(heads, features, ["p2"], [w, unused, frozen], scale=2.0**16)
    assert {name: value.item() for name, value in losses.items()} == {"a": 30.0, "b": 14.0}
    assert gradient.tolist() == [2.0**16 * 7, 2.0**16 * 9, 2.0**16 * 11]
    # As a scaler and two parts of a batch would have it, and then twice the same.
    total = 2.0**16 * sum(losses.values()) / 2
    total.backward(retain_graph=True)
    assert x.grad.tolist() == [2.0**15 * 7, 2.0**15 * 9, 2.0**15 * 11]
    assert w.grad.item() == 2.0**15 * 6
    total.backward()
    assert w.grad.item() == 2.0**16 * 6
    assert unused.grad is None and frozen.grad is None
    with pytest.raises(RuntimeError, match="second time"):
        total.backward()
    losses, _ = one_pass_losses(heads, {"p2": 1 * x, "p3": torch.ones(1)}, ["p2"], [w])
    (float("nan") * sum(losses.values())).backward()
    assert w.grad.isnan()


def test_what_cannot_be_differentiated_is_named():
    features = {"p2": torch.ones(2, requires_grad=True), "p9": torch.ones(2, requires_grad=True)}
    with pytest.raises(RuntimeError, match="levels p9 have no part in the losses a"):
        one_pass_losses(lambda given: {"a": given["p2"].sum()}, features, ["p2", "p9"], [])
    with pytest.raises(RuntimeError, match="returned no loss"):
        one_pass_losses(lambda given: {}, features, ["p2"], [])
