"""Imitation of what is left of a channel without scale and offset, by hand and against NumPy's correlation."""

import dataclasses

import numpy as np
import pytest
import torch
from levels import plain_level, random_level

from gkd_d2.methods import PKD


@pytest.mark.parametrize(
    ("student", "teacher", "loss"),
    [
        # Deviations -1.5, -0.5, 0.5, 1.5 of both: r = 1.
        ([[1, 2], [3, 4]], [[12, 14], [16, 18]], 0.0),
        ([[1, 2], [3, 4]], [[4, 3], [2, 1]], 2.0),
        # Products of deviations 2.25 - 0.25 - 0.25 + 2.25 = 4, sum of squares 5: r = 0.8.
        ([[1, 2], [3, 4]], [[1, 3], [2, 4]], 0.2),
        # A channel that is constant becomes 0: half the other's variance is left.
        ([[1, 2], [3, 4]], [[7, 7], [7, 7]], 0.5),
        ([[3]], [[5]], 0.0),
    ],
)
def test_numbers_by_hand(student, teacher, loss):
    level = plain_level(student, teacher)
    assert PKD(weight=3.0)([level])["loss_pkd"].item() == pytest.approx(3 * loss, rel=1e-5, abs=1e-10)


def test_independent_computation():
    """The mean over channels of 1 - r, over all images and cells."""
    level = random_level()
    student, teacher = (f.detach().transpose(0, 1).flatten(1).numpy() for f in (level.student, level.teacher))
    distances = [1 - np.corrcoef(s, t)[0, 1] for s, t in zip(student, teacher)]
    assert PKD(weight=1.0)([level])["loss_pkd"].item() == pytest.approx(np.mean(distances), rel=1e-5)


def test_scale_and_offset_do_not_matter():
    level = random_level()
    scale, offset = (torch.rand(5, 1, 1, dtype=torch.float64) + 0.1 for _ in range(2))
    changed = dataclasses.replace(level, student=scale * level.student + offset, teacher=3 * level.teacher - 2)
    torch.testing.assert_close(PKD()([changed])["loss_pkd"], PKD()([level])["loss_pkd"], rtol=1e-4, atol=0)


def test_a_constant_channel_of_the_student_has_a_finite_gradient():
    student = torch.ones(1, 1, 2, 2, requires_grad=True)
    PKD()([dataclasses.replace(plain_level([[1]], [[1]]), student=student, teacher=torch.randn(1, 1, 2, 2))])[
        "loss_pkd"
    ].backward()
    assert student.grad.isfinite().all()
