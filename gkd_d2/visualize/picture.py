"""What is drawn of one image: gradient maps, box context masks and detections, as tensors."""

from __future__ import annotations

import contextlib
import dataclasses

import numpy as np
import torch
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.structures import Instances
from PIL import Image
from torch import Tensor, nn

from gkd_d2.losses import box_context_mask, gradient_map
from gkd_d2.utils.random_streams import separate_random_stream


@dataclasses.dataclass(frozen=True)
class LevelMaps:
    """One level of one image: maps of H x W cells that cover the padded batch.

    Attributes:
        name: of the level.
        stride: in pixels.
        teacher: H,W, the teacher's gradient map in [0, 1].
        student: H,W, the student's.
        mask: H,W, the box context mask.
    """

    name: str
    stride: int
    teacher: Tensor
    student: Tensor
    mask: Tensor


@dataclasses.dataclass(frozen=True)
class Picture:
    """What :func:`gkd_d2.visualize.draw.draw` draws of one image. All tensors are on the CPU.

    Attributes:
        image: height,width,3, uint8, RGB, without padding.
        padded_size: (height, width) in pixels of the batch that the maps cover; the image lies at its top left.
        levels: the maps.
        truth: ``gt_boxes`` and ``gt_classes``.
        teacher: the teacher's ``pred_boxes``, ``pred_classes`` and ``scores``.
        student: the student's.
    """

    image: np.ndarray
    padded_size: tuple[int, int]
    levels: list[LevelMaps]
    truth: Instances
    teacher: Instances
    student: Instances


@torch.no_grad()
def take_picture(
    batched_input: dict,
    padded_size: tuple[int, int],
    strides: dict[str, int],
    student_maps: tuple[list[Tensor], list[Tensor]],
    teacher_maps: tuple[list[Tensor], list[Tensor]],
    *,
    student: nn.Module,
    teacher: nn.Module,
    rectifier: str,
) -> Picture:
    """The picture of the first image of a batch. It changes nothing: no parameter, buffer, mode or random stream.

    Args:
        batched_input: the image, as for Detectron2's meta-architectures, with ground truth.
        padded_size: (height, width) of the padded batch in pixels.
        strides: level name -> stride, L levels.
        student_maps: the student's features and their gradients, L tensors N,C,H,W each. Those before alignment:
            their map is that of the aligned ones.
        teacher_maps: the same of the teacher.
        student: a GeneralizedRCNN or RetinaNet, in any mode.
        teacher: the same.
        rectifier: of the gradient maps.
    """
    truth = batched_input["instances"].to("cpu")
    levels = []
    for level, (name, stride) in enumerate(strides.items()):
        ours, theirs = (
            gradient_map(features[level][:1], gradients[level][:1], rectifier)[0].float().cpu()
            for features, gradients in (student_maps, teacher_maps)
        )
        mask = box_context_mask([truth.gt_boxes.tensor.float()], padded_size, tuple(ours.shape))[0]
        levels.append(LevelMaps(name, stride, teacher=theirs, student=ours, mask=mask))
    return Picture(
        image=_rgb(batched_input["image"], student.input_format),
        padded_size=tuple(padded_size),
        levels=levels,
        truth=truth,
        teacher=detect(teacher, batched_input),
        student=detect(student, batched_input),
    )


def detect(model: nn.Module, batched_input: dict) -> Instances:
    """The detections of a model in evaluation mode, which is left as it was, with the random streams.

    Args:
        model: a Detectron2 meta-architecture, in any mode.
        batched_input: the image.

    Returns:
        Instances on the CPU, in pixels of ``batched_input["image"]`` itself.
    """
    height, width = batched_input["image"].shape[-2:]
    # Evaluation knows no autocast.
    autocast = torch.autocast(model.device.type, enabled=False)
    with _evaluating(model), separate_random_stream(model.device, 0), autocast:
        (output,) = model([{**batched_input, "height": height, "width": width}])
    return output["instances"].to("cpu")


@contextlib.contextmanager
def _evaluating(model: nn.Module):
    """Evaluation mode without gradients; then every module's own mode again, as they may differ."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _rgb(image: Tensor, channel_order: str) -> np.ndarray:
    """C,H,W in INPUT.FORMAT -> H,W,3 of uint8."""
    pixels = convert_image_to_rgb(image.permute(1, 2, 0).to("cpu", torch.uint8), channel_order)
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels, dtype=np.uint8)).convert("RGB"))
