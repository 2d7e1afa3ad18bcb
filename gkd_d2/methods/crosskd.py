"""crosskd: the teacher's heads judge the student's features."""

from __future__ import annotations

from detectron2.config import CfgNode

from gkd_d2.methods.method import METHOD_REGISTRY, Term
from gkd_d2.methods.response import ResponseMethod, divergence, quality_focal_loss


class CrossKD(ResponseMethod):
    """What the frozen teacher's heads predict from the student's features, beside what they predict from the teacher's.

    The losses of classes and boxes are those of :class:`gkd_d2.methods.response.ResponseMethod`, with P the teacher's
    predictions from the student's features. The loss of the classes of a box is

        sigmoid, as RetinaNet and the RPN have it:  :func:`gkd_d2.methods.response.quality_focal_loss`
        softmax, as the box head has it:            :func:`gkd_d2.methods.response.divergence`, T = 1

    Neither trains the student's own heads: GKD.STUDENT.INIT_FROM_TEACHER gives it those that the features are made for.

    Source: "CrossKD: Cross-Head Knowledge Distillation for Object Detection", arXiv 2306.11369, and its public code for
    RetinaNet, whose weights are 1 and 1.

    What differs: the public code cuts both heads before their last convolution, and gives each channel of the student's
    feature there the mean and the standard deviation of the teacher's; here the student's pyramid enters the teacher's
    heads as a whole, so that the student's heads may be of any kind, and keeps its scale, which heads inherited from
    the teacher see too. A sum over the cells of a RetinaNet is divided by Detectron2's moving average of the number of
    matched anchors, not by that of the batch. Anchors in the padding count. The paper has no two-stage detector: here
    the sum over the RPN's cells is divided by the number of anchors that the RPN samples for its own losses, and the
    box head's losses are the mean over the teacher's best proposals. FCOS's centerness is not imitated.

    Args:
        class_weight: of ``loss_crosskd_class``.
        box_weight: of ``loss_crosskd_box``.
    """

    needs_cross_predictions = True

    def __init__(self, class_weight: float = 1.0, box_weight: float = 1.0):
        super().__init__(
            # About what the weights that docs/results.md arrived at are as ratios.
            Term("crosskd_class", class_weight, "GKD.CROSSKD.CLASS_WEIGHT", ratio=1.0),
            Term("crosskd_box", box_weight, "GKD.CROSSKD.BOX_WEIGHT", ratio=0.3),
        )

    def student_side(self, level):
        return level.responses.cross

    def class_loss(self, student, teacher, *, softmax):
        return divergence(student, teacher, softmax=True) if softmax else quality_focal_loss(student, teacher)


@METHOD_REGISTRY.register()
def crosskd(cfg: CfgNode) -> CrossKD:
    """The options stand in GKD.CROSSKD."""
    return CrossKD(cfg.GKD.CROSSKD.CLASS_WEIGHT, cfg.GKD.CROSSKD.BOX_WEIGHT)
