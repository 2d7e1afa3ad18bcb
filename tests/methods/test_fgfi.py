"""Imitation near objects, by hand and against an independent computation."""

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from levels import plain_level, random_pyramid
from tiny import training_batch, watched

from gkd_d2.methods import FGFI
from gkd_d2.methods.fgfi import near_object_masks

# One anchor in each of 2 x 2 cells of 8 pixels: the cell itself.
CELLS = torch.tensor([[[0.0, 0, 8, 8], [8, 0, 16, 8]], [[0, 8, 8, 16], [8, 8, 16, 16]]])[:, :, None]
# One anchor in a single cell of 16 pixels.
COARSE = torch.tensor([[[[0.0, 0, 16, 16]]]])


@pytest.mark.parametrize("together", [True, False])
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
def test_masks_of_one_level_by_hand(boxes, threshold, near, together):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    (mask,) = near_object_masks([boxes, torch.zeros(0, 4)], [CELLS], threshold, together=together)
    assert mask.int().tolist() == [near, [[0, 0], [0, 0]]]


@pytest.mark.parametrize(
    ("boxes", "near", "coarse", "near_separate"),
    [
        # Overlaps 1 at the fine level and 64 / 256 at the coarse one.
        ([[0, 0, 8, 8]], [[1, 0], [0, 0]], 0, [[1, 0], [0, 0]]),
        # 64 / 256 at each cell of the fine level and 1 at the coarse one.
        ([[0, 0, 16, 16]], [[0, 0], [0, 0]], 1, [[1, 1], [1, 1]]),
        # 64 / 128, twice, and 128 / 256: the same at both levels.
        ([[0, 0, 16, 8]], [[1, 1], [0, 0]], 1, [[1, 1], [0, 0]]),
        # Each object counts by itself.
        ([[8, 8, 16, 16], [0, 0, 16, 16]], [[0, 0], [0, 1]], 1, [[1, 1], [1, 1]]),
    ],
)
def test_masks_of_two_levels_by_hand(boxes, near, coarse, near_separate):
    boxes = torch.tensor(boxes, dtype=torch.float32)
    masks = near_object_masks([boxes], [CELLS, COARSE], 0.5, together=True)
    assert [mask.int().tolist() for mask in masks] == [[near], [[[coarse]]]]
    masks = near_object_masks([boxes], [CELLS, COARSE], 0.5, together=False)
    assert [mask.int().tolist() for mask in masks] == [[near_separate], [[[1]]]]


def test_each_anchor_of_a_cell_counts():
    """Cells of a row of three, each with a tall and a wide anchor; the object is as tall as the second cell's."""
    anchors = [[[x + dx, 0, x + 8 - dx, 8 + dy] for dx, dy in ((0, 0), (2, 8))] for x in (0.0, 8.0, 16.0)]
    box = torch.tensor([[10.0, 0, 14, 16]])
    (mask,) = near_object_masks([box], [torch.tensor([anchors])], 0.5, together=True)
    assert mask.int().tolist() == [[[0, 1, 0]]]


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        # Three cells in all, with differences 1, 2 and 4: (1 + 4 + 16) / (2 * 3), of which each level has its part.
        ("together", (5 / 6, 16 / 6)),
        # (1 + 4) / (2 * 2) and 16 / (2 * 1).
        ("separate", (1.25, 8.0)),
    ],
)
def test_numbers_by_hand(levels, expected):
    box = [torch.tensor([[0.0, 0, 16, 8]])]
    fine = plain_level([[2, 0], [4, 4]], [[1, 2], [1, 0]], boxes=box, anchors=[CELLS, COARSE])
    coarse = plain_level([[5]], [[1]], boxes=box, anchors=[CELLS, COARSE], index=1)
    method = FGFI(weight=0.1, levels=levels)
    parts = [method([level])["loss_fgfi"].item() for level in (fine, coarse)]
    assert parts == pytest.approx([0.1 * value for value in expected])
    assert method([fine, coarse])["loss_fgfi"].item() == pytest.approx(sum(parts))


def overlap(a, b):
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    inter = max(width, 0) * max(height, 0)
    area = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return inter / (sum(area) - inter)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.8])
def test_independent_computation(threshold, together):
    """Object by object and cell by cell, in the words of the paper."""
    levels = random_pyramid((5, 7), (3, 4), anchors=3)
    near = [np.zeros((3, *level.student.shape[2:]), dtype=bool) for level in levels]
    for image, boxes in enumerate(levels[0].boxes):
        for box in boxes.numpy():
            overlaps = [
                np.array([[[overlap(anchor, box) for anchor in cell] for cell in row] for row in grid.double().numpy()])
                for grid in levels[0].anchors
            ]
            best = max(found.max() for found in overlaps)
            for mask, found in zip(near, overlaps):
                mask[image] |= (found > threshold * (best if together else found.max())).any(axis=2)
    sums = [
        ((level.student.detach() - level.teacher) ** 2).sum(dim=1).numpy()[mask].sum()
        for level, mask in zip(levels, near)
    ]
    cells = [mask.sum() for mask in near]
    expected = sum(sums) / (2 * sum(cells)) if together else sum(s / (2 * n) for s, n in zip(sums, cells))
    assert all(0 < mask.sum() < mask.size for mask in near)
    method = FGFI(weight=1.0, threshold=threshold, levels="together" if together else "separate")
    assert method(levels)["loss_fgfi"].item() == pytest.approx(expected)


@pytest.mark.parametrize(("levels", "alive"), [("together", ["p2"]), ("separate", ["p2", "p3", "p4", "p5"])])
def test_the_distiller_compares_the_anchors_of_all_levels(levels, alive, distiller_config):
    """Of one small object: the watch, which asks for one level at a time, sees what the training step computes."""
    cfg = distiller_config("faster", channels=8)
    cfg.merge_from_list(["GKD.METHOD", "fgfi", "GKD.FGFI.LEVELS", levels])
    distiller = build_model(cfg).train()
    measurement = watched(distiller)
    batch = training_batch(((96, 128),))
    batch[0]["instances"] = Instances(
        (96, 128), gt_boxes=Boxes(torch.tensor([[41.0, 41, 47, 47]])), gt_classes=torch.tensor([1])
    )
    with EventStorage():
        losses = distiller(batch)
    values = {level: value for (_, level), value in measurement.report.values.items()}
    assert list(values) == ["p2", "p3", "p4", "p5"]
    assert [level for level, value in values.items() if value > 0] == alive
    assert sum(values.values()) == pytest.approx(losses["loss_fgfi"].item(), rel=1e-5)
