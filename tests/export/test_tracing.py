"""The check of an export lets nothing through but what rounding errors decide."""

import pytest
import torch
from detectron2.modeling import build_model
from tiny import detector_config

from gkd_d2.export import ExportError
from gkd_d2.export.tracing import Limits, check_equal, instances_of

BOXES = [[10.0, 10.0, 50.0, 50.0], [60.0, 10.0, 90.0, 40.0], [0.0, 0.0, 20.0, 30.0]]
SCORES = [0.99, 0.8, 0.6]
CLASSES = [1, 0, 2]


def detections(boxes=BOXES, scores=SCORES, classes=CLASSES):
    tensors = torch.tensor(boxes).reshape(-1, 4), torch.tensor(scores), torch.tensor(classes, dtype=torch.int64)
    return instances_of(*tensors, (100, 120))


class Model(torch.nn.Module):
    """Has the limits of a RetinaNet and finds what it is told to."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def forward(self, inputs):
        return [{"instances": self.found}]


@pytest.fixture
def compare(monkeypatch):
    """Compare two lists of detections, under some limits."""

    def compare(expected, found, threshold=0.05, most=100):
        monkeypatch.setattr(Limits, "of", classmethod(lambda cls, model: Limits(threshold, most, overlap=0.5)))
        check_equal(Model(expected), lambda picture: found, [torch.zeros(3, 100, 120)], "ONNX file", 1e-3)

    return compare


def test_equal_in_any_order_and_nearly_equal(compare):
    compare(detections(), detections(BOXES[::-1], SCORES[::-1], CLASSES[::-1]))
    # An IoU of 0.9926, and scores 0.0009 apart.
    compare(detections(), detections([[10.0, 10.0, 50.0, 50.3], *BOXES[1:]], [0.9891, 0.8009, 0.6]))


@pytest.mark.parametrize(
    ("found", "numbers"),
    [
        (detections([], [], []), "3 of the model's 3 detections and 0 of the ONNX file's 0"),
        (detections(BOXES[:2], SCORES[:2], CLASSES[:2]), "1 of the model's 3 detections and 0 of the ONNX file's 2"),
        (detections(classes=[1, 0, 1]), "1 of the model's 3 detections and 1 of the ONNX file's 3"),
        (detections(scores=[0.99, 0.8, 0.602]), "1 of the model's 3 detections and 1 of the ONNX file's 3"),
        # An IoU of 0.988.
        (
            detections([[10.0, 10.0, 50.0, 50.5], *BOXES[1:]], [0.9895, 0.8, 0.6]),
            "1 of the model's 3 detections and 1 of the ONNX file's 3",
        ),
        # The same one twice.
        (
            detections([*BOXES, BOXES[0]], [*SCORES, 0.99], [*CLASSES, 1]),
            "0 of the model's 3 detections and 1 of the ONNX file's 4",
        ),
    ],
)
def test_whatever_else_differs_is_refused(compare, found, numbers):
    with pytest.raises(ExportError, match=f"{numbers} have no like .*, such as (the model|the ONNX file)'s box"):
        compare(detections(), found)


def test_what_rounding_errors_decide_may_differ(compare):
    at_threshold = detections([*BOXES, [5.0, 5.0, 9.0, 9.0]], [*SCORES, 0.050001], [*CLASSES, 0])
    compare(at_threshold, detections())
    compare(detections(), at_threshold)
    with pytest.raises(ExportError, match="1 of the model's 4 detections"):
        compare(at_threshold, detections(), threshold=0.04)
    # At the limit of three detections the last may be another one of the same score.
    other = detections([*BOXES[:2], [70.0, 70.0, 90.0, 90.0]], [0.99, 0.8, 0.600001])
    compare(detections(), other, most=3)
    with pytest.raises(ExportError, match="1 of the model's 3 detections and 1 of the ONNX file's 3"):
        compare(detections(), other, most=4)


def test_either_of_two_with_equal_scores_may_suppress_the_other(compare):
    # An IoU of 0.78.
    other = [10.0, 10.0, 50.0, 61.0]
    compare(detections(), detections([other, *BOXES[1:]], [0.990001, 0.8, 0.6]))
    with pytest.raises(ExportError, match="1 of the model's 3 detections and 1 of the ONNX file's 3"):
        compare(detections(), detections([other, *BOXES[1:]], [0.9899, 0.8, 0.6]))
    with pytest.raises(ExportError, match="1 of the model's 3 detections and 1 of the ONNX file's 3"):
        # An IoU of 0.44.
        compare(detections(), detections([[10.0, 10.0, 50.0, 100.0], *BOXES[1:]]))


@pytest.mark.parametrize("kind", ["faster", "cascade", "retinanet"])
def test_limits_are_those_of_the_config(kind):
    cfg = detector_config(kind)
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.125
    cfg.TEST.DETECTIONS_PER_IMAGE = 17
    cfg.MODEL.RETINANET.NMS_THRESH_TEST = cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST = 0.375
    assert Limits.of(build_model(cfg)) == (0.125, 17, 0.375)
