"""A detector as an ONNX file, which onnxruntime runs without Detectron2 and PyTorch."""

from __future__ import annotations

import importlib
import inspect
import io
import json
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from detectron2.config import CfgNode
from detectron2.structures import Instances
from torch import Tensor, nn

from gkd_d2.data.classes import known_class_names
from gkd_d2.export.errors import ExportError
from gkd_d2.export.pictures import fit
from gkd_d2.export.tracing import check_equal, instances_of, tracing, tracing_adapter
from gkd_d2.modeling.split import split_detector

if TYPE_CHECKING:
    from onnx import ModelProto

# The first with all that is needed is 16, whose RoiAlign has Detectron2's aligned corners.
OPSET = 17
# The most by which a score may differ from the model's.
SCORE_TOLERANCE = 1e-3
INPUT, OUTPUTS = "image", ("boxes", "scores", "classes")


def import_extra(name: str, option: str) -> ModuleType:
    """A module of the extra ``export``.

    Args:
        name: such as "onnx".
        option: of the command line that needs it, for errors.

    Raises:
        ExportError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ExportError(
            f"{option} needs {error.name}, which is not installed: pip install -e .[export], or pip install onnx "
            "onnxruntime"
        ) from None


class _Interface(nn.Module):
    """From an image with a dimension for the batch to boxes, scores and classes."""

    def __init__(self, adapter: nn.Module):
        super().__init__()
        self.adapter = adapter

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        boxes, classes, scores, _ = self.adapter(image[0])
        return boxes, scores, classes


def make_onnx(
    model: nn.Module, cfg: CfgNode, pictures: Sequence[Tensor], size: tuple[int, int] | None = None
) -> ModelProto:
    """Export a detector to ONNX, as :func:`trace_onnx`, and check what the file detects.

    Args:
        model: GeneralizedRCNN or RetinaNet that detects boxes alone, on the CPU, in eval mode.
        cfg: of the detector.
        pictures: C,H,W each, of different sizes; the file is compared with the model on all of them.
        size: height and width that the input is fixed to; None: any.

    Raises:
        ExportError: as of :func:`trace_onnx`, the model detects nothing on ``pictures``, or the file differs.
    """
    if size is not None:
        pictures = [fit(picture, size, cfg.MODEL.PIXEL_MEAN)[0] for picture in pictures]
    exported = trace_onnx(model, cfg, pictures[0], fixed=size is not None)
    detector = OnnxDetector(exported.SerializeToString())
    check_runs(detector, pictures, "ONNX file")
    check_equal(model, detector.detect, list(pictures), "ONNX file", SCORE_TOLERANCE)
    return exported


def check_runs(detector: OnnxDetector, pictures: Sequence[Tensor], what: str) -> None:
    """Have onnxruntime run a file on pictures, and on an image of one colour, in which there may be nothing to detect.

    Args:
        detector: of the file.
        pictures: C,H,W each.
        what: the file is called, for the error.

    Raises:
        ExportError: onnxruntime can't.
    """
    mean = pictures[0].new_tensor(detector.padding)
    for picture in (*pictures, mean[:, None, None].expand_as(pictures[0])):
        try:
            detector.detect(picture)
        # onnxruntime's errors have no class in common but this one.
        except Exception as error:
            height, width = picture.shape[1:]
            reason = str(error).strip().splitlines()[0]
            raise ExportError(
                f"onnxruntime can't run the {what} on an image of {height} x {width} pixels: {reason}"
            ) from error


def trace_onnx(model: nn.Module, cfg: CfgNode, picture: Tensor, *, fixed: bool = False) -> ModelProto:
    """Export a detector to ONNX, without a look at what the file detects.

    Its input ``image`` is 1,3,H,W, float32 in [0, 255], in the order of channels of INPUT.FORMAT. Its outputs are
    ``boxes``, N,4, float32, xyxy in pixels of that image; ``scores``, N, float32; and ``classes``, N, int64.
    Normalisation, padding, top-k and non-maximum suppression are inside. Its metadata_props hold what else its user
    needs: see :func:`metadata`. All operators are ONNX's own, of opset :data:`OPSET`.

    Args:
        model: GeneralizedRCNN or RetinaNet that detects boxes alone, on the CPU, in eval mode.
        cfg: of the detector.
        picture: C,H,W, that the detector is traced on.
        fixed: whether the input is fixed to the height and width of ``picture``.

    Raises:
        ExportError: onnx or onnxruntime is not installed, the detector also detects masks or keypoints, or PyTorch or
            this Detectron2 can't do it.
    """
    onnx = import_extra("onnx", "--onnx")
    import_extra("onnxruntime", "--onnx")
    for name in ("mask", "keypoint"):
        if getattr(getattr(model, "roi_heads", None), f"{name}_on", False):
            raise ExportError(
                f"--onnx writes boxes, scores and classes, but the student detects {name}s, too "
                f"(MODEL.{name.upper()}_ON)"
            )
    if cfg.INPUT.FORMAT not in ("BGR", "RGB"):
        raise ExportError(f"--onnx writes files for images in BGR or RGB, but INPUT.FORMAT is {cfg.INPUT.FORMAT}")
    adapter = tracing_adapter(model, picture, "--onnx")
    options = {} if fixed else {"dynamic_axes": {INPUT: {2: "height", 3: "width"}}}
    # Non-maximum suppression leaves as many boxes as the image decides, which torch.export can't follow through
    # Detectron2's code; the tracer can. Before torch 2.5 there was nothing to choose.
    if "dynamo" in inspect.signature(torch.onnx.export).parameters:
        options["dynamo"] = False
    buffer = io.BytesIO()
    with tracing(model, "an ONNX file"):
        torch.onnx.export(
            _Interface(adapter).eval(),
            (picture[None],),
            buffer,
            input_names=[INPUT],
            output_names=list(OUTPUTS),
            opset_version=OPSET,
            **options,
        )
    exported = onnx.load_from_string(buffer.getvalue())
    _keep_zeros(exported)
    _name_dimensions(exported)
    onnx.helper.set_model_props(exported, metadata(cfg, split_detector(model).num_classes))
    onnx.checker.check_model(exported)
    return exported


def _keep_zeros(exported: ModelProto) -> None:
    """Have a size of 0 mean 0 in reshapes to sizes that the graph computes, as in PyTorch.

    By default it stands for the size that the input has there. onnxruntime's optimizer then writes -1 for what it can't
    infer, which fails where an image, or a level of its pyramid, has no detection.
    """
    made_by = {name: node for node in exported.graph.node for name in node.output}
    constants = {entry.name for entry in exported.graph.initializer}
    for node in exported.graph.node:
        shape = made_by.get(node.input[1]) if node.op_type == "Reshape" else None
        if shape is None or shape.op_type != "Concat":
            continue
        # With a size to be inferred among them ONNX allows no 0.
        computed = (name not in constants and made_by[name].op_type != "Constant" for name in shape.input)
        if all(computed):
            for attribute in node.attribute:
                if attribute.name == "allowzero":
                    attribute.i = 1


def _name_dimensions(exported: ModelProto) -> None:
    """Call the number of detections N; PyTorch names it after an operator, in each output another one."""
    for output in exported.graph.output:
        output.type.tensor_type.shape.dim[0].dim_param = "N"


def metadata(cfg: CfgNode, classes: int) -> dict[str, str]:
    """What an ONNX file says of its input and output.

    Args:
        cfg: of the detector.
        classes: their number.

    Returns:
        ``image_format``, "BGR" or "RGB"; ``class_names``, a list as JSON, empty where no dataset of the config is known
        to have as many classes; ``min_size`` and ``max_size``, to which the shorter side of a picture is resized, and
        the most that the longer one may then have, in pixels; and ``pixel_mean``, a list as JSON, to pad a picture with
        where the input's size is fixed.
    """
    known = map(known_class_names, [*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN])
    names = next((names for names in known if names and len(names) == classes), None)
    return {
        "image_format": cfg.INPUT.FORMAT,
        "class_names": json.dumps(list(names or ())),
        "min_size": str(cfg.INPUT.MIN_SIZE_TEST),
        "max_size": str(cfg.INPUT.MAX_SIZE_TEST),
        "pixel_mean": json.dumps(list(cfg.MODEL.PIXEL_MEAN)),
    }


class OnnxDetector:
    """An ONNX file of :func:`make_onnx` in onnxruntime, on the CPU, with as many threads as PyTorch has.

    Args:
        content: of the file.

    Attributes:
        padding: ``pixel_mean`` of :func:`metadata`.
    """

    def __init__(self, content: bytes):
        runtime = import_extra("onnxruntime", "--onnx")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Its threads would go on for a while after each call, at the cost of what is timed next.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Warnings of shapes that it can't infer.
        options.log_severity_level = 3
        self._session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        height, width = self._session.get_inputs()[0].shape[2:]
        self._size = (height, width) if isinstance(height, int) else None
        self.padding = json.loads(self._session.get_modelmeta().custom_metadata_map["pixel_mean"])

    def fit(self, image: Tensor) -> tuple[Tensor, tuple[float, float]]:
        """An image as the file takes it, and factors; see :func:`gkd_d2.export.pictures.fit`."""
        return (image, (1.0, 1.0)) if self._size is None else fit(image, self._size, self.padding)

    def detect(self, image: Tensor) -> Instances:
        """Detections of one image, in its own size.

        Args:
            image: C,H,W, of any type. Where the file's size is fixed, a larger one is made smaller and a smaller one
                is padded, by :func:`gkd_d2.export.pictures.fit`.
        """
        fitted, scales = self.fit(image.float())
        boxes, scores, classes = map(torch.as_tensor, self._session.run(None, {INPUT: fitted[None].numpy()}))
        instances = instances_of(boxes, scores, classes, (image.shape[1], image.shape[2]))
        instances.pred_boxes.scale(*scales)
        # Those in the padding.
        instances.pred_boxes.clip(instances.image_size)
        return instances
