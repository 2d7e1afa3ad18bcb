"""Distilled training steps with the compiled losses, on every device."""

from __future__ import annotations

import math

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from devices import DEVICES
from tiny import ARCHITECTURES, train, training_batch

from gkd_d2.losses import fused

NAMES = ("loss_gkd_gradient", "loss_bmfi_box", "loss_bmfi_attention", "loss_bmfi_image")


@pytest.fixture
def build(distiller_config):
    """A function that builds a tiny distiller on a device; the weights do not depend on it."""

    def make(kind, device):
        cfg = distiller_config(kind, channels=8)
        cfg.MODEL.DEVICE = device
        cfg.GKD.IMPLEMENTATION = "fused"
        cfg.SOLVER.BASE_LR = 0.02
        torch.manual_seed(5)
        return build_model(cfg).train(), cfg

    return make


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_steps_teach_the_student_and_leave_the_teacher(kind, device, build, monkeypatch):
    distiller, cfg = build(kind, device)
    used = []
    compute = fused.distillation_losses
    monkeypatch.setattr(fused, "distillation_losses", lambda *a, **o: used.append(a[0][0].device) or compute(*a, **o))
    teacher = distiller._teacher.model
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    history = train(distiller, cfg, training_batch(((90, 120), (96, 100), (64, 64))), 12)
    assert {place.type for place in used} == {device} and len(used) == 12
    assert all(math.isfinite(value) for losses in history for value in losses.values())
    assert all(losses[name] > 0 for losses in history for name in NAMES)
    first, last = (sum(sum(losses.values()) for losses in part) for part in (history[:3], history[-3:]))
    assert last < first
    for name, parameter in distiller.named_parameters():
        assert parameter.device.type == device
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize("device", DEVICES)
def test_losses_and_gradients_are_those_of_the_cpu(device, build):
    """Of RetinaNet, which draws no samples; in float64, for GPUs compute convolutions of float32 with fewer digits."""
    results = []
    for place in ("cpu", device):
        distiller, _ = build("retinanet", place)
        distiller = distiller.double()
        torch.manual_seed(1)
        with EventStorage():
            losses = distiller(training_batch())
        sum(losses.values()).backward()
        results.append((losses, {name: parameter.grad.cpu() for name, parameter in distiller.named_parameters()}))
    (wanted, wanted_gradients), (losses, gradients) = results
    assert losses.keys() == wanted.keys() and set(NAMES) < losses.keys()
    for name, value in losses.items():
        assert value.device.type == device
        assert value.item() == pytest.approx(wanted[name].item(), rel=1e-8), name
    for name, gradient in gradients.items():
        expected = wanted_gradients[name]
        assert (gradient - expected).abs().max() <= 1e-7 * expected.abs().max(), name
