"""Which tensors of a network hold infinite or NaN values."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gkd_d2.utils.finite import find_not_finite


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_of_any_type_are_looked_at(dtype):
    """A sum, which torch has not for each type and which overflows, is no way to find out."""
    network = nn.Module()
    largest = torch.full((3,), torch.finfo(dtype).max, dtype=torch.float64).to(dtype)
    network.register_buffer("sound", largest)
    network.register_buffer("counter", torch.tensor(3))
    assert find_not_finite(network) == []
    for name, value in (("infinite", math.inf), ("nan", math.nan)):
        network.register_buffer(name, torch.tensor([0.0, value]).to(dtype))
    assert find_not_finite(network) == ["infinite", "nan"]
