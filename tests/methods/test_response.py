"""The losses of predictions by hand, and by an independent computation."""

import math

import pytest
import torch
from levels import random_pyramid
from torch.nn import functional as F

from gkd_d2.methods import BoxPredictions, CrossKD, Level, Logits, Predictions, Responses
from gkd_d2.methods.response import divergence, quality_focal_loss


def shifted(deltas, boxes):
    return boxes + deltas


def predictions(logits, deltas=None, *, softmax=False) -> BoxPredictions:
    logits = torch.tensor(logits, dtype=torch.float64)
    boxes = torch.tensor([[0.0, 0, 10, 10]], dtype=torch.float64).repeat(len(logits), 1)
    deltas = torch.zeros(len(logits), 4) if deltas is None else torch.tensor(deltas)
    return BoxPredictions(logits, deltas.double(), boxes, shifted, softmax)


def level_of(**responses) -> Level:
    feature = torch.zeros(1, 1, 1, 1)
    norms = {"cell_norm": 4.0, "region_norm": 2.0}
    responses = {"cross": None, "student": None} | responses
    return Level(feature, feature, [torch.zeros(0, 4)], (8, 8), responses=Responses(**responses, **norms))


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def test_crosskd_by_hand():
    """One anchor, two classes: the student says 0.5 and 0.25, the teacher 0.75 and 0.25."""
    teacher = Predictions(predictions([[logit(0.75), logit(0.25)]]))
    cross = Predictions(predictions([[logit(0.5), logit(0.25)]], [[5.0, 0, 5, 0]]))
    losses = CrossKD(2.0, 3.0)([level_of(teacher=teacher, cross=cross)])
    # |0.5 - 0.75| * -log(0.5); nothing of the second class. Over the norm 4, times the weight 2.
    assert losses["loss_crosskd_class"].item() == pytest.approx(2 * 0.25 * math.log(2) / 4, rel=1e-6)
    # Boxes of 100 pixels, 50 in common, 150 in all, in a hull of 150: GIoU = 1/3. The teacher is sure by 0.75.
    assert losses["loss_crosskd_box"].item() == pytest.approx(3 * 0.75 * (2 / 3) / 4, rel=1e-6)
    assert list(losses) == ["loss_crosskd_class", "loss_crosskd_box"]


def test_regions_by_hand():
    """Two proposals, one class and the background, whose loss is the divergence; each class has its own box."""
    cells = predictions([[0.0]])
    teacher = predictions([[math.log(3), 0.0], [0.0, 0.0]], [[0.0] * 4] * 2, softmax=True)
    student = predictions([[0.0, 0.0], [0.0, 0.0]], [[0.0, 0, 10, 0], [0.0] * 4], softmax=True)
    level = level_of(teacher=Predictions(cells, teacher), cross=Predictions(cells, student))
    losses = CrossKD(1.0, 1.0)([level])
    # 0.75 * log(0.75 / 0.5) + 0.25 * log(0.25 / 0.5), over two regions.
    expected = (0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2
    assert losses["loss_crosskd_class"].item() == pytest.approx(expected, rel=1e-6)
    # Half of the hull, which is the union: GIoU = 1/2.
    assert losses["loss_crosskd_box"].item() == pytest.approx(0.75 * 0.5 / 2, rel=1e-6)


def test_logits_by_hand():
    teacher, student = predictions([[logit(0.75)]]), predictions([[0.0]], [[5.0, 0, 5, 0]])
    level = level_of(teacher=Predictions(teacher), student=Predictions(student))
    losses = Logits(1.0, 1.0)([level])
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert losses["loss_logits_class"].item() == pytest.approx(expected / 4, rel=1e-6)
    assert losses["loss_logits_box"].item() == pytest.approx(0.75 * (2 / 3) / 4, rel=1e-6)
    # At temperature 2 the teacher says sqrt(3) / (1 + sqrt(3)), and the loss is multiplied by 4.
    losses = Logits(1.0, 0.0, temperature=2.0)([level])
    soft = math.sqrt(3) / (1 + math.sqrt(3))
    expected = 4 * (soft * math.log(2 * soft) + (1 - soft) * math.log(2 * (1 - soft)))
    assert list(losses) == ["loss_logits_class"]
    assert losses["loss_logits_class"].item() == pytest.approx(expected / 4, rel=1e-6)


def test_the_box_of_the_teachers_class_counts():
    """The teacher's best class is the second; the student's box of the first is far off."""
    cells = predictions([[0.0]])
    teacher = predictions([[0.0, 2.0, -9.0]], [[90.0, 90, 90, 90, 0, 0, 0, 0]], softmax=True)
    student = predictions([[5.0, 0.0, 0.0]], [[-50.0, 0, 70, 0, 0, 0, 0, 0]], softmax=True)
    losses = Logits(0.0, 1.0)([level_of(teacher=Predictions(cells, teacher), student=Predictions(cells, student))])
    assert losses["loss_logits_box"].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("softmax", [False, True])
def test_divergence_is_that_of_torchs_distributions(softmax):
    student, teacher = 3 * torch.randn(2, 50, 6, dtype=torch.float64)
    for temperature in (0.5, 1.0, 4.0):
        kind = torch.distributions.Categorical if softmax else torch.distributions.Bernoulli
        theirs, ours = kind(logits=teacher / temperature), kind(logits=student / temperature)
        expected = torch.distributions.kl_divergence(theirs, ours)
        expected = temperature**2 * (expected if softmax else expected.sum(dim=1))
        torch.testing.assert_close(divergence(student, teacher, temperature, softmax=softmax), expected)


def test_divergence_of_extreme_logits_is_finite():
    student = torch.tensor([[200.0, -200.0]], requires_grad=True)
    for softmax in (False, True):
        loss = divergence(student, -student.detach(), softmax=softmax)
        (gradient,) = torch.autograd.grad(loss.sum(), student)
        assert loss.isfinite().all() and gradient.isfinite().all()


def test_quality_focal_loss_by_its_definition():
    student, teacher = torch.randn(2, 40, 3, dtype=torch.float64)
    s, t = student.sigmoid(), teacher.sigmoid()
    expected = ((s - t).abs() * (-t * s.log() - (1 - t) * (1 - s).log())).sum(dim=1)
    torch.testing.assert_close(quality_focal_loss(student, teacher), expected)


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("loss", [divergence, quality_focal_loss])
def test_gradcheck(loss, softmax):
    student = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(4, 3, dtype=torch.float64)
    options = {"softmax": softmax} if loss is divergence else {}
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher, **options), student)


