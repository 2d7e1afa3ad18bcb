"""The student of a run as what stock Detectron2 reads: a config, a checkpoint and, if wanted, a TorchScript."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO

import detectron2
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, detection_utils, transforms
from detectron2.modeling import GeneralizedRCNN, RetinaNet
from detectron2.structures import Instances
from torch import Tensor, nn

from gkd_d2.config import detector_config
from gkd_d2.files import fill, making_folder, replacing
from gkd_d2.student import find_checkpoint, load_student
from gkd_d2.text import counted

CHECKPOINT, CONFIG, SCRIPT = "model.pth", "config.yaml", "model.ts"

# The most by which a TorchScript may differ from the model: in pixels, and of scores.
BOX_TOLERANCE, SCORE_TOLERANCE = 1e-2, 1e-4


class ExportError(Exception):
    """A student can't be exported; the text says why and what to do."""


def export_student(
    cfg: CfgNode, weights: Path, output: Path, *, half: bool = False, image: Tensor | None = None, force: bool = False
) -> dict[str, Path]:
    """Write a student as a plain Detectron2 checkpoint and config; nothing is written unless all of it can be.

    Args:
        cfg: of a distiller or of a plain detector.
        weights: a checkpoint of it, or a folder whose ``last_checkpoint`` names one.
        output: the folder to write to.
        half: store floating tensors in 16 bits.
        image: C,H,W in the channel order and the range of ``cfg``; makes a TorchScript that is checked on it.
        force: replace an earlier export in ``output``.

    Returns:
        The files written: ``checkpoint``, ``config`` and, with ``image``, ``script``.

    Raises:
        FileExistsError: ``output`` holds an export and ``force`` is not set.
        FileNotFoundError: there is no checkpoint.
        ValueError: ``output`` is the checkpoint's own folder, the checkpoint leaves a part of the student unset, or a
            number is too large for 16 bits.
        OSError: a file can't be written; an earlier export stays as it is.
        ExportError: this Detectron2 can't make a TorchScript of the student, or the script detects differently.
    """
    output = output.resolve()
    if find_checkpoint(weights).resolve().parent == output:
        raise ValueError(
            f"{output} is the folder of the checkpoint, whose config.yaml must stay: choose another folder"
        )
    present = [output / name for name in (CHECKPOINT, CONFIG, SCRIPT) if (output / name).exists()]
    if present and not force:
        raise FileExistsError(
            f"{output} holds {', '.join(path.name for path in present)} already: choose another folder, or replace "
            "them by --force"
        )
    model = load_student(cfg, weights)
    state = model.state_dict()
    if half:
        state = to_half(state)
        # So that the script computes with what the checkpoint holds.
        model.load_state_dict(state)
    script = None if image is None else make_script(model, image)

    written = {"checkpoint": output / CHECKPOINT, "config": output / CONFIG}
    text = stock_config(cfg, written["checkpoint"]).dump()
    content: dict[str, Callable[[IO[bytes]], object]] = {
        "checkpoint": lambda file: torch.save({"model": state}, file),
        "config": lambda file: file.write(text.encode()),
    }
    if script is not None:
        written["script"] = output / SCRIPT
        content["script"] = lambda file: file.write(script.save_to_buffer())
    with contextlib.ExitStack() as stack:
        stack.enter_context(making_folder(output))
        for name, path in written.items():
            _write(content[name], stack.enter_context(replacing(path)), path)
    for path in present:
        if path not in written.values():
            path.unlink()
    return written


def _write(write: Callable[[IO[bytes]], object], temporary: Path, path: Path) -> None:
    """Write a file under another name, and see that it reaches the disk.

    Raises:
        OSError: it can't be written; the message names ``path``.
    """
    try:
        fill(temporary, write)
    except (OSError, RuntimeError) as error:
        # Where torch can't write it complains about its file, and what the system said comes before.
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError(f"{path} can't be written ({reason}); is the disk full?") from error


def stock_config(cfg: CfgNode, weights: Path) -> CfgNode:
    """The config of the plain detector that ``cfg`` trains, with the keys of a fresh Detectron2 config alone.

    Args:
        cfg: of a distiller or of a plain detector.
        weights: what MODEL.WEIGHTS becomes.
    """
    stock = get_cfg()
    plain = _common(detector_config(cfg), stock)
    plain.MODEL.WEIGHTS = str(weights)
    # The run's own folder, where whoever trains or evaluates by this config would overwrite the run.
    plain.OUTPUT_DIR = stock.OUTPUT_DIR
    return plain


def _common(cfg: CfgNode, stock: CfgNode) -> CfgNode:
    """``cfg`` without the keys that ``stock`` lacks."""
    known = {key: value for key, value in cfg.items() if key in stock}
    return CfgNode({key: _common(v, stock[key]) if isinstance(v, CfgNode) else v for key, v in known.items()})


def to_half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict with its floating tensors in 16 bits.

    Raises:
        ValueError: a finite number is beyond 65504 and would become infinite.
    """
    # Keeps the modules' versions, an attribute of the dictionary.
    rounded = copy.copy(state)
    for name, value in state.items():
        if value.is_floating_point():
            rounded[name] = value.half()
        if (value.isfinite() & ~rounded[name].isfinite()).any():
            raise ValueError(
                f"{name} holds numbers up to {value.abs().max().item():.3g}, beyond the 65504 that 16 bits can hold: "
                "export without --fp16"
            )
    return rounded


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
