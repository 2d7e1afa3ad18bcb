"""What the methods share that compare predictions."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import generalized_box_iou_loss

from gkd_d2.losses.reference import accumulation_dtype
from gkd_d2.methods.method import Level, LevelwiseMethod, Term
from gkd_d2.methods.predictions import BoxPredictions, Predictions


class ResponseMethod(LevelwiseMethod):
    """Losses of predictions P of boxes r beside those T of the teacher, of classes and of boxes.

        loss_NAME_class = w * sum over cells and regions r of 1/norm * class_loss(P_r, T_r)
        loss_NAME_box   = w * sum over cells and regions r of 1/norm * c_r * ( 1 - GIoU(box(P_r), box(T_r)) )

    Cells are the anchors at all cells of the distilled levels; regions are the teacher's best proposals, in two-stage
    detectors alone, whose cells are the RPN's. norm is :attr:`Responses.cell_norm` or :attr:`Responses.region_norm`.
    c_r is the teacher's largest probability of a class other than the background, and box(.) is the box that is
    predicted for this class. GIoU: arXiv 1902.09630.

    Args:
        classes: the loss of the classes, whose name is NAME_class.
        boxes: that of the boxes, NAME_box.
    """

    def __init__(self, classes: Term, boxes: Term):
        self._class_key, self._box_key = f"loss_{classes.name}", f"loss_{boxes.name}"
        super().__init__({self._class_key: classes, self._box_key: boxes})

    @abstractmethod
    def student_side(self, level: Level) -> Predictions:
        """The predictions that are compared with the teacher's and receive a gradient."""

    @abstractmethod
    def class_loss(self, student: Tensor, teacher: Tensor, *, softmax: bool) -> Tensor:
        """The loss of the classes.

        Args:
            student: R,K logits; R,K+1 with the background under a softmax.
            teacher: the same of the teacher, constant.
            softmax: see :class:`BoxPredictions`.

        Returns:
            R, the loss of each box.
        """

    def level_losses(self, level):
        responses, student = level.responses, self.student_side(level)
        losses = self._losses(student.cells, responses.teacher.cells, responses.cell_norm)
        if student.regions is not None and responses.teacher.regions is not None:
            regions = self._losses(student.regions, responses.teacher.regions, responses.region_norm)
            losses = {key: loss + regions[key] for key, loss in losses.items()}
        return losses

    def _losses(self, student: BoxPredictions, teacher: BoxPredictions, norm: float) -> dict[str, Tensor]:
        if student.logits.shape != teacher.logits.shape:
            raise ValueError(
                f"the student's heads predict {tuple(student.logits.shape)} logits of boxes and classes, the teacher's "
                f"{tuple(teacher.logits.shape)}: they can't be compared"
            )
        dtype = accumulation_dtype(student.logits)
        ours, theirs = student.logits.to(dtype), teacher.logits.detach().to(dtype)
        losses = {}
        active = self.active()
        if self._class_key in active:
            losses[self._class_key] = self.class_loss(ours, theirs, softmax=teacher.softmax).sum() / norm
        if self._box_key in active:
            confidence, classes = teacher.confidence()
            wanted = teacher.predicted_boxes(classes).detach()
            distance = generalized_box_iou_loss(student.predicted_boxes(classes).to(dtype), wanted.to(dtype))
            losses[self._box_key] = (confidence.detach().to(dtype) * distance).sum() / norm
        return losses


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0, *, softmax: bool) -> Tensor:
    """Kullback-Leibler divergence of the student's probabilities from the teacher's at a temperature T, times T^2:

        softmax:  T^2 * sum over k of t_k * log(t_k / s_k),   t, s = softmax(logits / T)
        sigmoid:  T^2 * sum over k of t_k * log(t_k / s_k) + (1 - t_k) * log((1 - t_k) / (1 - s_k)),
                  t, s = sigmoid(logits / T)

    Source: "Distilling the Knowledge in a Neural Network", arXiv 1503.02531.

    Args:
        student: R,K logits.
        teacher: R,K logits.
        temperature: T, > 0.
        softmax: whether the K columns share a softmax.

    Returns:
        R.
    """
    student, teacher = student / temperature, teacher / temperature
    if softmax:
        pairs = [(student.log_softmax(dim=1), teacher.log_softmax(dim=1))]
    else:
        # Of each class and of its absence.
        pairs = [(F.logsigmoid(sign * student), F.logsigmoid(sign * teacher)) for sign in (1, -1)]
    found = sum(F.kl_div(ours, theirs, reduction="none", log_target=True) for ours, theirs in pairs)
    return temperature**2 * found.sum(dim=1)


def quality_focal_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross entropy with the teacher's probabilities t, times the distance to them:

        sum over k of |s_k - t_k| * ( -t_k * log(s_k) - (1 - t_k) * log(1 - s_k) ),   t, s = sigmoid(logits)

    Source: the quality focal loss of arXiv 2006.04388 with beta 1 and soft targets, as CrossKD has it.

    Args:
        student: R,K logits.
        teacher: R,K logits.

    Returns:
        R.
    """
    target = teacher.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(student, target, reduction="none")
    return ((student.sigmoid() - target).abs() * entropy).sum(dim=1)
