"""Random batches to benchmark with: features and their gradients for the losses, images for a training step."""

from __future__ import annotations

import dataclasses

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

# Name -> size of the padded images in pixels, channels of every distilled level, and strides of the levels.
SHAPES = {
    "kitti": ((384, 1248), 256, (4, 8, 16, 32)),
    "coco": ((800, 1344), 256, (4, 8, 16, 32)),
    "toy": ((128, 416), 64, (4, 8, 16, 32)),
}


@dataclasses.dataclass(frozen=True)
class FeatureSpec:
    """What the features of a batch are like.

    Attributes:
        shapes: a key of :data:`SHAPES`.
        batch: number of images.
        dtype: of the features and their gradients.
        layout: "contiguous" or "channels_last".
        device: "cpu" or "cuda".
    """

    shapes: str
    batch: int
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    device: str = "cpu"


@dataclasses.dataclass(frozen=True)
class FeatureBatch:
    """The tensors of one call, as the arguments of :func:`gkd_d2.losses.distillation_losses`.

    Attributes:
        student: one feature N,C,H,W a level.
        teacher: the teacher's.
        student_grad: their gradients.
        teacher_grad: the teacher's.
        boxes: K,4 an image, xyxy in pixels, float32.
        image_size: (height, width) in pixels of the padded images.
    """

    student: list[Tensor]
    teacher: list[Tensor]
    student_grad: list[Tensor]
    teacher_grad: list[Tensor]
    boxes: list[Tensor]
    image_size: tuple[int, int]

    def to(self, dtype: torch.dtype) -> FeatureBatch:
        """The same batch with features and gradients in another type."""
        lists = [[t.detach().to(dtype) for t in ts] for ts in (self.student, self.teacher)]
        lists += [[t.to(dtype) for t in ts] for ts in (self.student_grad, self.teacher_grad)]
        return FeatureBatch(*lists, self.boxes, self.image_size)

    def with_leaves(self) -> FeatureBatch:
        """A view whose student is new to autograd, as one that takes a gradient must be."""
        return dataclasses.replace(self, student=[feature.detach().requires_grad_() for feature in self.student])

    def feature_bytes(self) -> int:
        """Of the student's features, which is what one pass reads or writes."""
        return sum(feature.nbytes for feature in self.student)


def random_boxes(number: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Boxes with sides of 16 pixels to half the image, which they may leave.

    Args:
        number: of boxes, K.
        size: (height, width) of the image in pixels.
        generator: to draw with, on its device.

    Returns:
        K,4, xyxy in pixels, float32.
    """
    limits = torch.tensor(size[::-1], device=generator.device)
    centres = limits * torch.rand(number, 2, generator=generator, device=generator.device)
    sides = 16 * (limits / 32) ** torch.rand(number, 2, generator=generator, device=generator.device)
    return torch.cat([centres - sides / 2, centres + sides / 2], dim=1)


def random_features(spec: FeatureSpec, seed: int, num_boxes: int, area: float = 1.0) -> FeatureBatch:
    """Random features, gradients and boxes, all drawn on the device.

    Args:
        spec: of the features.
        seed: of all that is drawn.
        num_boxes: in each image.
        area: of the images, in proportion to that of the shapes; it changes their width.
    """
    (height, width), channels, strides = SHAPES[spec.shapes]
    width = round(width * area / strides[-1]) * strides[-1]
    generator = torch.Generator(spec.device).manual_seed(seed)
    memory_format = torch.channels_last if spec.layout == "channels_last" else torch.contiguous_format

    def features() -> list[Tensor]:
        shapes = [(spec.batch, channels, height // stride, width // stride) for stride in strides]
        tensors = (torch.randn(shape, generator=generator, device=spec.device) for shape in shapes)
        return [tensor.to(spec.dtype).contiguous(memory_format=memory_format) for tensor in tensors]

    boxes = [random_boxes(num_boxes, (height, width), generator) for _ in range(spec.batch)]
    return FeatureBatch(features(), features(), features(), features(), boxes, (height, width))


def random_images(batch: int, size: tuple[int, int], num_boxes: int, num_classes: int) -> list[dict]:
    """Images of random pixels with random objects, the same at every call; on the CPU, as from a loader.

    Args:
        batch: number of images.
        size: (height, width) in pixels.
        num_boxes: in each image.
        num_classes: that the objects have.

    Returns:
        batched_inputs for Detectron2's meta-architectures in training.
    """
    generator = torch.Generator().manual_seed(0)
    height, width = size
    batched_inputs = []
    for _ in range(batch):
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(random_boxes(num_boxes, (height, width), generator))
        instances.gt_boxes.clip((height, width))
        instances.gt_classes = torch.randint(num_classes, (num_boxes,), generator=generator)
        image = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
        batched_inputs.append({"image": image, "instances": instances, "height": height, "width": width})
    return batched_inputs
