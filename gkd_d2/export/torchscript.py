"""A detector as a TorchScript, by Detectron2's own exporter."""

from __future__ import annotations

import importlib
import io
import warnings
from pathlib import Path

import detectron2
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, detection_utils, transforms
from detectron2.modeling import GeneralizedRCNN, RetinaNet
from detectron2.structures import Instances
from torch import Tensor, nn

from gkd_d2.utils.text import counted

# The most by which a TorchScript may differ from the model: in pixels, and of scores.
BOX_TOLERANCE, SCORE_TOLERANCE = 1e-2, 1e-4


class ExportError(Exception):
    """A student can't be exported; the text says why and what to do."""


def sample_image(cfg: CfgNode, path: Path | None = None) -> Tensor:
    """Read an image as Detectron2's DefaultPredictor does.

    Args:
        cfg: its INPUT node says the channel order and the size.
        path: an image file; by default the first of the first dataset in DATASETS.TEST.

    Returns:
        float32, C,H,W, in [0, 255].

    Raises:
        ExportError: there is neither a path nor a dataset.
    """
    if path is None:
        name = next(iter(cfg.DATASETS.TEST), None)
        if name is None or name not in DatasetCatalog:
            raise ExportError(
                f"DATASETS.TEST names {name or 'nothing'}, which is no registered dataset to take a sample image from: "
                "name an image by --image"
            )
        path = DatasetCatalog.get(name)[0]["file_name"]
    pixels = detection_utils.read_image(str(path), format=cfg.INPUT.FORMAT)
    resize = transforms.ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)
    pixels = resize.get_transform(pixels).apply_image(pixels)
    return torch.as_tensor(pixels.astype("float32").transpose(2, 0, 1))


def make_script(model: nn.Module, image: Tensor) -> torch.jit.ScriptModule:
    """Trace a detector by Detectron2's own exporter and check what the script detects.

    The script takes one image, C,H,W, of any size, and returns the fields of its detections in the order of their
    names (pred_boxes, pred_classes, scores, with masks after the classes), then the image size. Boxes are in pixels of
    that image.

    Args:
        model: GeneralizedRCNN or RetinaNet, in eval mode.
        image: the sample, C,H,W. The script is compared with the model on it and on a smaller copy of it.

    Raises:
        ExportError: this Detectron2 can't do it, the model detects nothing on ``image``, or the script differs.
    """
    version, name = detectron2.__version__, type(model).__name__
    if not isinstance(model, (GeneralizedRCNN, RetinaNet)):
        raise ExportError(f"--torchscript knows GeneralizedRCNN and RetinaNet, the student is a {name}")
    try:
        adapter_class = importlib.import_module("detectron2.export").TracingAdapter
    except ImportError as error:
        raise ExportError(
            f"the exporter of the Detectron2 {version} that is installed can't be imported ({error}): --torchscript "
            "needs Detectron2's HEAD, or the v0.5 that tools/install_detectron2.py installs"
        ) from None
    adapter = adapter_class(model, [{"image": image}], _inference).eval()
    with torch.no_grad():
        try:
            with warnings.catch_warnings():
                # What the tracer takes for constants is looked for below, by comparison.
                warnings.simplefilter("ignore", torch.jit.TracerWarning)
                script = torch.jit.trace(adapter, (image,), check_trace=False)
            script = torch.jit.load(io.BytesIO(script.save_to_buffer()))
        except RuntimeError as error:
            heads = f" with {type(model.roi_heads).__name__}" if isinstance(model, GeneralizedRCNN) else ""
            reason = str(error).strip().splitlines()[0]
            raise ExportError(f"Detectron2 {version} can't make a TorchScript of a {name}{heads}: {reason}") from None
        if not len(_inference(model, [{"image": image}])):
            raise ExportError(
                "the student detects nothing on the sample image, so that its TorchScript can't be checked: name an "
                "image with objects by --image"
            )
        # Another size shows what was taken for a constant.
        smaller = nn.functional.interpolate(image[None], scale_factor=0.75)[0]
        for sample in (image, smaller):
            _check_equal(_inference(model, [{"image": sample}]), adapter.outputs_schema(script(sample)))
    return script


def _check_equal(expected: Instances, found: Instances) -> None:
    """Compare what the model and its script detect on one image, in any order: that of equal scores is not defined.

    Raises:
        ExportError: a detection of one has no like in the other.
    """
    boxes = torch.cdist(expected.pred_boxes.tensor, found.pred_boxes.tensor, p=float("inf")) <= BOX_TOLERANCE
    scores = (expected.scores[:, None] - found.scores).abs() <= SCORE_TOLERANCE
    alike = boxes & scores & (expected.pred_classes[:, None] == found.pred_classes)
    lost, new = (~alike.any(dim=1)).sum().item(), (~alike.any(dim=0)).sum().item()
    if lost or new or len(expected) != len(found):
        height, width = expected.image_size
        raise ExportError(
            f"the TorchScript differs from the model on an image of {height} x {width} pixels: "
            f"{lost} of the model's {counted(len(expected), 'detection')} and {new} of the script's {len(found)} have "
            f"no like in class, box (within {BOX_TOLERANCE} pixels) and score (within {SCORE_TOLERANCE})"
        )


def _inference(model: nn.Module, inputs: list[dict]) -> Instances:
    """Detections of one image, in its own size."""
    if isinstance(model, GeneralizedRCNN):
        return model.inference(inputs, do_postprocess=False)[0]
    return model(inputs)[0]["instances"]
