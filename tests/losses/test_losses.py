"""The public losses against hand-worked numbers, an independent computation and the analytic gradient."""

import itertools
import math
import re

import numpy as np
import pytest
import torch

from gkd_d2.losses import LossOptions, LossWeights, box_context_mask, distillation_losses, gradient_map, reference

ALL = LossWeights(gradient=1.0, box=1.0, attention=1.0, image=1.0)
WEIGHTINGS = ("gradient", "attention", "attention_gradient", "uniform")
RECTIFIERS = ("abs", "relu")
MAP_REGIONS = ("image", "boxes")
IMPORTANCES = ("channel", "element", "norm", "student")
NAMES = ("loss_gkd_gradient", "loss_bmfi_box", "loss_bmfi_attention", "loss_bmfi_image")


def random_level(n=2, c=5, h=4, w=6, dtype=torch.float64, seed=0):
    """Student, teacher, and their gradients."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, c, h, w, generator=generator, dtype=torch.float64).to(dtype) for _ in range(4)]


def compute(level, boxes, image_size, implementation="reference", weights=ALL, map_region="image", **options):
    student, teacher, student_grad, teacher_grad = level
    return distillation_losses(
        [student],
        [teacher],
        [student_grad],
        [teacher_grad],
        boxes,
        image_size,
        weights=weights,
        map_region=map_region,
        implementation=implementation,
        **options,
    )


FLOORED = {"importance": "norm", "importance_floor": 0.3}
CAPPED = {"importance": "student", "importance_floor": 0.1, "importance_cap": 1.2}

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
        # u as with attention; As(T) = 1, 1 and Ghat_T = 1, 0: v = 2, 0.
        (
            "attention_gradient",
            "abs",
            0.5,
            2 * (2 * (1 - SIGMOID_2) * 1 + 2 * SIGMOID_2 * 4) * math.exp(-0.5) / 4,
            2 * (2 * (1 - SIGMOID_2) * 1 + 2 * SIGMOID_2 * 4) / 2,
        ),
    ],
)
def test_hand_worked_numbers(weighting, rectifier, gradient, box, image):
    losses = compute(HAND, HAND_BOXES, (4, 8), weighting=weighting, rectifier=rectifier)
    # Ac(S) = 1, 1 and Ac(T) = 2 * softmax(2, 4); As(S) = 2 * softmax(4, 2) and As(T) = 1, 1.
    attention = 2 * 2 * (2 * SIGMOID_2 - 1)
    for name, expected in zip(NAMES, (gradient, box, attention, image)):
        assert losses[name].item() == pytest.approx(expected, rel=1e-12), name


@pytest.mark.parametrize(("rectifier", "gradient"), [("abs", math.exp(-0.25) / 2), ("relu", math.exp(-0.25) / 2 + 0.5)])
def test_hand_worked_maps_in_and_about_the_boxes(rectifier, gradient):
    # sqrt(M) = sqrt(1/4 * exp(-1/2)), sqrt(1/4); |Ghat_T - Ghat_S| = 1, 0 with abs and 1, 1 with relu.
    losses = compute(HAND, HAND_BOXES, (4, 8), rectifier=rectifier, map_region="boxes")
    assert losses["loss_gkd_gradient"].item() == pytest.approx(gradient, rel=1e-12)
    nothing = compute(HAND, [torch.zeros(0, 4)], (4, 8), rectifier=rectifier, map_region="boxes")
    assert nothing["loss_gkd_gradient"] == 0


@pytest.mark.parametrize(
    ("options", "gradient", "image"),
    [
        # sum of dT * T = 3*2 + 5*1, 1*0 - 5*3 = 11, -15: Ghat_T = 0, 1 with abs. sum of dS * S = 1, 2: Ghat_S = 0, 1.
        # alpha_T = 2, 0 gives u = 2, 0 and with it sums of (S - T)^2 = 2, 8. v = 0, 2.
        ({"importance": "element"}, 0.0, 8.0),
        # relu: Ghat_T = 1, 0; v = 2, 0.
        ({"importance": "element", "rectifier": "relu"}, 1.0, 2.0),
        # |dT| = sqrt(34), sqrt(26); the maps that are compared are those of "element".
        ({"importance": "norm"}, 0.0, 2 * (2 * 34**0.5 + 8 * 26**0.5) / (34**0.5 + 26**0.5) / 2),
        # |dS| = 1, sqrt(5).
        ({"importance": "student"}, 0.0, (2 * 1 + 8 * 5**0.5) / (1 + 5**0.5)),
        # v = 0, 2 becomes 0, 1.5, then 0.2, 1.4.
        ({"importance": "element", "importance_cap": 1.5}, 0.0, 8 * 1.5 / 2),
        ({"importance": "element", "importance_cap": 1.5, "importance_floor": 0.2}, 0.0, (2 * 0.2 + 8 * 1.4) / 2),
        # channel: Ghat_T = 1, 0, v = 2, 0, with the floor 1.75, 0.25.
        ({"importance": "channel", "importance_floor": 0.25}, 0.5, (2 * 1.75 + 8 * 0.25) / 2),
        # v = 1 with any floor, also where the weighting takes nothing of the gradients.
        ({"weighting": "uniform", "importance_floor": 0.25}, 0.5, 9.0),
    ],
)
def test_hand_worked_importance(options, gradient, image):
    losses = compute(HAND, HAND_BOXES, (4, 8), **options)
    assert losses["loss_gkd_gradient"].item() == pytest.approx(gradient, rel=1e-12)
    assert losses["loss_bmfi_image"].item() == pytest.approx(image, rel=1e-12)


def naive_map(feature, gradient, rectifier, importance="channel"):
    if importance == "channel":
        gradient = gradient.mean(axis=(2, 3), keepdims=True)
    g = (gradient * feature).sum(axis=1)
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


def naive_losses(
    level,
    boxes,
    image_size,
    temperature,
    weighting="gradient",
    rectifier="abs",
    map_region="image",
    importance="channel",
    importance_floor=0.0,
    importance_cap=math.inf,
):
    s, t, ds, dt = (x.double().numpy() for x in level)
    n, c, h, w = s.shape
    kind = importance if importance == "channel" else "element"
    map_s, map_t = naive_map(s, ds, rectifier, kind), naive_map(t, dt, rectifier, kind)
    important = {"norm": np.linalg.norm(dt, axis=1), "student": np.linalg.norm(ds, axis=1)}.get(importance, map_t)
    u, v = np.ones((n, c)), np.ones((n, h, w))
    if weighting == "gradient":
        alpha = np.abs(dt.mean(axis=(2, 3)))
        for i in range(n):
            if alpha[i].sum():
                u[i] = c * alpha[i] / alpha[i].sum()
            if important[i].sum():
                v[i] = h * w * important[i] / important[i].sum()
    elif weighting == "attention_gradient":
        u = naive_softmax(np.abs(t).mean(axis=(2, 3)) / temperature)
        product = naive_softmax(np.abs(t).mean(axis=1) / temperature) * important
        for i in range(n):
            if product[i].sum():
                v[i] = h * w * product[i] / product[i].sum()
    elif weighting == "attention":
        u = naive_softmax(np.abs(t).mean(axis=(2, 3)) / temperature)
        v = naive_softmax(np.abs(t).mean(axis=1) / temperature)
    v = importance_floor + (1 - importance_floor) * np.minimum(v, importance_cap)
    distance = v * np.einsum("nc,nchw->nhw", u, (s - t) ** 2)
    attention = sum(
        np.abs(
            naive_softmax(np.abs(s).mean(axis=a) / temperature) - naive_softmax(np.abs(t).mean(axis=a) / temperature)
        ).sum()
        for a in ((2, 3), 1)
    )
    mask = naive_mask(boxes, image_size, (h, w))
    share = np.sqrt(mask) if map_region == "boxes" else 1 / (h * w)
    return (
        (share * np.abs(map_t - map_s)).sum() / n,
        (mask * distance).sum() / n,
        attention / n,
        distance.sum() / (n * h * w),
    )


@pytest.mark.parametrize("options", [{}, {"map_region": "boxes"}, {"importance": "element"}, FLOORED, CAPPED], ids=str)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("rectifier", RECTIFIERS)
@pytest.mark.parametrize("shape", [(2, 5, 7, 9), (1, 3, 1, 6), (3, 1, 5, 1), (2, 4, 1, 1)])
def test_equals_independent_computation(weighting, rectifier, shape, options):
    level = random_level(*shape, seed=sum(shape))
    size = (8 * shape[2] - 3, 8 * shape[3])
    generator = torch.Generator().manual_seed(1)
    boxes = []
    for k in (3, 0, 40)[: shape[0]]:
        corners = torch.rand(k, 2, generator=generator) * torch.tensor([size[1], size[0]])
        boxes.append(torch.cat((corners, corners + 1 + 20 * torch.rand(k, 2, generator=generator)), dim=1))
    options = {"weighting": weighting, "rectifier": rectifier, "temperature": 0.8, **options}
    losses = compute(level, boxes, size, **options)
    expected = naive_losses(level, boxes, size, **options)
    for name, value in zip(NAMES, expected):
        assert losses[name].item() == pytest.approx(value, rel=1e-10, abs=1e-14), name


def test_no_part_of_attention_times_gradient_is_lost_to_underflow():
    """The attention's peak lies where the map is 0, and elsewhere it is below what float32 holds."""
    teacher = torch.tensor([[[[200.0, 1.0, 3.0]]]])
    gradient = torch.tensor([[[[0.0, 2.0, 3.0]]]])
    level = (torch.zeros_like(teacher), teacher, gradient, gradient)
    options = {"weighting": "attention_gradient", "importance": "norm", "temperature": 1.0}
    loss = compute(level, [torch.zeros(0, 4)], (4, 12), **options)["loss_bmfi_image"]
    # exp(1) * 2 and exp(3) * 3, scaled to a sum of 3; D = v * T^2.
    parts = [2 * math.e, 3 * math.e**3]
    assert loss.item() == pytest.approx((parts[0] * 1 + parts[1] * 9) / sum(parts), rel=1e-5)


