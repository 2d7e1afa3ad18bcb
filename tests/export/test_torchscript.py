"""A TorchScript that was not seen to detect what the model does is refused."""

import detectron2
import pytest
import torch
from detectron2.modeling import build_model
from tiny import calm, detector_config, needs_exporter

from gkd_d2.export import ExportError
from gkd_d2.export.torchscript import make_script
from gkd_d2.modeling.student import load_student


def noise(*sizes):
    return [255 * torch.rand(3, *size) for size in sizes]


@needs_exporter
def test_a_script_that_detects_differently_is_refused(retinanet):
    model = load_student(*retinanet)
    images = noise((96, 128), (72, 96))
    make_script(model, images)

    # The tracer takes the float for a constant: it is the width of the first image that the script sees.
    def shift(module, inputs, outputs):
        outputs[0]["instances"].pred_boxes.tensor += float(inputs[0][0]["image"].shape[2])

    model.register_forward_hook(shift)
    with pytest.raises(
        ExportError,
        match=r"TorchScript differs .* 72 x 96 pixels: (\d+) of the model's 100 detections and \1 of the TorchScript's",
    ):
        make_script(model, images)


@needs_exporter
def test_the_order_of_detections_does_not_matter(retinanet):
    model = load_student(*retinanet)

    def turn_round(module, inputs, outputs):
        if torch.jit.is_tracing():
            outputs[0]["instances"] = outputs[0]["instances"][torch.arange(99, -1, -1)]

    model.register_forward_hook(turn_round)
    (image,) = noise((96, 128))
    scores = make_script(model, [image])(image)[2]
    assert scores[0] < scores[-1]


@needs_exporter
def test_a_script_that_was_not_checked_is_refused(retinanet):
    cfg, path = retinanet
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 1.0
    with pytest.raises(ExportError, match="nothing above its score threshold, 1, on the 1 sample picture, .* --image"):
        make_script(load_student(cfg, path), noise((96, 128)))


def test_scripts_of_other_detectors_are_refused():
    with pytest.raises(ExportError, match="--torchscript knows GeneralizedRCNN and RetinaNet, .* a Linear"):
        make_script(torch.nn.Linear(1, 1), noise((96, 128)))


@needs_exporter
def test_what_detectron2_can_not_script_is_named():
    """v0.5 leaves a Python function in Cascade R-CNN's inference."""
    model = calm(build_model(detector_config("cascade"))).eval()
    (image,) = noise((96, 128))
    if detectron2.__version__ != "0.5":
        assert len(make_script(model, [image])(image)) == 4
        return
    with pytest.raises(ExportError, match="2 0.5 can't make a TorchScript of a GeneralizedRCNN with CascadeROIHeads: "):
        make_script(model, [image])
