"""How a backbone wants its batches padded. Detectron2 0.5 knows of a divisor alone, later versions of squares too."""

from __future__ import annotations

import dataclasses

from detectron2.layers import ShapeSpec
from detectron2.structures import ImageList
from torch import nn
from torch.nn import functional as F


@dataclasses.dataclass(frozen=True)
class Padding:
    """What a backbone declares of the batches that it is given.

    Attributes:
        declared: ``size_divisibility`` and ``padding_constraints``, as the backbone has them. Detectors whose backbones
            declare the same pad alike.
        divisor: what height and width must be divisible by for the cells of every level to cover the batch.
        square: height and width in pixels to which every batch is padded; 0: none.
    """

    declared: tuple[int, dict[str, int]]
    divisor: int
    square: int


def padding_of(backbone: nn.Module, shapes: dict[str, ShapeSpec]) -> Padding:
    """Read what a backbone declares.

    Args:
        backbone: of a detector.
        shapes: channels and stride of its levels; where it declares no divisor, the largest stride is taken.
    """
    constraints = dict(getattr(backbone, "padding_constraints", {}))
    declared = (getattr(backbone, "size_divisibility", 0), constraints)
    # Detectron2's pyramid of a ViT has its divisor under a misspelled name alone, so that Detectron2 itself ignores it.
    known = (constraints.get("size_divisibility"), declared[0], constraints.get("size_divisiblity"))
    divisor = next((number for number in known if number), None)
    return Padding(
        declared,
        divisor or max((int(shape.stride) for shape in shapes.values()), default=1),
        square_of(backbone),
    )


def square_of(backbone: nn.Module) -> int:
    """Height and width in pixels of the square to which a backbone has its batches padded; 0: none."""
    return getattr(backbone, "padding_constraints", {}).get("square_size", 0)


def pad(images: ImageList, size: tuple[int, int]) -> ImageList:
    """Pad a batch further at its bottom and right, with Detectron2's own value for normalised images, 0.

    Args:
        images: padded as their detector pads.
        size: (height, width) in pixels, no smaller than the batch.
    """
    height, width = images.tensor.shape[-2:]
    if (height, width) == size:
        return images
    return ImageList(F.pad(images.tensor, (0, size[1] - width, 0, size[0] - height)), images.image_sizes)
