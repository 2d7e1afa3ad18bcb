"""What both networks make of a training batch, and what is told of it."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod

import torch
from detectron2.structures import ImageList
from torch import Tensor, nn

from gkd_d2.modeling.responses import HeadsObservation


@dataclasses.dataclass(frozen=True)
class Observation:
    """What both networks make of one training batch: N images, L distilled levels.

    Attributes:
        batched_inputs: the batch, as for Detectron2's meta-architectures.
        images: the same, padded.
        losses: the student's own loss dictionary.
        student: its features, L tensors N,C,H,W, before alignment.
        student_grad: the gradient of the sum of ``losses`` with respect to them, times ``scale``; or None.
        teacher: the teacher's features, L tensors N,C,H,W.
        teacher_grad: the gradient of the teacher's own losses with respect to them, times ``scale``; or None.
        boxes: N tensors K,4 of ground truth, xyxy, pixels of the padded batch.
        scale: of the gradients.
        anchors: the student's own, L tensors H,W,A,4, xyxy, pixels of the padded batch; None where the method does not
            need them.
        heads: what the teacher's heads predict, and what it takes to have both networks' predict more; None where the
            method does not need it.
    """

    batched_inputs: list[dict]
    images: ImageList
    losses: dict[str, Tensor]
    student: list[Tensor]
    student_grad: list[Tensor] | None
    teacher: list[Tensor]
    teacher_grad: list[Tensor] | None
    boxes: list[Tensor]
    scale: float
    anchors: list[Tensor] | None
    heads: HeadsObservation | None = None

    def detached(self) -> Observation:
        """The same without the graph of the training step."""
        losses = {name: loss.detach() for name, loss in self.losses.items()}
        return dataclasses.replace(self, losses=losses, student=[feature.detach() for feature in self.student])

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the padded batch in pixels."""
        return tuple(self.images.tensor.shape[-2:])


def boxes_of(batched_inputs: list[dict], device: torch.device) -> list[Tensor]:
    """The ground-truth boxes of each image, K,4, on a device; a copy for each image would be a wait for it each."""
    boxes = [x["instances"].gt_boxes.tensor for x in batched_inputs]
    return list(torch.cat(boxes).to(device, non_blocking=True).split([len(box) for box in boxes]))


class Listener(ABC):
    """Is told what a distiller observes of a training batch, ahead of the method's losses.

    It must leave no trace in the training: it may not write to what it is given, nor change a parameter, buffer or
    mode of the networks, and gives up what it was given when it returns. Its random draws are its own. Hooks register
    listeners by :meth:`gkd_d2.GKDDistiller.listen`.

    Attributes:
        needs_student_grad: whether it reads :attr:`Observation.student_grad`.
        needs_teacher_grad: whether it reads :attr:`Observation.teacher_grad`.
    """

    needs_student_grad: bool = False
    needs_teacher_grad: bool = False

    @abstractmethod
    def due(self) -> bool:
        """Whether it wants to be told of the batch that comes next; asked within an EventStorage."""

    @abstractmethod
    def __call__(self, distiller: nn.Module, seen: Observation) -> None:
        """Take what was observed.

        Args:
            distiller: the :class:`gkd_d2.GKDDistiller` that has observed it.
            seen: detached from the graph of the training step.
        """
