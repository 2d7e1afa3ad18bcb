"""Batches of random features, gradients and boxes for the tests of the ops."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from gkd_d2.losses import distillation_losses

IMAGE_SIZE = (40, 132)
# Channels, height and width of each level: C not a multiple of 4, H and W of 1, one cell, several blocks; C and H*W
# multiples of 8, where 16 bytes are read at a time.
SIZES = ((7, 10, 33), (20, 5, 17), (64, 1, 9), (3, 9, 1), (5, 1, 1), (72, 12, 38))


@dataclasses.dataclass
class Batch:
    """The arguments of distillation_losses."""

    student: list[Tensor]
    teacher: list[Tensor]
    student_grad: list[Tensor]
    teacher_grad: list[Tensor]
    boxes: list[Tensor]
    image_size: tuple[int, int] = IMAGE_SIZE

    def to(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Batch:
        """A copy whose student is a leaf that requires a gradient; boxes keep their dtype."""
        lists = [
            [tensor.detach().to(device, dtype, copy=True) for tensor in tensors]
            for tensors in (self.student, self.teacher, self.student_grad, self.teacher_grad)
        ]
        for feature in lists[0]:
            feature.requires_grad_()
        return Batch(*lists, [box.to(device) for box in self.boxes], self.image_size)

    def losses(self, implementation: str, map_region: str = "image", **options) -> dict[str, Tensor]:
        """Where nothing else is said, maps are compared over the image: all cells and images count."""
        return distillation_losses(**vars(self), implementation=implementation, map_region=map_region, **options)

    def losses_and_gradients(self, implementation: str, **options) -> tuple[list[float], list[Tensor]]:
        """The four losses, and the student's gradients where the losses have different incoming gradients."""
        losses = self.losses(implementation, **options).values()
        total = sum(factor * loss for factor, loss in zip((1.0, 2.0, -3.0, 0.5), losses))
        gradients = torch.autograd.grad(total, self.student)
        return [loss.item() for loss in losses], list(gradients)


@pytest.fixture
def make_batch():
    """A function that makes a batch in float64 on the CPU whose values ``dtype`` holds exactly."""

    def make(
        sizes=SIZES,
        *,
        images: int = 2,
        box_counts: tuple[int, ...] = (0, 5),
        dtype: torch.dtype = torch.float64,
        layout: str = "contiguous",
        seed: int = 0,
    ) -> Batch:
        generator = torch.Generator().manual_seed(seed)

        def features():
            shapes = [(images, *size) for size in sizes]
            tensors = [torch.randn(shape, generator=generator).to(dtype).double() for shape in shapes]
            if layout == "channels_last":
                return [tensor.contiguous(memory_format=torch.channels_last) for tensor in tensors]
            return tensors

        student, noise, student_grad, teacher_grad = (features() for _ in range(4))
        teacher = [(0.5 * s + 0.5 * t).to(dtype).double() for s, t in zip(student, noise)]
        height, width = IMAGE_SIZE
        boxes = []
        for image in range(images):
            centres = torch.rand(box_counts[image % len(box_counts)], 2, generator=generator)
            sizes_ = torch.rand(len(centres), 2, generator=generator) * 40
            centres = centres * torch.tensor([width, height])
            boxes.append(torch.cat([centres - sizes_ / 2, centres + sizes_ / 2], dim=1))
        return Batch(student, teacher, student_grad, teacher_grad, boxes)

    return make
