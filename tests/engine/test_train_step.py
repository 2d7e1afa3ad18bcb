"""One optimizer step: parts of a batch, half precision, overflows, images that spoil it, and its random stream."""

import copy
import math
import random

import numpy as np
import pytest
import torch
from detectron2.data.samplers import TrainingSampler
from detectron2.engine.hooks import HookBase
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.utils.events import EventStorage
from tiny import ARCHITECTURES, training_batch
from torch import nn
from torch.utils.data import DataLoader

from gkd_d2.config import detector_config
from gkd_d2.data.loader import BatchSampler, SeededDataset
from gkd_d2.engine.train_step import MAX_SKIPPED_STEPS, TrainStep

NAMES = ("loss_gkd_gradient", "loss_bmfi_box", "loss_bmfi_attention", "loss_bmfi_image")
SIZES = ((90, 120), (96, 100), (80, 110), (64, 96))


def images(sizes=SIZES):
    """Samples with a file name and two boxes each."""
    samples = [training_batch([size])[0] for size in sizes]
    return [{**sample, "file_name": f"image_{index}.png"} for index, sample in enumerate(samples)]


def train_step(model, cfg, samples, *, batch_size=2, **options):
    """A TrainStep over the project's own loader, which repeats ``samples`` in their order."""
    loader = DataLoader(
        SeededDataset(samples, dict, seed=0),
        batch_sampler=BatchSampler(TrainingSampler(len(samples), shuffle=False), batch_size, None),
        collate_fn=list,
    )
    return TrainStep(model, loader, build_optimizer(cfg, model), **{"seed": 0, **options})


def run(step, first, last):
    """Iterations ``first`` to ``last`` - 1; returns their scalars, name -> one number an iteration."""
    step.start(first)
    step.train(first, last)
    return {name: [value for value, _ in history.values()] for name, history in step.storage.histories().items()}


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def equal(ours, theirs):
    return all(torch.equal(value, theirs[name]) for name, value in ours.items())


class BeforeStep(HookBase):
    """Calls a function with the iteration before each step."""

    def __init__(self, function):
        self._function = function

    def before_step(self):
        self._function(self.trainer.iter)


class Linear(nn.Module):
    """The dot product of two weights and the inputs' mean, whose gradient is that mean."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            self.layer.weight.copy_(torch.tensor([[1.0, 2.0]]))

    def forward(self, batch):
        return {"loss_dot": self.layer(torch.stack([x["input"] for x in batch])).mean()}


def linear_config(cfg):
    """A plain gradient descent of rate 0.5."""
    cfg.SOLVER.BASE_LR = 0.5
    cfg.SOLVER.MOMENTUM = cfg.SOLVER.WEIGHT_DECAY = 0.0
    return cfg


# --- parts of a batch


@pytest.mark.parametrize(("kind", "parts"), [("faster", 2), ("retinanet", 4)])
def test_a_batch_in_parts_takes_one_step_by_the_mean_gradient(kind, parts, distiller_config):
    cfg = distiller_config(kind, channels=8)
    # Every anchor and proposal is taken, so that nothing depends on random draws.
    cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 8000
    cfg.SOLVER.BASE_LR = 0.01
    samples = images()
    model = build_model(cfg).double()
    reference = copy.deepcopy(model).train()
    step = train_step(model, cfg, samples, batch_size=4, accumulate_steps=parts)
    scalars = run(step, 0, 2)

    optimizer = build_optimizer(cfg, reference)
    with EventStorage() as storage:
        for iteration in range(2):
            size = 4 // parts
            losses = [reference(samples[first : first + size]) for first in range(0, 4, size)]
            trained = dict(reference.named_parameters())
            gradients = [torch.autograd.grad(sum(loss.values()), trained.values()) for loss in losses]
            for parameter, *summands in zip(trained.values(), *gradients):
                parameter.grad = torch.stack(summands).mean(dim=0)
            optimizer.step()
            storage.step()
            for name in losses[0]:
                mean = sum(loss[name].item() for loss in losses) / parts
                assert scalars[name][iteration] == pytest.approx(mean, rel=1e-6), name
    ours = dict(model.named_parameters())
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(ours[name].grad, parameter.grad, rtol=1e-8, atol=1e-12, msg=name)
        torch.testing.assert_close(ours[name], parameter, rtol=1e-8, atol=1e-12, msg=name)


def test_a_batch_in_one_part_equals_detectron2s_step(distiller_config):
    """The plain detector: nothing of the distiller's is needed."""
    cfg = detector_config(distiller_config("retinanet"))
    samples = images()
    model = build_model(cfg)
    alone = copy.deepcopy(model).train()
    run(train_step(model, cfg, samples), 0, 2)
    optimizer = build_optimizer(cfg, alone)
    with EventStorage():
        for batch in (samples[:2], samples[2:]):
            optimizer.zero_grad()
            sum(alone(batch).values()).backward()
            optimizer.step()
    assert equal(weights(model), weights(alone))


