"""Foreground, background and attention, by hand and against an independent computation."""

from math import ceil, exp, floor, isfinite, log

import pytest
import torch
from levels import plain_level, random_level

from gkd_d2.methods import FGD
from gkd_d2.methods.fgd import focal_masks


def masks(boxes, image_size=(16, 32), feature_size=(2, 4)):
    boxes = [torch.tensor(b, dtype=torch.float32).reshape(-1, 4) for b in boxes]
    both = focal_masks(boxes, image_size, feature_size, device=torch.device("cpu"), dtype=torch.float64)
    return [mask.tolist() for mask in both]


@pytest.mark.parametrize(
    ("boxes", "foreground", "background"),
    [
        ([], [[0, 0, 0, 0], [0, 0, 0, 0]], [[1 / 8] * 4, [1 / 8] * 4]),
        # Two cells wide after rounding outwards.
        ([[1, 1, 9, 7]], [[1 / 2, 1 / 2, 0, 0], [0, 0, 0, 0]], [[0, 0, 1 / 6, 1 / 6], [1 / 6] * 4]),
        # In both objects: as in the smaller one.
        (
            [[0, 0, 24, 16], [8, 8, 16, 16]],
            [[1 / 6, 1 / 6, 1 / 6, 0], [1 / 6, 1, 1 / 6, 0]],
            [[0, 0, 0, 1 / 2], [0, 0, 0, 1 / 2]],
        ),
        # The part of an object that is outside the level counts in its size.
        ([[24, 8, 40, 32]], [[0, 0, 0, 0], [0, 0, 0, 1 / 6]], [[1 / 7] * 4, [1 / 7, 1 / 7, 1 / 7, 0]]),
        # No background at all.
        ([[0, 0, 32, 16]], [[1 / 8] * 4, [1 / 8] * 4], [[0, 0, 0, 0], [0, 0, 0, 0]]),
        # No boxes.
        ([[8, 8, 8, 16], [0, 0, float("inf"), 8]], [[0, 0, 0, 0], [0, 0, 0, 0]], [[1 / 8] * 4, [1 / 8] * 4]),
    ],
)
def test_masks_by_hand(boxes, foreground, background):
    inside, outside = masks([boxes, []])
    assert inside[0] == [pytest.approx(row) for row in foreground]
    assert inside[1] == [[0] * 4] * 2
    assert outside[0] == [pytest.approx(row) for row in background]
    assert outside[1] == [[1 / 8] * 4] * 2


def test_numbers_by_hand():
    """The teacher is 0, so that its attention is 1 everywhere, and the student's softmax gives 1/10 to 4/10."""
    student = [[0.5 * log(1), 0.5 * log(2)], [0.5 * log(3), 0.5 * log(4)]]
    level = plain_level(student, [[0, 0], [0, 0]], boxes=[torch.tensor([[8.0, 0, 16, 8]])])
    losses = FGD(foreground=2.0, background=3.0, attention=5.0, temperature=0.5, relation=0.0)([level])
    # The object is the second cell, each of the other three weighs 1/3.
    assert losses["loss_fgd_foreground"].item() == pytest.approx(2 * 0.25 * log(2) ** 2)
    assert losses["loss_fgd_background"].item() == pytest.approx(3 * 0.25 * (log(3) ** 2 + log(4) ** 2) / 3)
    # Four times the softmax is 0.4, 0.8, 1.2, 1.6; with one channel its attention is always 1.
    assert losses["loss_fgd_attention"].item() == pytest.approx(5 * (0.6 + 0.2 + 0.2 + 0.6))


def softmax(values, temperature):
    powers = [exp(value / temperature) for value in values]
    return [len(values) * power / sum(powers) for power in powers]


def attention(feature, temperature):
    """Of one image C,H,W: a list over channels, and one over cells."""
    channels = [sum(abs(v) for v in f.flatten().tolist()) / f.numel() for f in feature]
    cells = [sum(abs(v) for v in f.tolist()) / len(f) for f in feature.flatten(1).T]
    return softmax(channels, temperature), softmax(cells, temperature)


@pytest.mark.parametrize("size", [(11, 19), (4, 5)])
def test_independent_computation(size):
    """Number by number."""
    level, temperature = random_level(size), 0.7
    n, c, height, width = level.student.shape
    expected = dict.fromkeys(("loss_fgd_foreground", "loss_fgd_background", "loss_fgd_attention"), 0.0)
    for s, t, boxes in zip(level.student.detach(), level.teacher, level.boxes):
        (channels_s, cells_s), (channels_t, cells_t) = attention(s, temperature), attention(t, temperature)
        pairs = [*zip(channels_s, channels_t), *zip(cells_s, cells_t)]
        expected["loss_fgd_attention"] += sum(abs(a - b) for a, b in pairs) / n
        weights = []
        for j in range(height):
            for i in range(width):
                weight = 0.0
                for x0, y0, x1, y1 in boxes.tolist():
                    if not (isfinite(x0 + y0 + x1 + y1) and x1 > x0 and y1 > y0):
                        continue
                    left, right = floor(x0 * width / level.image_size[1]), ceil(x1 * width / level.image_size[1])
                    top, bottom = floor(y0 * height / level.image_size[0]), ceil(y1 * height / level.image_size[0])
                    if left <= i < right and top <= j < bottom:
                        weight = max(weight, 1 / ((right - left) * (bottom - top)))
                weights.append(weight)
        outside = weights.count(0.0)
        for cell, weight in enumerate(weights):
            j, i = divmod(cell, width)
            squares = sum(channels_t[k] * (s[k, j, i] - t[k, j, i]).item() ** 2 for k in range(c))
            name = "loss_fgd_foreground" if weight else "loss_fgd_background"
            expected[name] += (weight or 1 / outside) * cells_t[cell] * squares / n
    losses = FGD(1.0, 1.0, 1.0, temperature, relation=0.0)([level])
    assert {key: loss.item() for key, loss in losses.items()} == pytest.approx(expected)