def test_levels_are_summed():
    first, second = random_level(seed=1), random_level(c=3, h=2, w=3, seed=2)
    boxes, size = [torch.tensor([[3.0, 4.0, 30.0, 20.0]]), torch.zeros(0, 4)], (32, 48)
    options = {"weights": ALL, "map_region": "image", "implementation": "reference"}
    both = distillation_losses(*map(list, zip(first, second)), boxes, size, **options)
    parts = [compute(level, boxes, size) for level in (first, second)]
    for name in NAMES:
        torch.testing.assert_close(both[name], parts[0][name] + parts[1][name], rtol=1e-12, atol=0)


@pytest.mark.parametrize("importance", ["channel", "element"])
@pytest.mark.parametrize("map_region", MAP_REGIONS)
@pytest.mark.parametrize("rectifier", RECTIFIERS)
def test_gradcheck_of_maps(rectifier, map_region, importance):
    options = {"rectifier": rectifier, "map_region": map_region, "importance": importance}
    check_gradient(LossWeights(gradient=1.0, box=0.0, attention=0.0, image=0.0), **options)


@pytest.mark.parametrize("options", [{}, FLOORED, CAPPED], ids=str)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_gradcheck_of_imitation(weighting, options):
    check_gradient(LossWeights(gradient=0.0, box=1.0, attention=0.0, image=0.3), weighting=weighting, **options)


