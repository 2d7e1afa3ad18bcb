"""Gains over the same seeds, and their intervals."""

import math

import pytest

from gkd_d2.analysis.study.gains import paired_gain


def test_one_seed_has_a_gain_without_an_interval():
    gain = paired_gain({1: 30.0}, {1: 28.0, 2: 5.0})
    assert (gain.mean, gain.margin, gain.seeds) == (2.0, None, 1)
    assert str(gain) == "+2.0"


def test_two_seeds():
    # Differences 2 and 4: standard deviation sqrt(2), of the mean 1; quantile with one degree of freedom 12.706.
    gain = paired_gain({1: 30.0, 2: 32.0}, {1: 28.0, 2: 28.0})
    assert (gain.mean, gain.seeds) == (3.0, 2)
    assert gain.margin == pytest.approx(12.706)
    assert str(gain) == "+3.0 (-9.7 to +15.7)"


def test_three_seeds():
    # Differences 1, 2 and 3: standard deviation 1, of the mean 1 / sqrt(3); quantile 4.303.
    gain = paired_gain({5: 11.0, 6: 22.0, 7: 33.0}, {7: 30.0, 6: 20.0, 5: 10.0})
    assert (gain.mean, gain.seeds) == (2.0, 3)
    assert gain.margin == pytest.approx(4.303 / math.sqrt(3))


def test_only_shared_seeds_are_compared():
    gain = paired_gain({1: 100.0, 2: 12.0, 3: 10.0}, {2: 13.0, 3: 14.0, 4: -100.0})
    assert (gain.mean, gain.seeds) == (-2.5, 2)
    assert gain.margin == pytest.approx(12.706 * 1.5)
    assert paired_gain({1: 1.0}, {2: 1.0}) is None
    assert paired_gain({}, {2: 1.0}) is None


def test_beyond_the_table_the_interval_is_rather_too_wide():
    gain = paired_gain({seed: float(seed % 2) for seed in range(16)}, dict.fromkeys(range(16), 0.0))
    # 8 times 0 and 8 times 1: the standard deviation is sqrt(16 / 15) / 2. The quantile of 15 degrees is 2.131.
    assert gain.margin == pytest.approx(2.228 * math.sqrt(16 / 15) / 2 / 4)
