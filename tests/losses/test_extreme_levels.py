"""Levels whose maps are flat, and features and gradients near the ends of float32, against the formulas in float64."""

from __future__ import annotations

import math

import pytest
import torch
from devices import CUDA_MARKS, DEVICES
from torch import Tensor

from gkd_d2.losses import LossWeights, gradient_map

WEIGHTS = LossWeights(gradient=0.5, box=0.0, attention=0.0, image=0.3)
IMPLEMENTATIONS = [
    pytest.param("reference", "cpu", id="reference"),
    pytest.param("fused", "cpu", id="fused"),
    pytest.param("fused", "cuda", id="fused on a GPU", marks=CUDA_MARKS),
]
# Channels, height and width of each level: odd sizes, one cell.
SIZES = ((64, 7, 9), (5, 1, 1), (7, 10, 33))
FLOAT = torch.finfo(torch.float32)


def constant(features: Tensor) -> Tensor:
    """The same in all cells, of another size in each channel."""
    return features[:, :, :1, :1].expand_as(features)


def cancelling(feature: Tensor, gradient: Tensor) -> Tensor:
    """Constant features whose weighted sum is a hundred-thousandth of its terms."""
    feature = constant(feature).clone()
    alpha = gradient.mean(dim=(2, 3))
    terms = alpha * feature[:, :, 0, 0]
    wanted = 1e-5 * terms.abs().sum(dim=1) - terms[:, :-1].sum(dim=1)
    feature[:, -1] = (wanted / alpha[:, -1])[:, None, None]
    return feature


def scale(batch, features: float = 1.0, gradients: float = 1.0, levels=slice(None)) -> None:
    """Gradients become means, which are denormal without further rounding."""
    for tensors, factor in ((batch.student, features), (batch.teacher, features)):
        tensors[levels] = [tensor * factor for tensor in tensors[levels]]
    for tensors in (batch.student_grad, batch.teacher_grad):
        means = [tensor.mean(dim=(2, 3), keepdim=True) for tensor in tensors[levels]]
        tensors[levels] = [mean / mean.abs().max() * gradients for mean in means]


def make_constant(batch) -> None:
    batch.student[0], batch.teacher[0] = constant(batch.student[0]), constant(batch.teacher[0])


def make_one_image_constant(batch) -> None:
    batch.teacher[0][1] = constant(batch.teacher[0])[1]


def make_cancelling(batch) -> None:
    batch.student[0] = cancelling(batch.student[0], batch.student_grad[0])
    batch.teacher[0] = cancelling(batch.teacher[0], batch.teacher_grad[0])


def make_mixed(batch) -> None:
    scale(batch, 1e30, 1e-40, slice(0, 1))
    scale(batch, 1e-30, 3e38, slice(1, 2))
    batch.teacher[2] = constant(batch.teacher[2])


CASES = {
    "constant": make_constant,
    "one constant image": make_one_image_constant,
    "cancelling": make_cancelling,
    "denormal gradients": lambda batch: scale(batch, gradients=1e-40),
    "tiny gradients": lambda batch: scale(batch, gradients=1e-30),
    "huge gradients": lambda batch: scale(batch, gradients=1e30),
    "largest gradients": lambda batch: scale(batch, gradients=FLOAT.max),
    "denormal features": lambda batch: scale(batch, features=1e-40),
    "tiny features": lambda batch: scale(batch, features=1e-30),
    "huge features": lambda batch: scale(batch, features=1e30),
    "tiny products": lambda batch: scale(batch, 1e-30, 1e-30),
    "huge products": lambda batch: scale(batch, 1e30, 1e30),
    "mixed": make_mixed,
}


def exact_map(feature: Tensor, gradient: Tensor, rectifier: str) -> Tensor:
    """Ghat of docs/method.md for float32, one image after the other."""
    maps = []
    for F, alpha in zip(feature, gradient.mean(dim=(2, 3))):
        g = torch.einsum("c,chw->hw", alpha, F)
        G = g.abs() if rectifier == "abs" else g.clamp(min=0)
        span = G.max() - G.min()
        rounding = 16 * FLOAT.eps * (alpha * F[:, 0, 0]).abs().sum()
        unit = 2.0 ** math.floor(math.log2(alpha.abs().max()))
        flat = span < rounding or span / unit < FLOAT.tiny / FLOAT.eps
        maps.append(torch.zeros_like(G) if flat else (G - G.min()) / span)
    return torch.stack(maps)


