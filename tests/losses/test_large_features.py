"""Features whose elements 32 bits can't count."""

from __future__ import annotations

import pytest
import torch
from devices import CUDA_MARKS

from gkd_d2.losses import LossWeights, distillation_losses

WEIGHTS = LossWeights(gradient=0.5, box=1e-3, attention=0.2, image=0.3)
# So that float16 holds gradients that are divided by the number of cells.
SCALE = 2.0**16
# Of four features, their gradient, and that of one image.
NEEDED_BYTES = 32e9


def draw(shape, layout: str, device: str) -> list[torch.Tensor]:
    """Student, teacher and their gradients in float16, made where and as they are needed."""
    generator = torch.Generator(device).manual_seed(0)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    empty = [torch.empty(shape, dtype=torch.float16, device=device, memory_format=memory_format) for _ in range(4)]
    return [feature.normal_(generator=generator) for feature in empty]


def losses_and_gradient(features, boxes, image_size) -> tuple[torch.Tensor, torch.Tensor]:
    student, *others = features
    student = student.detach().requires_grad_()
    options = {"weights": WEIGHTS, "map_region": "image", "implementation": "fused"}
    losses = distillation_losses([student], *([other] for other in others), boxes, image_size, **options)
    losses = torch.stack(list(losses.values()))
    (gradient,) = torch.autograd.grad(SCALE * losses.sum(), student)
    return losses.detach(), gradient


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("device", "shape"),
    [("cpu", (2, 8, 64, 96)), pytest.param("cuda", (2, 256, 2048, 2176), marks=CUDA_MARKS)],
)
def test_a_batch_is_the_mean_of_its_images(device, shape, layout):
    """Each image by itself is small enough to be counted."""
    if device == "cuda":
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        if free < NEEDED_BYTES:
            pytest.skip(f"the GPU has {free / 1e9:.0f} GB of free memory, but this needs {NEEDED_BYTES / 1e9:.0f}")
        assert torch.Size(shape).numel() > 2**31 > torch.Size(shape).numel() // 2
    features = draw(shape, layout, device)
    height, width = image_size = (4 * shape[2], 4 * shape[3])
    # At the far end of the last image, too.
    box = torch.tensor([[0.1, 0.2, 0.4, 0.5], [0.8, 0.7, 1.0, 1.0]]) * torch.tensor([width, height, width, height])
    boxes = [box[:1], box]
    losses, gradient = losses_and_gradient(features, boxes, image_size)
    assert losses.isfinite().all() and (losses > 0).all()
    mean = torch.zeros_like(losses)
    for image in range(2):
        part = [feature[image : image + 1] for feature in features]
        own_losses, own = losses_and_gradient(part, boxes[image : image + 1], image_size)
        mean += own_losses / 2
        # A few channels at a time, for which there is memory. In the mean, for the sign of a difference that is nothing
        # but rounding may be either.
        for first in range(0, shape[1], 4):
            wanted = own[0, first : first + 4].float() / 2
            error = (gradient[image, first : first + 4].float() - wanted).abs().mean()
            size = wanted.abs().mean()
            assert size > 0 and error <= 2**-10 * size, f"image {image}, channels from {first}"
    torch.testing.assert_close(losses, mean, rtol=1e-4, atol=0)
