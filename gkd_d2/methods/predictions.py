"""What the heads of a detector predict, in a form that one-stage and two-stage detectors share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class BoxPredictions:
    """What a head predicts for R boxes and K classes.

    Attributes:
        logits: R,K where each class has its own sigmoid; R,K+1 with the background last where they share a softmax.
        deltas: R,4, or R,4*K where each class has its own.
        boxes: R,4, xyxy in pixels of the padded batch: the anchors or proposals that the deltas are relative to.
        apply_deltas: deltas R,4 and boxes R,4 -> the predicted boxes, R,4.
        softmax: whether the classes share a softmax with the background.
    """

    logits: Tensor
    deltas: Tensor
    boxes: Tensor
    apply_deltas: Callable[[Tensor, Tensor], Tensor]
    softmax: bool = False

    def of_classes(self, classes: Sequence[int]) -> BoxPredictions:
        """Those of some classes.

        Args:
            classes: their numbers, in the wanted order.

        Returns:
            The predictions with one column for each class. Under a softmax the probability of all other classes counts
            as that of the background.
        """
        number = self.logits.shape[1] - int(self.softmax)
        chosen = torch.as_tensor(list(classes), device=self.logits.device)
        logits = self.logits[:, chosen]
        if self.softmax:
            rest = sorted(set(range(number + 1)) - set(classes))
            logits = torch.cat([logits, self.logits[:, rest].logsumexp(dim=1, keepdim=True)], dim=1)
        deltas = self.deltas
        # With a single class, its own deltas are those of all.
        if deltas.shape[1] > 4:
            deltas = deltas.unflatten(1, (number, 4))[:, chosen].flatten(1)
        return dataclasses.replace(self, logits=logits, deltas=deltas)

    def rows(self, mask: Tensor) -> BoxPredictions:
        """Those of some boxes.

        Args:
            mask: R, bool.
        """
        rows = mask.nonzero()[:, 0]
        return dataclasses.replace(self, logits=self.logits[rows], deltas=self.deltas[rows], boxes=self.boxes[rows])

    def confidence(self) -> tuple[Tensor, Tensor]:
        """The largest probability of a class, the background aside, R; and the number of this class, R."""
        if self.softmax:
            return self.logits.softmax(dim=1)[:, :-1].max(dim=1)
        return self.logits.sigmoid().max(dim=1)

    def predicted_boxes(self, classes: Tensor) -> Tensor:
        """The boxes of one class for each row.

        Args:
            classes: R, the numbers of the classes; of no effect where all classes share their deltas.

        Returns:
            R,4, xyxy in pixels of the padded batch.
        """
        deltas = self.deltas
        if deltas.shape[1] > 4:
            deltas = deltas.unflatten(1, (-1, 4))[torch.arange(len(deltas), device=deltas.device), classes]
        return self.apply_deltas(deltas, self.boxes)


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What the heads of a detector predict at one level of its pyramid, for a batch of N images.

    Attributes:
        cells: for each anchor, in the order N,H,W,A: R = N*H*W*A. In a two-stage detector these are the RPN's, whose
            one class is "object".
        regions: of a two-stage detector, for each proposal that is pooled from this level, in the order of the
            proposals; None of a one-stage detector, and at levels that no region is pooled from.
    """

    cells: BoxPredictions
    regions: BoxPredictions | None = None


@dataclasses.dataclass(frozen=True)
class Responses:
    """What the heads make of one level of one training batch.

    Attributes:
        teacher: the teacher's heads, of the teacher's features; constant.
        cross: the teacher's heads, of the student's features; None where the method does not need them.
        student: the student's heads, of the student's features; None where the method does not need them.
        cell_norm: what a sum over the cells of all levels is divided by, as the student's own losses are.
        region_norm: what a sum over the regions of all levels is divided by, their number.
    """

    teacher: Predictions
    cross: Predictions | None
    student: Predictions | None
    cell_norm: float
    region_norm: float
