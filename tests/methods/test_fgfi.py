"""Imitation near objects, by hand and against an independent computation."""

import dataclasses

import numpy as np
import pytest
import torch
from levels import plain_level, random_level

from gkd_d2.methods import FGFI
from gkd_d2.methods.fgfi import near_object_mask

# One anchor in each of 2 x 2 cells of 8 pixels: the cell itself.
CELLS = torch.tensor([[0.0, 0, 8, 8], [8, 0, 16, 8], [0, 8, 8, 16], [8, 8, 16, 16]])


@pytest.mark.parametrize(
    ("boxes", "threshold", "near"),
    [
        ([[0, 0, 8, 8]], 0.5, [[1, 0], [0, 0]]),
        # Overlap with both upper anchors 32 / (64 + 64 - 32).
        ([[4, 0, 12, 8]], 0.5, [[1, 1], [0, 0]]),
        # 64 / 96 and 32 / (64 + 96 - 32): the second is 3/8 of the first.
        ([[0, 0, 12, 8]], 0.5, [[1, 0], [0, 0]]),
        ([[0, 0, 12, 8]], 0.375, [[1, 0], [0, 0]]),
        ([[0, 0, 12, 8]], 0.37, [[1, 1], [0, 0]]),
        # The cells of several objects.
        ([[0, 0, 8, 8], [9, 9, 15, 15]], 0.5, [[1, 0], [0, 1]]),
        ([[100, 100, 108, 108]], 0.0, [[0, 0], [0, 0]]),
        ([[4, 4, 4, 12], [float("nan"), 0, 8, 8]], 0.0, [[0, 0], [0, 0]]),
        ([], 0.5, [[0, 0], [0, 0]]),
    ],
)
def test_masks_by_hand(boxes, threshold, near):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    mask = near_object_mask([boxes, torch.zeros(0, 4)], CELLS, (2, 2), threshold)
    assert mask.int().tolist() == [near, [[0, 0], [0, 0]]]


def test_each_anchor_of_a_cell_counts():
    """Cells of a row of three, each with a tall and a wide anchor; the object is as tall as the second cell's."""
    anchors = torch.tensor([[x + dx, 0, x + 8 - dx, 8 + dy] for x in (0.0, 8.0, 16.0) for dx, dy in ((0, 0), (2, 8))])
    box = torch.tensor([[10.0, 0, 14, 16]])
    assert near_object_mask([box], anchors, (1, 3), 0.5).int().tolist() == [[[0, 1, 0]]]


def test_numbers_by_hand():
    # Near are the two upper cells, with differences 1 and 2: (1 + 4) / (2 * 2).
    level = plain_level([[2, 0], [4, 4]], [[1, 2], [1, 0]], boxes=[torch.tensor([[4.0, 0, 12, 8]])], anchors=CELLS)
    assert FGFI(weight=0.1)([level])["loss_fgfi"].item() == pytest.approx(0.1 * 1.25)


def overlap(a, b):
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    inter = max(width, 0) * max(height, 0)
    area = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return inter / (sum(area) - inter)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.8])
def test_independent_computation(threshold):
    """Cell by cell, in the words of the paper."""
    level = dataclasses.replace(random_level((5, 7), anchors=3))
    anchors = level.anchors.double().view(5, 7, 3, 4).numpy()
    near = np.zeros((3, 5, 7), dtype=bool)
    for image, boxes in enumerate(level.boxes):
        for box in boxes.numpy():
            overlaps = np.array([[[overlap(anchor, box) for anchor in cell] for cell in row] for row in anchors])
            near[image] |= (overlaps > threshold * overlaps.max()).any(axis=2)
    squares = ((level.student.detach() - level.teacher) ** 2).sum(dim=1).numpy()
    expected = squares[near].sum() / (2 * near.sum())
    assert 0 < near.sum() < near.size
    assert FGFI(weight=1.0, threshold=threshold)([level])["loss_fgfi"].item() == pytest.approx(expected)