# --- half precision


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    # Gradient (0.375, 0.5): its norm is 0.625.
    [("norm", 0.25, (1 - 0.5 * 0.15, 2 - 0.5 * 0.2)), ("value", 0.4375, (1 - 0.5 * 0.375, 2 - 0.5 * 0.4375))],
)
@pytest.mark.parametrize("amp_dtype", [None, torch.float16])
def test_clipping_sees_unscaled_gradients(kind, value, expected, amp_dtype, distiller_config):
    cfg = linear_config(distiller_config())
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE, cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = kind, value
    model = Linear()
    step = train_step(model, cfg, [{"input": torch.tensor([0.375, 0.5])}], batch_size=1, amp_dtype=amp_dtype)
    assert step.state_dict()["grad_scaler"].get("scale") == (2.0**16 if amp_dtype else None)
    run(step, 0, 1)
    assert model.layer.weight.tolist()[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_clipping_a_detector_in_float16(kind, distiller_config):
    """Each parameter moves by its own float32 gradient's direction, by the clipped length."""
    cfg = linear_config(distiller_config(kind))
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE, cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = "norm", 0.01
    samples = images()
    model = build_model(cfg)
    step = train_step(model, cfg, samples, amp_dtype=torch.float16)
    step.load_state_dict({**step.state_dict(), "grad_scaler": scaler_state(2.0**10)})
    unclipped = copy.deepcopy(model).train()
    before = weights(model)
    run(step, 0, 1)
    with EventStorage():
        sum(unclipped(samples[:2]).values()).backward()
    clipped = 0
    for name, parameter in unclipped.named_parameters():
        length, moved = parameter.grad.norm(), before[name] - dict(model.named_parameters())[name].detach()
        if length > 0.02:
            clipped += 1
            assert moved.norm() == pytest.approx(0.5 * 0.01, rel=1e-3), name
            assert torch.cosine_similarity(moved.flatten(), parameter.grad.flatten(), dim=0) > 0.8, name
        elif 1e-4 < length < 0.005:
            assert moved.norm() == pytest.approx(0.5 * length.item(), rel=0.5), name
    assert clipped > 10


def scaler_state(scale):
    return torch.amp.GradScaler("cpu", init_scale=scale).state_dict()


@pytest.mark.parametrize("amp_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_half_precision_trains_like_float32(kind, amp_dtype, distiller_config):
    cfg = distiller_config(kind, channels=8)
    # A level of few cells has no gradient of the map loss.
    cfg.GKD.FEATURES = ["p3", "p4", "p5"]
    cfg.SOLVER.BASE_LR = 0.005
    runs = []
    for dtype in (None, amp_dtype):
        torch.manual_seed(5)
        model = build_model(cfg)
        model.watch = True
        before = weights(model)
        step = train_step(model, cfg, images(), amp_dtype=dtype)
        if dtype == torch.float16:
            step.load_state_dict({**step.state_dict(), "grad_scaler": scaler_state(2.0**10)})
        runs.append(run(step, 0, 4))
        assert all(math.isfinite(norm) and norm > 0 for norm in model.watched.norms.values()), model.watched
        assert len(model.watched.norms) == 4 * 3
        assert all(not torch.equal(value, before[name]) for name, value in weights(model).items() if "align" in name)
    full, half = runs
    for name, values in full.items():
        if name.startswith(("loss", "total_loss")):
            assert half[name] == pytest.approx(values, rel=0.1, abs=0.005), name
    assert all(value > 0 for name in NAMES for value in half[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kind", "channels"), [("faster", 16), ("retinanet", 8)])
def test_losses_do_not_depend_on_the_gradient_scale(kind, channels, dtype, distiller_config):
    model = build_model(distiller_config(kind, channels=channels)).to(dtype).train()
    model.watch = True
    batch = training_batch()
    results = []
    for scale in (1.0, 2.0**10, 2.0**16):
        model.gradient_scale = scale
        model.student.loss_normalizer = 100
        torch.manual_seed(3)
        with EventStorage():
            results.append(({name: value.item() for name, value in model(batch).items()}, model.watched))
    (first, first_watched), *others = results
    for losses, watched in others:
        assert losses == pytest.approx(first, rel=1e-6)
        assert watched.norms == pytest.approx(first_watched.norms, rel=1e-5)
        assert watched.detection == pytest.approx(first_watched.detection, rel=1e-5)


def test_float16_gradients_need_the_scale(distiller_config):
    """At RetinaNet's p3 the detection gradient is too small for float16: without a scale the maps there vanish."""
    cfg = distiller_config("retinanet")
    cfg.GKD.FEATURES = ["p3"]
    model = build_model(cfg).train()
    batch = training_batch()
    losses, zeros = {}, {}
    for scale, dtype in ((1.0, None), (1.0, torch.float16), (2.0**10, torch.float16)):
        model.gradient_scale = scale
        model.student.loss_normalizer = 100
        with EventStorage(), torch.autocast("cpu", dtype, enabled=dtype is not None):
            seen = model.observe(batch, student_grad=True, teacher_grad=True)
            model.student.loss_normalizer = 100
            losses[scale, dtype] = model(batch)["loss_gkd_gradient"].item()
        zeros[scale, dtype] = (seen.student_grad[0] == 0).float().mean().item()
    assert seen.student_grad[0].dtype == torch.float16
    full, alone, scaled = losses.values()
    assert zeros[1.0, None] == 0
    assert zeros[1.0, torch.float16] > 0.9
    assert zeros[2.0**10, torch.float16] < 0.2
    assert scaled == pytest.approx(full, rel=0.05)
    assert abs(alone - full) > 0.3 * full


# --- steps that are left out


def test_an_overflow_leaves_the_step_out(distiller_config):
    """Iteration 1 overflows; the run without it that starts with the scale it leaves behind ends at the same weights."""
    cfg = distiller_config("faster")
    samples = images(SIZES + SIZES[:2])
    torch.manual_seed(5)
    model = build_model(cfg)
    other = copy.deepcopy(model)
    step = train_step(model, cfg, samples, amp_dtype=torch.float16)
    step.load_state_dict({**step.state_dict(), "grad_scaler": scaler_state(2.0**10)})
    iteration = [0]
    step.register_hooks([BeforeStep(lambda now: iteration.__setitem__(0, now))])
    model.student.roi_heads.box_predictor.cls_score.bias.register_hook(
        lambda gradient: gradient * (float("inf") if iteration[0] == 1 else 1)
    )
    run(step, 0, 1)
    before, momentum = weights(model), copy.deepcopy(step.state_dict()["optimizer"]["state"])
    assert momentum
    run(step, 1, 2)
    assert equal(weights(model), before)
    for index, state in step.state_dict()["optimizer"]["state"].items():
        assert torch.equal(state["momentum_buffer"], momentum[index]["momentum_buffer"])
    assert step.state_dict()["grad_scaler"]["scale"] == 2.0**9
    run(step, 2, 3)
    assert not equal(weights(model), before)

    again = train_step(other, cfg, samples, amp_dtype=torch.float16)
    again.load_state_dict({**again.state_dict(), "grad_scaler": scaler_state(2.0**10)})
    run(again, 0, 1)
    again.load_state_dict({**again.state_dict(), "grad_scaler": scaler_state(2.0**9)})
    run(again, 2, 3)
    assert equal(weights(other), weights(model))


@pytest.mark.parametrize("kind", ["distiller", "detector"])
def test_a_scale_is_found_or_the_run_ends(kind, distiller_config):
    """Without distillation the losses stay finite and only the gradients overflow."""
    cfg = distiller_config("retinanet")
    if kind == "detector":
        cfg = detector_config(cfg)
    for exponent in (24, 60):
        model = build_model(cfg)
        before = weights(model)
        step = train_step(model, cfg, images(), amp_dtype=torch.float16)
        step.load_state_dict({**step.state_dict(), "grad_scaler": scaler_state(2.0**exponent)})
        if exponent == 24:
            run(step, 0, MAX_SKIPPED_STEPS)
            assert step.state_dict()["grad_scaler"]["scale"] < 2.0**exponent
            assert not equal(weights(model), before)
            assert all(value.isfinite().all() for value in weights(model).values())
        else:
            with pytest.raises(FloatingPointError, match=f"Iteration {MAX_SKIPPED_STEPS}: "):
                run(step, 0, MAX_SKIPPED_STEPS + 5)
            assert step.iter == MAX_SKIPPED_STEPS
            assert equal(weights(model), before)
