"""logits: the student's heads imitate the predictions of the teacher's."""

from __future__ import annotations

import math

from detectron2.config import CfgNode

from gkd_d2.methods.method import METHOD_REGISTRY, Term
from gkd_d2.methods.response import ResponseMethod, divergence


class Logits(ResponseMethod):
    """What the student's heads predict from the student's features, beside what the teacher's predict from its own.

    The losses of classes and boxes are those of :class:`gkd_d2.methods.response.ResponseMethod`, with P the student's
    predictions. The loss of the classes of a box is :func:`gkd_d2.methods.response.divergence` at a temperature: of
    each class by itself where it has a sigmoid, as in RetinaNet and the RPN, and of all classes and the background
    where they share a softmax, as in the box head, which both detectors apply to the teacher's proposals.

    It trains the student's heads as well as its features, and the two detectors' heads may differ in width and depth.

    Source: "Distilling the Knowledge in a Neural Network", arXiv 1503.02531, eq. 1 and section 2; applied to detection
    as in "Learning Efficient Object Detection Models with Knowledge Distillation" (NIPS 2017).

    What differs: the latter gives the background a weight of its own and bounds the squared distance of the boxes by
    the ground truth. Here boxes are compared by their GIoU and weigh as much as the teacher is sure of an object.

    Args:
        class_weight: of ``loss_logits_class``.
        box_weight: of ``loss_logits_box``.
        temperature: T of the classes, > 0.

    Raises:
        ValueError: an option is out of range.
    """

    # Each network's heads see its own features.
    needs_features = False
    needs_student_predictions = True

    def __init__(self, class_weight: float = 1.0, box_weight: float = 1.0, temperature: float = 1.0):
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"GKD.LOGITS.TEMPERATURE is {temperature}, but must be a finite number > 0")
        super().__init__(
            # About what the weights that docs/results.md arrived at are as ratios.
            Term("logits_class", class_weight, "GKD.LOGITS.CLASS_WEIGHT", ratio=0.5),
            Term("logits_box", box_weight, "GKD.LOGITS.BOX_WEIGHT", ratio=0.1),
        )
        self.temperature = temperature

    def describe(self):
        return f"temperature {self.temperature:g}"

    def student_side(self, level):
        return level.responses.student

    def class_loss(self, student, teacher, *, softmax):
        return divergence(student, teacher, self.temperature, softmax=softmax)


@METHOD_REGISTRY.register()
def logits(cfg: CfgNode) -> Logits:
    """The options stand in GKD.LOGITS."""
    node = cfg.GKD.LOGITS
    return Logits(node.CLASS_WEIGHT, node.BOX_WEIGHT, node.TEMPERATURE)
