"""Plain imitation, by hand and against an independent computation."""

import numpy as np
import pytest
from levels import plain_level, random_level

from gkd_d2.methods import FitNet


def test_numbers_by_hand():
    # Differences 1, 2, 3, 4: squares 30, mean 7.5; and 3 alone: 9.
    levels = [plain_level([[2, 0], [4, 4]], [[1, 2], [1, 0]]), plain_level([[5]], [[2]])]
    assert FitNet(weight=2.0)(levels) == {"loss_fitnet": 2 * (7.5 / 2 + 9 / 2)}


def test_independent_computation():
    level = random_level()
    difference = level.student.detach().numpy() - level.teacher.numpy()
    assert FitNet()([level])["loss_fitnet"].item() == pytest.approx(np.mean(difference**2) / 2)
