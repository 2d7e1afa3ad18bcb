"""Pictures of what both networks see in a batch, taken without a trace in the training; for TensorBoard."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np
import torch
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.engine.hooks import HookBase
from detectron2.structures import Instances
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from PIL import Image
from torch import Tensor, nn

from gkd_d2.losses import LossOptions, box_context_mask, gradient_map
from gkd_d2.losses.reference import cell_importance
from gkd_d2.methods import GKD, Method
from gkd_d2.modeling.distiller import GKDDistiller
from gkd_d2.modeling.observation import Listener, Observation
from gkd_d2.modeling.split import split_detector
from gkd_d2.utils.random_streams import separate_random_stream
from gkd_d2.visualize.picture import LevelImportances, LevelMaps, Picture


class PeriodicPicture(HookBase):
    """Draws the first image of the batch every so many iterations; only the main process has a writer to take it.

    Args:
        distiller: some weight is above 0.
        period: in iterations; 0: never.

    Raises:
        ValueError: ``period`` is negative.
    """

    def __init__(self, distiller: GKDDistiller, period: int):
        if period < 0:
            raise ValueError(f"GKD.VIS_PERIOD is {period}, but must be >= 0")
        self._distiller = distiller
        self._painter = _Painter(period)

    def before_train(self) -> None:
        self._distiller.listen(self._painter)

    def after_train(self) -> None:
        self._distiller.unlisten(self._painter)


class _Painter(Listener):
    """Gives a picture to TensorBoard by the EventStorage, every ``period`` iterations."""

    needs_student_grad = needs_teacher_grad = True

    def __init__(self, period: int):
        self._period = period
        self._last = -1

    def due(self) -> bool:
        # An iteration may consist of several forwards, of which the first is drawn.
        iteration = get_event_storage().iter
        return self._period > 0 and iteration % self._period == 0 and iteration != self._last

    def __call__(self, distiller: GKDDistiller, seen: Observation) -> None:
        picture = take_picture(distiller, seen)
        if comm.is_main_process():
            # matplotlib is for runs that draw.
            from gkd_d2.visualize.draw import draw, render

            get_event_storage().put_image("gkd/maps_and_detections", render(draw(picture)).transpose(2, 0, 1))
        self._last = get_event_storage().iter


@torch.no_grad()
def take_picture(distiller: GKDDistiller, seen: Observation) -> Picture:
    """The first image of a batch as both networks see it, with the gradient maps that the method compares.

    It changes nothing of the distiller: no parameter, buffer, mode or random stream. The student's maps are those of
    its features before alignment, which equal those of the aligned ones.

    Args:
        distiller: in training mode.
        seen: by its :meth:`~gkd_d2.GKDDistiller.observe`, with the gradients of both networks.
    """
    options = distiller.method.map_options
    other = _other_importance(distiller.method)
    boxes = [seen.batched_inputs[0]["instances"].gt_boxes.tensor.float().cpu()]
    levels = []
    for level, (name, stride) in enumerate(distiller.strides.items()):
        student, student_grad, teacher, teacher_grad = (
            tensors[level][:1] for tensors in (seen.student, seen.student_grad, seen.teacher, seen.teacher_grad)
        )
        ours, theirs = (
            gradient_map(feature, gradient, options.rectifier, options.map_importance)[0].float().cpu()
            for feature, gradient in ((student, student_grad), (teacher, teacher_grad))
        )
        importance = None
        if other is not None:
            importance = cell_importance(teacher, teacher_grad, student_grad, other)[0].float().cpu()
        mask = box_context_mask(boxes, seen.image_size, tuple(ours.shape))[0]
        levels.append(LevelMaps(name, stride, teacher=theirs, student=ours, mask=mask, importance=importance))
    return picture_with(distiller, seen, levels)


def _other_importance(method: Method) -> LossOptions | None:
    """The options by which gradients weigh the cells in the imitation, where they do, but not by the maps."""
    for part in method.modules():
        # Beside other methods gkd is a part of what is run.
        if isinstance(part, GKD) and part.options.importance != part.options.map_importance:
            return part.options if part.options.weighs_by_gradient(part.weights) else None
    return None


def picture_with(
    distiller: GKDDistiller, seen: Observation, levels: Sequence[LevelMaps] | Sequence[LevelImportances]
) -> Picture:
    """The first image of a batch and both networks' detections, with what was made of its levels.

    Args:
        distiller: left as it is, as by :func:`take_picture`.
        seen: the batch.
        levels: of its first image.
    """
    batched_input = seen.batched_inputs[0]
    teacher = detect(distiller.teacher, *distiller.teacher_inputs([batched_input]))
    return Picture(
        image=_rgb(batched_input["image"], split_detector(distiller.student).input_format),
        padded_size=seen.image_size,
        levels=levels,
        truth=batched_input["instances"].to("cpu"),
        teacher=distiller.in_students_classes(teacher),
        student=detect(distiller.student, batched_input),
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
