"""What many calls of the losses leave in memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from gkd_d2.losses import LossWeights, distillation_losses

WEIGHTS = LossWeights(gradient=0.5, box=1e-3, attention=0.2, image=0.3)
CALLS = 5000


def resident() -> int:
    """Bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.stress
@pytest.mark.parametrize("implementation", ["fused", "reference"])
def test_calls_leave_nothing_in_memory(implementation):
    """Forward and backward, with pictures and numbers of boxes that change from call to call."""
    generator = torch.Generator().manual_seed(0)

    def call(number: int) -> None:
        height, width = 8 + number % 5, 8 + number % 7
        shapes = [(2, 32, 4 * height, 4 * width), (2, 32, height, width)]
        student, teacher, student_grad, teacher_grad = (
            [torch.randn(shape, generator=generator) for shape in shapes] for _ in range(4)
        )
        for feature in student:
            feature.requires_grad_()
        corners = 32 * min(height, width) * torch.rand(2, number % 9, 2, 2, generator=generator)
        boxes = [torch.cat([c.amin(1), c.amax(1)], dim=1) for c in corners]
        losses = distillation_losses(
            student, teacher, student_grad, teacher_grad, boxes, (32 * height, 32 * width),
            weights=WEIGHTS, implementation=implementation,
        )  # fmt: skip
        sum(losses.values()).backward()

    # The allocator's own stock has grown by then.
    for number in range(CALLS // 10):
        call(number)
    before = resident()
    for number in range(CALLS):
        call(number)
    grown = resident() - before
    print(f"\n{CALLS} calls of the {implementation} losses: {grown / 2**20:+.1f} MiB of memory")
    # A tensor of the smallest level that stayed of each call would be 80 MiB.
    assert grown < 16 * 2**20