def test_gradcheck_of_attention():
    check_gradient(LossWeights(gradient=0.0, box=0.0, attention=1.0, image=0.0))


def check_gradient(weights, **options):
    """The gradient of the losses' sum by finite differences."""
    student, *others = random_level(n=2, c=3, h=3, w=4)
    boxes = [torch.tensor([[3.0, 4.0, 20.0, 20.0]]), torch.zeros(0, 4)]

    def loss(x):
        return sum(compute((x, *others), boxes, (24, 32), weights=weights, **options).values())

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


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_losses_do_not_depend_on_the_scale_of_the_gradients(importance, dtype):
    level, boxes = random_level(dtype=dtype), [torch.tensor([[3.0, 4.0, 20.0, 20.0]])] * 2
    # Of few bits, so that they survive near the ends of float32, where products with features would not.
    level[2:] = [(16 * gradient).round() / 16 for gradient in level[2:]]
    plain = compute(level, boxes, (32, 48), importance=importance)
    least = 2.0 ** (-100 if importance == "channel" else -120)
    scaled = (*level[:2], level[2] * least, level[3] * least)
    scaled = compute(scaled, boxes, (32, 48), importance=importance)
    for name in NAMES:
        assert torch.equal(plain[name], scaled[name]), name


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize(
    ("weighting", "without"), [("gradient", "uniform"), ("attention_gradient", "attention")], ids=lambda name: name
)
def test_flat_maps_give_zero_map_and_weights_without_them(importance, weighting, without):
    student, teacher, _, _ = random_level()
    if weighting == "attention_gradient":
        # Where all cells have one attention.
        teacher = teacher[:, :, :1, :1].expand_as(teacher)
    zeros = torch.zeros_like(student)
    level, boxes = (student.requires_grad_(), teacher, zeros, zeros), [torch.zeros(0, 4)] * 2
    losses = compute(level, boxes, (32, 48), weighting=weighting, importance=importance)
    uniform = compute(level, boxes, (32, 48), weighting=without)
    assert losses["loss_gkd_gradient"] == 0
    assert losses["loss_bmfi_image"].item() == pytest.approx(uniform["loss_bmfi_image"].item(), rel=1e-12)
    assert losses["loss_bmfi_image"] > 0
    (grad,) = torch.autograd.grad(sum(losses.values()), student)
    assert grad.isfinite().all()