@pytest.mark.parametrize("method", [CrossKD(), Logits(temperature=3.0)])
def test_equal_predictions_cost_nothing(method):
    cells, regions = predictions(torch.randn(7, 3).tolist()), predictions(torch.randn(5, 4).tolist(), softmax=True)
    same = Predictions(cells, regions)
    losses = method([level_of(teacher=same, cross=same, student=same)])
    assert len(losses) == 2 and all(abs(loss.item()) < 1e-6 for loss in losses.values())
    assert losses[f"loss_{method.__class__.__name__.lower()}_class"] == 0


def test_half_precision_is_widened():
    teacher = predictions([[300.0, -300.0]])
    student = BoxPredictions(torch.zeros(1, 2).half(), torch.zeros(1, 4).half(), teacher.boxes.float(), shifted)
    losses = Logits()([level_of(teacher=Predictions(teacher), student=Predictions(student))])
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    assert losses["loss_logits_class"].item() == pytest.approx(2 * math.log(2) / 4, rel=1e-5)


def test_no_regions_at_a_level():
    cells, none = predictions([[0.0]]), predictions(torch.zeros(0, 4).tolist() or [[0.0] * 4], softmax=True)
    none = none.rows(torch.tensor([False]))
    level = level_of(teacher=Predictions(cells, none), cross=Predictions(cells, none))
    assert all(loss.item() == pytest.approx(0, abs=1e-6) for loss in CrossKD()([level]).values())


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_a_temperature_out_of_range(temperature):
    with pytest.raises(ValueError, match=f"GKD.LOGITS.TEMPERATURE is {temperature}, but must be a finite number > 0"):
        Logits(temperature=temperature)


def test_levels_are_summed():
    """What the watch relies on."""
    levels = []
    for level in random_pyramid((3, 5), (2, 3)):
        number = level.student[0, 0].numel()
        sides = [predictions(torch.randn(number, 3).tolist(), torch.randn(number, 4).tolist()) for _ in range(2)]
        responses = Responses(Predictions(sides[0]), Predictions(sides[1]), None, cell_norm=3.0, region_norm=1.0)
        levels.append(Level(**{**vars(level), "responses": responses}))
    method = CrossKD()
    whole, parts = method(levels), [method([level]) for level in levels]
    for key, loss in whole.items():
        torch.testing.assert_close(loss, sum(part[key] for part in parts))
    assert F.relu(whole["loss_crosskd_class"]) > 0
