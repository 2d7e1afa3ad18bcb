"""A detector as a TorchScript, by Detectron2's own exporter."""

from __future__ import annotations

import io

import torch
from detectron2.structures import Instances
from torch import Tensor, nn

from gkd_d2.export.tracing import check_equal, instances_of, tracing, tracing_adapter

# The most by which a score may differ from the model's.
SCORE_TOLERANCE = 1e-4


def make_script(model: nn.Module, pictures: list[Tensor]) -> torch.jit.ScriptModule:
    """Trace a detector by Detectron2's own exporter and check what the script detects.

    The script takes one image, C,H,W, of any size, and returns the fields of its detections in the order of their
    names (pred_boxes, pred_classes, scores, with masks after the classes), then the image size. Boxes are in pixels of
    that image.

    Args:
        model: GeneralizedRCNN or RetinaNet, in eval mode.
        pictures: C,H,W each, of different sizes, which show what the tracer took for a constant; the script is traced
            on the first of them and compared with the model on all.

    Raises:
        ExportError: this Detectron2 can't do it, the model detects nothing on ``pictures``, or the script differs.
    """
    adapter = tracing_adapter(model, pictures[0], "--torchscript")
    with tracing(model, "a TorchScript"):
        script = torch.jit.trace(adapter, (pictures[0],), check_trace=False)
        script = torch.jit.load(io.BytesIO(script.save_to_buffer()))
    check_equal(model, lambda picture: detect_by_script(script, picture), pictures, "TorchScript", SCORE_TOLERANCE)
    return script


def detect_by_script(script: torch.jit.ScriptModule, image: Tensor) -> Instances:
    """Detections of one image, in its own size.

    Args:
        script: from :func:`make_script`.
        image: C,H,W, of any type.
    """
    with torch.no_grad():
        found = script(image.float())
    # Masks stand between the classes and the scores.
    boxes, classes, *_, scores, _ = found
    return instances_of(boxes, scores, classes, tuple(image.shape[1:]))