def test_equal_terms_of_another_order_are_a_flat_map_of_elements():
    """The cells have one sum, which rounding makes differ by cell."""
    teacher = torch.rand(1, 300, 1, 1).expand(1, 300, 4, 4)
    order = torch.stack([torch.randperm(300) for _ in range(16)], dim=1).view(1, 300, 4, 4)
    terms = teacher.gather(1, order)
    assert terms.sum(dim=1).unique().numel() > 1
    assert gradient_map(terms, torch.ones_like(terms), importance="element").abs().sum() == 0


@pytest.mark.parametrize(
    ("importance", "name"),
    [("channel", 1), ("channel", 3), ("element", 1), ("element", 3), ("norm", 3), ("student", 2)],
)
def test_a_nan_is_not_hidden(importance, name):
    level = random_level()
    level[name][0, 0, 0, 0] = math.nan
    losses = compute(level, [torch.zeros(0, 4)] * 2, (32, 48), importance=importance)
    assert losses["loss_bmfi_image"].isnan()
    assert losses["loss_gkd_gradient"].isnan()


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
    with pytest.raises(ValueError, match="student_grad is None, but .* the importance 'student' need it"):
        distillation_losses(*args, [teacher_grad], boxes, (32, 48), importance="student", **options)
    attended = {"weighting": "attention_gradient", **options}
    with pytest.raises(ValueError, match="teacher_grad is None, but .* 'attention_gradient' need it"):
        distillation_losses(*args, None, boxes, (32, 48), **attended)
    student_grad = [torch.rand_like(student)]
    losses = distillation_losses(*args[:2], student_grad, None, boxes, (32, 48), importance="student", **attended)
    assert losses["loss_bmfi_image"] > 0


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_options_know_what_of_the_gradients_is_needed(weighting, importance):
    student, teacher, *gradients = random_level()
    boxes, options = (
        [torch.tensor([[3.0, 4.0, 20.0, 20.0]])] * 2,
        LossOptions(weighting=weighting, importance=importance),
    )
    means = [gradient.mean(dim=(2, 3), keepdim=True).expand_as(student) for gradient in gradients]

    def losses(weights, *given):
        lists = [[student], [teacher], *([x] if x is not None else None for x in given)]
        return torch.stack(
            [*reference.distillation_losses(*lists, boxes, (32, 48), weights=weights, options=options).values()]
        )

    for gradient, box, image in itertools.product((0.0, 1.0), repeat=3):
        weights = LossWeights(gradient=gradient, box=box, attention=1.0, image=image)
        needs = options.need_student_grad(weights), options.need_teacher_grad(weights)
        exact = losses(weights, *gradients)
        # What is not needed is not touched.
        absent = [gradient if needed else None for needed, gradient in zip(needs, gradients)]
        assert torch.equal(losses(weights, *absent), exact)
        for index in range(2):
            if needs[index]:
                with pytest.raises((AttributeError, TypeError)):
                    losses(weights, *(None if i == index else x for i, x in enumerate(gradients)))
        enough = torch.allclose(losses(weights, *(m if n else None for n, m in zip(needs, means))), exact, rtol=1e-9)
        assert enough == (not options.need_cell_grads(weights))


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
        ({"map_region": "box"}, "map_region is 'box', but must be one of 'image', 'boxes'"),
        ({"importance": "max"}, "importance is 'max', but must be one of 'channel'"),
        ({"importance_floor": 1.5}, r"importance_floor is 1.5, but must be in \[0, 1\]"),
        ({"importance_floor": math.nan}, "importance_floor is nan"),
        ({"importance_cap": -1.0}, "importance_cap is -1.0, but must be a finite number >= 1, or 0"),
        ({"importance_cap": math.inf}, "importance_cap is inf"),
        ({"importance_cap": 0.5}, "importance_cap is 0.5"),
        (
            {"implementation": "fused", "importance": "norm"},
            "implementation is 'fused', but only 'reference' supports importance 'norm': choose it, or 'auto'",
        ),
        ({"implementation": "fused", "importance_floor": 0.5}, "only 'reference' supports importance_floor 0.5"),
        ({"implementation": "fused", "importance_cap": 5.0}, "only 'reference' supports importance_cap 5.0"),
        (
            {"importance": "element", "teacher_grad": [torch.zeros(2, 5, 1, 1)]},
            r"teacher_grad\[0\] has shape \(2, 5, 1, 1\), a mean over cells, but the importance 'element' needs",
        ),
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


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, 1e39, "1e-3", None])
def test_bad_weight_is_named(value):
    with pytest.raises(
        ValueError, match=f"loss weight box is {re.escape(repr(value))}, but must be a finite number >= 0"
    ):
        LossWeights(box=value)
