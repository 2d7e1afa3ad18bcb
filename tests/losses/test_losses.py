"""The public losses against hand-worked numbers, an independent computation and the analytic gradient."""

import math
import re

import numpy as np
import pytest
import torch

from gkd_d2.losses import LossWeights, box_context_mask, distillation_losses, gradient_map

ALL = LossWeights(gradient=1.0, box=1.0, attention=1.0, image=1.0)
WEIGHTINGS = ("gradient", "attention", "uniform")
RECTIFIERS = ("abs", "relu")
NAMES = ("loss_gkd_gradient", "loss_bmfi_box", "loss_bmfi_attention", "loss_bmfi_image")


def random_level(n=2, c=5, h=4, w=6, dtype=torch.float64, seed=0):
    """Student, teacher, and their gradients."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, c, h, w, generator=generator, dtype=torch.float64).to(dtype) for _ in range(4)]


def compute(level, boxes, image_size, implementation="reference", weights=ALL, **options):
    student, teacher, student_grad, teacher_grad = level
    return distillation_losses(
        [student],
        [teacher],
        [student_grad],
        [teacher_grad],
        boxes,
        image_size,
        weights=weights,
        implementation=implementation,
        **options,
    )


# One image, two channels, one row of two cells of 4 x 4 pixels.
HAND = [
    torch.tensor([[[[1.0, 2.0]], [[3.0, 0.0]]]], dtype=torch.float64),  # S
    torch.tensor([[[[2.0, 0.0]], [[1.0, 3.0]]]], dtype=torch.float64),  # T
    torch.tensor([[[[1.0, 1.0]], [[0.0, -2.0]]]], dtype=torch.float64),  # alpha_S = 1, -1
    torch.tensor([[[[3.0, 1.0]], [[5.0, -5.0]]]], dtype=torch.float64),  # alpha_T = 2, 0
]
HAND_BOXES = [torch.tensor([[4.0, 0.0, 8.0, 4.0]])]
SIGMOID_2 = 1 / (1 + math.exp(-2))


@pytest.mark.parametrize(
    ("weighting", "rectifier", "gradient", "box", "image"),
    [
        # g_S = -2, 2 and g_T = 4, 0. abs: Ghat_S = 0, 0 (max == min), Ghat_T = 1, 0. The box covers the second cell
        # (1/4), the first lies in its context at a distance of one width: 1/4 * exp(-1/2).
        # u = 2, 0 and v = 2, 0, so D = 4, 0.
        ("gradient", "abs", 0.5, 4 * math.exp(-0.5) / 4, 2.0),
        # relu: Ghat_S = 0, 1.
        ("gradient", "relu", 1.0, 4 * math.exp(-0.5) / 4, 2.0),
        # D = (1 + 4), (4 + 9).
        ("uniform", "abs", 0.5, (5 * math.exp(-0.5) + 13) / 4, 9.0),
        # Channel means of |T| are 1, 2 and tau = 0.5: u = 2 * softmax(2, 4). Cell means are equal: v = 1.
        (
            "attention",
            "abs",
            0.5,
            (
                (2 * (1 - SIGMOID_2) * 1 + 2 * SIGMOID_2 * 4) * math.exp(-0.5)
                + 2 * (1 - SIGMOID_2) * 4
                + 2 * SIGMOID_2 * 9
            )
            / 4,
            (2 * (1 - SIGMOID_2) * (1 + 4) + 2 * SIGMOID_2 * (4 + 9)) / 2,
        ),
    ],
)
def test_hand_worked_numbers(weighting, rectifier, gradient, box, image):
    losses = compute(HAND, HAND_BOXES, (4, 8), weighting=weighting, rectifier=rectifier)
    # Ac(S) = 1, 1 and Ac(T) = 2 * softmax(2, 4); As(S) = 2 * softmax(4, 2) and As(T) = 1, 1.
    attention = 2 * 2 * (2 * SIGMOID_2 - 1)
    for name, expected in zip(NAMES, (gradient, box, attention, image)):
        assert losses[name].item() == pytest.approx(expected, rel=1e-12), name


def naive_map(feature, gradient, rectifier):
    alpha = gradient.mean(axis=(2, 3))
    g = np.einsum("nc,nchw->nhw", alpha, feature)
    g = np.abs(g) if rectifier == "abs" else np.maximum(g, 0)
    out = np.zeros_like(g)
    for n in range(len(g)):
        if g[n].max() != g[n].min():
            out[n] = (g[n] - g[n].min()) / (g[n].max() - g[n].min())
    return out


def naive_mask(boxes, image_size, feature_size):
    mask = np.zeros((len(boxes), *feature_size))
    for n, image_boxes in enumerate(boxes):
        for x0, y0, x1, y1 in image_boxes.double().tolist():
            if not all(map(math.isfinite, (x0, y0, x1, y1))) or x1 <= x0 or y1 <= y0:
                continue
            x0, x1 = math.floor(x0 * feature_size[1] / image_size[1]), math.ceil(x1 * feature_size[1] / image_size[1])
            y0, y1 = math.floor(y0 * feature_size[0] / image_size[0]), math.ceil(y1 * feature_size[0] / image_size[0])
            w, h, cx, cy = x1 - x0, y1 - y0, (x0 + x1) / 2, (y0 + y1) / 2
            for j in range(feature_size[0]):
                for i in range(feature_size[1]):
                    x, y = i + 0.5, j + 0.5
                    if x0 <= x < x1 and y0 <= y < y1:
                        value = 1 / (4 * w * h)
                    elif cx - w <= x < cx + w and cy - h <= y < cy + h:
                        value = math.exp(-(((x - cx) / w) ** 2) / 2 - ((y - cy) / h) ** 2 / 2) / (4 * w * h)
                    else:
                        value = 0
                    mask[n, j, i] = max(mask[n, j, i], value)
    return mask


def naive_softmax(x):
    flat = x.reshape(len(x), -1)
    e = np.exp(flat - flat.max(axis=1, keepdims=True))
    return (e / e.sum(axis=1, keepdims=True) * flat.shape[1]).reshape(x.shape)


def naive_losses(level, boxes, image_size, weighting, rectifier, temperature):
    s, t, ds, dt = (x.double().numpy() for x in level)
    n, c, h, w = s.shape
    map_s, map_t = naive_map(s, ds, rectifier), naive_map(t, dt, rectifier)
    u, v = np.ones((n, c)), np.ones((n, h, w))
    if weighting == "gradient":
        alpha = np.abs(dt.mean(axis=(2, 3)))
        for i in range(n):
            if alpha[i].sum():
                u[i] = c * alpha[i] / alpha[i].sum()
            if map_t[i].sum():
                v[i] = h * w * map_t[i] / map_t[i].sum()
    elif weighting == "attention":
        u = naive_softmax(np.abs(t).mean(axis=(2, 3)) / temperature)
        v = naive_softmax(np.abs(t).mean(axis=1) / temperature)
    distance = v * np.einsum("nc,nchw->nhw", u, (s - t) ** 2)
    attention = sum(
        np.abs(
            naive_softmax(np.abs(s).mean(axis=a) / temperature) - naive_softmax(np.abs(t).mean(axis=a) / temperature)
        ).sum()
        for a in ((2, 3), 1)
    )
    return (
        np.abs(map_t - map_s).sum() / (n * h * w),
        (naive_mask(boxes, image_size, (h, w)) * distance).sum() / n,
        attention / n,
        distance.sum() / (n * h * w),
    )


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("rectifier", RECTIFIERS)
@pytest.mark.parametrize("shape", [(2, 5, 7, 9), (1, 3, 1, 6), (3, 1, 5, 1), (2, 4, 1, 1)])
def test_equals_independent_computation(weighting, rectifier, shape):
    level = random_level(*shape, seed=sum(shape))
    size = (8 * shape[2] - 3, 8 * shape[3])
    generator = torch.Generator().manual_seed(1)
    boxes = []
    for k in (3, 0, 40)[: shape[0]]:
        corners = torch.rand(k, 2, generator=generator) * torch.tensor([size[1], size[0]])
        boxes.append(torch.cat((corners, corners + 1 + 20 * torch.rand(k, 2, generator=generator)), dim=1))
    losses = compute(level, boxes, size, weighting=weighting, rectifier=rectifier, temperature=0.8)
    expected = naive_losses(level, boxes, size, weighting, rectifier, 0.8)
    for name, value in zip(NAMES, expected):
        assert losses[name].item() == pytest.approx(value, rel=1e-10, abs=1e-14), name


def test_levels_are_summed():
    first, second = random_level(seed=1), random_level(c=3, h=2, w=3, seed=2)
    boxes, size = [torch.tensor([[3.0, 4.0, 30.0, 20.0]]), torch.zeros(0, 4)], (32, 48)
    both = distillation_losses(*map(list, zip(first, second)), boxes, size, weights=ALL, implementation="reference")
    parts = [compute(level, boxes, size) for level in (first, second)]
    for name in NAMES:
        torch.testing.assert_close(both[name], parts[0][name] + parts[1][name], rtol=1e-12, atol=0)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("rectifier", RECTIFIERS)
@pytest.mark.parametrize("term", range(4))
def test_gradcheck(term, weighting, rectifier):
    student, *others = random_level(n=2, c=3, h=3, w=4)
    weights = LossWeights(*(float(term == i) for i in range(4)))

    def loss(x):
        boxes = [torch.tensor([[3.0, 4.0, 20.0, 20.0]]), torch.zeros(0, 4)]
        out = compute((x, *others), boxes, (24, 32), weights=weights, weighting=weighting, rectifier=rectifier)
        return out[NAMES[term]]

    assert torch.autograd.gradcheck(loss, student.requires_grad_())


def test_map_gradient_is_blind_to_scale_and_shift():
    """The gradient through min and max is orthogonal to scaling and shifting G."""
    feature, gradient = random_level()[::3]
    feature.requires_grad_()
    weighted = (gradient.mean(dim=(2, 3), keepdim=True) * feature).sum(dim=1).abs()
    (grad,) = torch.autograd.grad((gradient_map(feature, gradient) * torch.rand(2, 4, 6)).sum(), feature)
    # dG = sign(g) * alpha * dF: scaling F scales G, so the gradient along F is 0.
    assert (grad * feature).sum().abs() < 1e-10 * grad.norm() * weighted.norm()


def test_tied_extremes_share_the_gradient():
    feature = torch.tensor([[[[1.0, 3.0, 3.0, 2.0, 1.0]]]], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(gradient_map(feature, torch.ones_like(feature))[0, 0, 3], feature)
    # Ghat = (2 - min) / (max - min) with max = 3, min = 1: d/dmax = -1/4, d/dmin = -1/4, each halved by the tie.
    expected = torch.tensor([-0.125, -0.125, -0.125, 0.5, -0.125], dtype=torch.float64)
    torch.testing.assert_close(grad.flatten(), expected)


def test_losses_do_not_depend_on_the_scale_of_the_gradients():
    level, boxes = random_level(), [torch.tensor([[3.0, 4.0, 20.0, 20.0]])] * 2
    plain = compute(level, boxes, (32, 48))
    scaled = compute((*level[:2], level[2] * 2.0**-90, level[3] * 2.0**60), boxes, (32, 48))
    for name in NAMES:
        assert torch.equal(plain[name], scaled[name]), name


def test_flat_maps_give_zero_map_and_uniform_weights():
    student, teacher, _, _ = random_level()
    zeros = torch.zeros_like(student)
    losses = compute((student.requires_grad_(), teacher, zeros, zeros), [torch.zeros(0, 4)] * 2, (32, 48))
    uniform = compute((student, teacher, zeros, zeros), [torch.zeros(0, 4)] * 2, (32, 48), weighting="uniform")
    assert losses["loss_gkd_gradient"] == 0
    assert losses["loss_bmfi_image"] == uniform["loss_bmfi_image"] > 0
    (grad,) = torch.autograd.grad(sum(losses.values()), student)
    assert grad.isfinite().all()


def test_a_nan_is_not_hidden():
    level = random_level()
    level[1][0, 0, 0, 0] = math.nan
    assert compute(level, [torch.zeros(0, 4)] * 2, (32, 48))["loss_gkd_gradient"].isnan()


DRAWN = """
.....................
.....................
...cccccccc..........
...cc####cc..........
...cc####cc..........
...cccccccc..........
.....................
"""


def test_box_context_mask_drawn():
    rows = DRAWN.split()
    height, width = len(rows), len(rows[0])
    # Pixels 21 and 35 of cells of 4 lie in cells 5 and 8; the box is rounded outwards to 5..9, 3..5.
    box = torch.tensor([[21.0, 13.0, 35.0, 19.5]])
    mask = box_context_mask([box], (4 * height, 4 * width), (height, width), dtype=torch.float64)[0]
    # w = 4, h = 2, centre 7, 4; the doubled box is 3..11, 2..6.
    for j, row in enumerate(rows):
        for i, cell in enumerate(row):
            gauss = math.exp(-(((i + 0.5 - 7) / 4) ** 2) / 2 - ((j + 0.5 - 4) / 2) ** 2 / 2)
            expected = {"#": 1 / 32, "c": gauss / 32, ".": 0}[cell]
            assert mask[j, i].item() == pytest.approx(expected, abs=1e-15), (j, i)


def test_box_context_mask_of_overlapping_ragged_and_unusable_boxes():
    nan, inf = math.nan, math.inf
    boxes = [
        torch.tensor([[0.0, 0.0, 16.0, 16.0], [8.0, 8.0, 12.0, 12.0], [-20.0, 5.0, 90.0, 60.0]]),
        torch.zeros(0, 4),
        torch.tensor([[5.0, 5.0, 5.0, 9.0], [9.0, 9.0, 2.0, 12.0], [nan, 0.0, 9.0, 9.0], [0.0, 0.0, inf, 9.0]]),
    ]
    mask = box_context_mask(boxes, (40, 56), (10, 14), dtype=torch.float64)
    np.testing.assert_allclose(mask.numpy(), naive_mask(boxes, (40, 56), (10, 14)), rtol=1e-12)
    assert mask[0].min() > 0
    assert mask[1:].abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_accumulates_in_float32(dtype):
    level = random_level(2, 64, 20, 30, dtype)
    boxes = [torch.tensor([[3.0, 4.0, 90.0, 70.0]])] * 2
    losses = compute(level, boxes, (160, 240))
    exact = compute([x.double() for x in level], boxes, (160, 240))
    for name in NAMES:
        assert losses[name].dtype == torch.float32
        torch.testing.assert_close(losses[name].double(), exact[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "layout", [lambda x: x.contiguous(memory_format=torch.channels_last), lambda x: x.repeat(1, 1, 2, 2)[..., ::2, ::2]]
)
def test_layout_does_not_matter(layout):
    level = random_level(2, 6, 8, 10)
    boxes = [torch.tensor([[3.0, 4.0, 50.0, 40.0]])] * 2
    laid_out = [layout(x) for x in level]
    plain = compute([x.contiguous() for x in laid_out], boxes, (64, 80))
    assert not all(x.is_contiguous() for x in laid_out)
    for name, value in compute(laid_out, boxes, (64, 80)).items():
        torch.testing.assert_close(value, plain[name], rtol=1e-12, atol=0)


@pytest.mark.parametrize("term", range(4))
def test_weights_scale_and_zero_returns_zero(term):
    level, boxes = random_level(), [torch.tensor([[3.0, 4.0, 20.0, 20.0]])] * 2
    full = compute(level, boxes, (32, 48))
    one = compute(level, boxes, (32, 48), weights=LossWeights(*(0.25 * (term == i) for i in range(4))))
    for i, name in enumerate(NAMES):
        expected = 0.25 * full[name] if i == term else torch.zeros((), dtype=torch.float64)
        assert torch.equal(one[name], expected), name


def test_gradients_may_be_absent_where_no_term_needs_them():
    student, teacher, _, teacher_grad = random_level()
    boxes = [torch.zeros(0, 4)] * 2
    options = {"weights": LossWeights(0, 1, 1, 1), "implementation": "reference"}
    args = ([student], [teacher], None)
    assert distillation_losses(*args, None, boxes, (32, 48), weighting="uniform", **options)["loss_bmfi_image"] > 0
    assert distillation_losses(*args, [teacher_grad], boxes, (32, 48), **options)["loss_bmfi_image"] > 0
    with pytest.raises(ValueError, match="teacher_grad is None"):
        distillation_losses(*args, None, boxes, (32, 48), **options)
    with pytest.raises(ValueError, match="student_grad is None"):
        distillation_losses(*args, [teacher_grad], boxes, (32, 48), weights=ALL)


@pytest.mark.parametrize("weighting", ["gradient", "attention", "uniform"])
def test_the_mean_of_a_gradient_is_enough(weighting):
    student, teacher, *gradients = random_level()
    means = [gradient.mean(dim=(2, 3), keepdim=True) for gradient in gradients]
    torch.testing.assert_close(
        compute((student, teacher, *means), [torch.zeros(0, 4)] * 2, (32, 48), weighting=weighting),
        compute((student, teacher, *gradients), [torch.zeros(0, 4)] * 2, (32, 48), weighting=weighting),
    )
    torch.testing.assert_close(gradient_map(student, means[0]), gradient_map(student, gradients[0]))
    with pytest.raises(ValueError, match=r"or the gradient N,C,1,1, got \(2, 5, 4, 6\) and \(2, 5, 1, 6\)"):
        gradient_map(student, gradients[0][:, :, :1])


def test_only_the_student_receives_a_gradient():
    level = [x.requires_grad_() for x in random_level()]
    sum(compute(level, [torch.tensor([[3.0, 4.0, 20.0, 20.0]])] * 2, (32, 48)).values()).backward()
    assert level[0].grad.abs().sum() > 0
    assert all(x.grad is None for x in level[1:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"weighting": "foo"}, "weighting is 'foo', but must be one of 'gradient'"),
        ({"rectifier": "elu"}, "rectifier is 'elu'"),
        ({"implementation": "cuda"}, "implementation is 'cuda'"),
        ({"teacher": []}, "student has 1 level, but teacher has 0"),
        ({"teacher": [torch.zeros(2, 5, 4, 7)]}, r"student\[0\] has shape .* but teacher\[0\] has \(2, 5, 4, 7\)"),
        ({"teacher": [torch.zeros(2, 5, 1, 1)]}, r"student\[0\] has shape .* but teacher\[0\] has \(2, 5, 1, 1\)"),
        ({"student_grad": [torch.zeros(2, 5, 1, 6)]}, r"has shape .* but student_grad\[0\] has \(2, 5, 1, 6\)"),
        ({"teacher_grad": [torch.zeros(2, 5, 4, 6).half()]}, r"dtype torch.float32, but teacher_grad\[0\]"),
        ({"student_grad": [torch.zeros(2, 5, 4, 6, device="meta")]}, "device cpu, but student_grad"),
        ({"boxes": [torch.zeros(0, 4)]}, "holds 2 images, but boxes are given for 1"),
        ({"boxes": [torch.zeros(0, 5), torch.zeros(0, 4)]}, r"boxes\[0\] is a tensor of shape \(0, 5\)"),
        ({"image_size": (32, 0)}, r"image_size is \(32, 0\)"),
        ({"student": [], "teacher": [], "student_grad": [], "teacher_grad": []}, "no level to distil"),
    ],
)
def test_bad_arguments_are_named(change, message):
    names = ("student", "teacher", "student_grad", "teacher_grad")
    arguments = {name: [torch.zeros(2, 5, 4, 6)] for name in names}
    arguments |= {"boxes": [torch.zeros(0, 4)] * 2, "image_size": (32, 48), "weights": ALL} | change
    with pytest.raises(ValueError, match=message):
        distillation_losses(**arguments)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, 1e39])
def test_bad_weight_is_named(value):
    with pytest.raises(
        ValueError, match=f"loss weight box is {re.escape(str(value))}, but must be a finite number >= 0"
    ):
        LossWeights(box=value)
