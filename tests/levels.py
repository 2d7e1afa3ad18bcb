"""Levels of random features, as a method of distillation sees them."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from gkd_d2.methods import Level, Method

# Odd sizes, an image without boxes, boxes that reach out of the image and one that is no box.
IMAGE_SIZE = (44, 76)
BOXES = (
    [[3.0, 5.0, 21.5, 17.0], [10.0, 2.0, 70.0, 43.0], [60.0, 30.0, 90.0, 50.0]],
    [],
    [[-8.0, 12.0, 9.0, 33.3], [30.0, 20.0, 30.0, 40.0]],
)


def random_level(size=(11, 19), *, channels: int = 5, dtype=torch.float64, anchors: int = 2) -> Level:
    """A level of three images whose student's feature asks for a gradient.

    Args:
        size: in cells.
        channels: of both features.
        dtype: of features and boxes.
        anchors: in each cell.
    """
    student, teacher, student_grad, teacher_grad = torch.randn(4, len(BOXES), channels, *size, dtype=dtype)
    corners = torch.rand(size[0] * size[1] * anchors, 2) * torch.tensor([IMAGE_SIZE[1], IMAGE_SIZE[0]])
    sides = 5 + 25 * torch.rand(len(corners), 2)
    return Level(
        student=student.requires_grad_(),
        teacher=teacher,
        boxes=[torch.tensor(boxes, dtype=dtype).reshape(-1, 4) for boxes in BOXES],
        image_size=IMAGE_SIZE,
        student_grad=student_grad,
        teacher_grad=teacher_grad,
        anchors=[torch.cat([corners - sides / 2, corners + sides / 2], dim=1).view(*size, anchors, 4)],
        name="p3",
    )


def random_pyramid(*sizes: tuple[int, int], **options) -> list[Level]:
    """Several levels of one batch.

    Args:
        sizes: of the levels, in cells.
        options: as of :func:`random_level`.
    """
    levels = [random_level(size, **options) for size in sizes]
    anchors = [level.anchors[0] for level in levels]
    return [
        dataclasses.replace(level, anchors=anchors, index=index, name=f"p{3 + index}")
        for index, level in enumerate(levels)
    ]


def plain_level(student, teacher, **fields) -> Level:
    """A level of one image of 16 x 16 pixels, one channel and the cells that are given as nested lists."""
    features = (torch.tensor(values, dtype=torch.float64)[None, None] for values in (student, teacher))
    fields = {"boxes": [torch.zeros(0, 4)], "image_size": (16, 16), "name": "p3"} | fields
    return Level(*features, **fields)


def built(method: Method, *levels: Level) -> Method:
    """The method, with parameters for some levels, if it has any: none is 0, as in the middle of a training."""
    method.build_parameters({level.name: level.teacher.shape[1] for level in levels})
    for parameter in method.parameters():
        nn.init.normal_(parameter)
    return method.to(levels[0].student.dtype)