def exact_losses(batch, rectifier: str) -> tuple[Tensor, Tensor]:
    """loss_gkd_gradient and loss_bmfi_image of docs/method.md."""
    gradient = image = 0
    for S, T, dS, dT in zip(batch.student, batch.teacher, batch.student_grad, batch.teacher_grad):
        teacher_map = exact_map(T, dT, rectifier)
        gradient = gradient + (teacher_map - exact_map(S, dS, rectifier)).abs().mean()
        alpha = dT.mean(dim=(2, 3)).abs()
        u = alpha / alpha.mean(dim=1, keepdim=True)
        mean = teacher_map.mean(dim=(1, 2), keepdim=True)
        v = torch.where(mean == 0, 1.0, teacher_map / torch.where(mean == 0, 1.0, mean))
        image = image + (v * (u[:, :, None, None] * (S - T) ** 2).sum(dim=1)).mean()
    return WEIGHTS.gradient * gradient, WEIGHTS.image * image


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("rectifier", ["abs", "relu"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("implementation", "device"), IMPLEMENTATIONS)
def test_equals_the_formulas(make_batch, implementation, device, case, rectifier, layout):
    batch = make_batch(SIZES, dtype=torch.float32, layout=layout)
    CASES[case](batch)
    batch = batch.to(torch.float32)
    exact = batch.to(torch.float64)
    wanted = exact_losses(exact, rectifier)
    wanted_gradients = torch.autograd.grad(sum(wanted), exact.student)
    batch = batch.to(torch.float32, device)
    losses = batch.losses(implementation, weights=WEIGHTS, rectifier=rectifier)
    gradients = torch.autograd.grad(losses["loss_gkd_gradient"] + losses["loss_bmfi_image"], batch.student)
    for name, value in zip(("loss_gkd_gradient", "loss_bmfi_image"), wanted):
        if value > FLOAT.max:
            assert not losses[name].isfinite(), name
        else:
            assert losses[name].item() == pytest.approx(value.item(), rel=1e-5, abs=1e-8), name
    for level, (gradient, value) in enumerate(zip(gradients, wanted_gradients)):
        error = (gradient.double().cpu() - value).abs().max()
        assert error <= 1e-4 * value.abs().max() + FLOAT.tiny, f"level {level}"


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("implementation", "device"), IMPLEMENTATIONS)
def test_a_constant_level_has_no_map(make_batch, implementation, device, dtype, layout):
    """Whatever the number of channels and cells, and however much of the sum over channels cancels."""
    sizes = [(channels, height, width) for channels in (3, 64, 1000) for height, width in ((1, 3), (7, 9), (5, 41))]
    batch = make_batch(sizes, images=8, dtype=dtype, layout=layout)
    for tensors in (batch.student, batch.teacher):
        tensors[:] = [constant(feature) for feature in tensors]
    batch.student[4] = cancelling(batch.student[4], batch.student_grad[4])
    plain, batch = batch, batch.to(dtype, device)
    assert all(gradient_map(f, g).count_nonzero() == 0 for f, g in zip(batch.student, batch.student_grad))
    loss = batch.losses(implementation, weights=LossWeights(1, 0, 0, 0))["loss_gkd_gradient"]
    assert loss == 0
    assert all(gradient.count_nonzero() == 0 for gradient in torch.autograd.grad(loss, batch.student))
    # The imitation weighs all cells alike.
    loss = batch.losses(implementation, weights=WEIGHTS)["loss_bmfi_image"]
    exact = exact_losses(plain.to(dtype).to(torch.float64), "abs")[1]
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


def kinds(losses: dict[str, Tensor]) -> dict[str, str]:
    """Of each loss whether it is finite, inf or nan."""
    return {name: "finite" if loss.isfinite() else str(loss.item()) for name, loss in losses.items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize(
    ("weight", "above"),
    [(3e38, {"gradient", "box", "attention", "image"}), (1e37, {"box", "attention", "image"}), (1e30, set())],
)
def test_losses_that_float32_cannot_hold_are_inf(make_batch, device, dtype, weight, above):
    """In training the guard against losses that are not finite then names them; an error here would stop it first."""
    batch = make_batch(dtype=dtype)
    batch.student = [100 * feature for feature in batch.student]
    weights = LossWeights(weight, weight, weight, weight)
    losses = batch.to(dtype, device).losses("fused", weights=weights)
    wanted = batch.to(dtype).losses("reference", weights=weights)
    assert kinds(losses) == kinds(wanted)
    infinite = {name.split("_")[-1] for name, kind in kinds(losses).items() if kind == "inf"}
    assert infinite == (set() if dtype == torch.float64 else above)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [math.inf, -math.inf])
@pytest.mark.parametrize("name", ["student_grad", "teacher_grad"])
def test_an_infinite_gradient_is_not_hidden_by_relu(make_batch, device, name, value):
    """Of positive features, with minus infinity, it makes a map that relu would take to 0."""
    batch = make_batch(SIZES[:1], dtype=torch.float32)
    with torch.no_grad():
        batch.student[0], batch.teacher[0] = batch.student[0].abs(), batch.teacher[0].abs()
        getattr(batch, name)[0] = getattr(batch, name)[0].clone()
        getattr(batch, name)[0][1, 2, 0, 0] = value
    for implementation, place in (("fused", device), ("reference", "cpu")):
        losses = batch.to(torch.float32, place).losses(
            implementation, weights=LossWeights(1, 1, 1, 1), rectifier="relu"
        )
        assert losses["loss_gkd_gradient"].isnan()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["student", "teacher", "student_grad", "teacher_grad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_not_finite_is_not_hidden(make_batch, device, dtype, name, value, flat):
    """In the first cell, which tells what is rounding, or in another; in a flat map too, where there is no range."""
    for cell in (0, -1):
        batch = make_batch(SIZES[:1], dtype=dtype)
        if flat:
            make_constant(batch)
        batch = batch.to(dtype)
        with torch.no_grad():
            getattr(batch, name)[0] = getattr(batch, name)[0].clone()
            getattr(batch, name)[0][1, 2].view(-1)[cell] = value
        weights = LossWeights(1, 1, 1, 1)
        losses = batch.to(dtype, device).losses("fused", weights=weights)
        wanted = batch.losses("reference", weights=weights)
        assert losses["loss_gkd_gradient"].isnan()
        assert kinds(losses) == kinds(wanted)
