"""What Detectron2's programs are made of takes an exported student: predictor and visualizer, analysis, exporters.

The programs themselves, where they are at hand, are run by test_detectron2_programs.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor
from detectron2.modeling import GeneralizedRCNN, build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.visualizer import Visualizer
from PIL import Image
from tiny import calm, needs_exporter
from torch import Tensor, nn

from gkd_d2.export import export_student, read_picture


@pytest.fixture(scope="module", params=["faster", "retinanet"])
def run(request, make_distiller_config, tmp_path_factory):
    """The folder of a distiller's run with the exported student in student/, and the distiller."""

    def change(cfg: CfgNode) -> None:
        cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0

    folder = tmp_path_factory.mktemp(request.param)
    cfg = make_distiller_config(folder, request.param, change=change)
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 96, 160
    distiller = calm(build_model(cfg)).eval()
    torch.save({"model": distiller.state_dict()}, folder / "model_final.pth")
    export_student(cfg, folder / "model_final.pth", folder / "student")
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "picture.png")
    return folder, distiller


@pytest.fixture
def predictor(run):
    """Detectron2's own, by the exported files alone."""
    cfg = get_cfg()
    cfg.merge_from_file(str(run[0] / "student" / "config.yaml"))
    return DefaultPredictor(cfg)


@pytest.fixture
def image(run, predictor):
    """The run's picture, as the detector takes it."""
    return read_picture(predictor.cfg, run[0] / "picture.png")


def assert_same(boxes: Tensor, scores: Tensor, classes: Tensor, expected: Instances) -> None:
    assert len(expected) > 10
    torch.testing.assert_close(boxes, expected.pred_boxes.tensor, atol=1e-3, rtol=0)
    torch.testing.assert_close(scores, expected.scores, atol=1e-5, rtol=0)
    assert torch.equal(classes, expected.pred_classes)


def test_the_predictor_and_the_visualizer_of_its_demo(run, predictor, image):
    folder, distiller = run
    picture = read_image(str(folder / "picture.png"), format="BGR")
    found = predictor(picture)["instances"]
    with torch.no_grad():
        (expected,) = distiller([{"image": image, "height": 60, "width": 80}])
    assert_same(found.pred_boxes.tensor, found.scores, found.pred_classes, expected["instances"])
    plain = picture[:, :, ::-1]
    drawn = Visualizer(plain, MetadataCatalog.get("no_names")).draw_instance_predictions(found).get_image()
    assert drawn.shape == plain.shape and not np.array_equal(drawn, plain)


@needs_exporter
def test_the_counters_of_its_analysis(run, predictor, image):
    from detectron2.utils.analysis import flop_count_operators, parameter_count, parameter_count_table

    model = predictor.model
    state = torch.load(run[0] / "student" / "model.pth")["model"]
    parameters = sum(value.numel() for name, value in state.items() if "running_" not in name and "num_" not in name)
    assert parameter_count(model)[""] == parameters
    assert f" {parameters / 1e6:.1f}M " in parameter_count_table(model, max_depth=1)
    operations = []

    def count(conv: nn.Conv2d, inputs: tuple[Tensor], output: Tensor) -> None:
        operations.append(output.numel() * conv.weight[0].numel())

    hooks = [conv.register_forward_hook(count) for conv in model.modules() if isinstance(conv, nn.Conv2d)]
    with torch.no_grad():
        model([{"image": image}])
    for hook in hooks:
        hook.remove()
    counted = flop_count_operators(model, [{"image": image}])
    assert counted["conv"] == pytest.approx(sum(operations) / 1e9)


@needs_exporter
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_tracing_by_its_exporter(predictor, image):
    from detectron2.export import TracingAdapter

    def detect(model: nn.Module, inputs: list[dict]) -> Instances:
        if isinstance(model, GeneralizedRCNN):
            return model.inference(inputs, do_postprocess=False)[0]
        return model(inputs)[0]["instances"]

    inputs = [{"image": image}]
    with torch.no_grad():
        expected = detect(predictor.model, inputs)
        script = torch.jit.trace(TracingAdapter(predictor.model, inputs, detect), (image,), check_trace=False)
        boxes, classes, scores, _ = script(image)
    assert_same(boxes, scores, classes, expected)


class _Scriptable(nn.Module):
    """Fields of what a detector detects, before they are scaled to a picture's own size."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model


class _ScriptableRCNN(_Scriptable):
    def forward(self, inputs: tuple[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        return [found.get_fields() for found in self.model.inference(inputs, do_postprocess=False)]


class _ScriptableRetinaNet(_Scriptable):
    def forward(self, inputs: tuple[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        return [found.get_fields() for found in self.model(inputs)]


@needs_exporter
def test_scripting_by_its_exporter(predictor, image):
    from detectron2.export import scripting_with_instances

    model = predictor.model
    with torch.no_grad():
        (expected,) = model([{"image": image}])
    kind = _ScriptableRCNN if isinstance(model, GeneralizedRCNN) else _ScriptableRetinaNet
    fields = {
        "proposal_boxes": Boxes,
        "objectness_logits": Tensor,
        "pred_boxes": Boxes,
        "scores": Tensor,
        "pred_classes": Tensor,
        "pred_masks": Tensor,
    }
    script = scripting_with_instances(kind(model).eval(), fields)
    with torch.no_grad():
        (found,) = script(({"image": image},))
    # Those of a RetinaNet are clipped to the image by what follows the part that is scripted.
    boxes = Boxes(found["pred_boxes"])
    boxes.clip(image.shape[1:])
    assert_same(boxes.tensor, found["scores"], found["pred_classes"], expected["instances"])
