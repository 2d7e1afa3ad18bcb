"""What TorchScript and ONNX share: a detector of tensors alone, and the check of what it became."""

from __future__ import annotations

import contextlib
import importlib
import math
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import detectron2
import torch
from detectron2.modeling import GeneralizedRCNN, RetinaNet
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor, nn

from gkd_d2.export.errors import ExportError
from gkd_d2.utils.text import counted

# What may differ by rounding errors alone: boxes, in pixels, for IoU makes too much of it in tiny ones; and scores.
_BOX_ROUNDING, _SCORE_ROUNDING = 1e-2, 1e-5


def detect(model: nn.Module, image: Tensor) -> Instances:
    """Detections of one image, in its own size.

    Args:
        model: GeneralizedRCNN or RetinaNet, in eval mode.
        image: C,H,W in the range of the detector's config.
    """
    inputs = [{"image": image}]
    with torch.no_grad():
        return _inference(model, inputs)


def _inference(model: nn.Module, inputs: list[dict]) -> Instances:
    if isinstance(model, GeneralizedRCNN):
        return model.inference(inputs, do_postprocess=False)[0]
    return model(inputs)[0]["instances"]


def tracing_adapter(model: nn.Module, image: Tensor, option: str) -> nn.Module:
    """Detectron2's own adapter, which makes a detector traceable.

    Args:
        model: in eval mode.
        image: C,H,W, the sample.
        option: of the command line that asks for it, for errors.

    Returns:
        A module from an image, C,H,W, to the fields of its detections in the order of their names, then the image size.

    Raises:
        ExportError: the model is no GeneralizedRCNN or RetinaNet, or this Detectron2 lacks the adapter.
    """
    if not isinstance(model, (GeneralizedRCNN, RetinaNet)) or hasattr(model, "sem_seg_head"):
        raise ExportError(f"{option} knows GeneralizedRCNN and RetinaNet, the student is a {type(model).__name__}")
    if getattr(model, "proposal_generator", model) is None:
        raise ExportError(
            f"{option} needs a student that finds its proposals itself, but this one loads them (MODEL.LOAD_PROPOSALS)"
        )
    try:
        adapter_class = importlib.import_module("detectron2.export").TracingAdapter
    except ImportError as error:
        raise ExportError(
            f"the exporter of the Detectron2 {detectron2.__version__} that is installed can't be imported ({error}): "
            f"{option} needs Detectron2's HEAD, or the v0.5 that tools/install_detectron2.py installs"
        ) from None
    return adapter_class(model, [{"image": image}], _inference).eval()


@contextlib.contextmanager
def tracing(model: nn.Module, what: str) -> Iterator[None]:
    """Name what can't be traced, and silence the tracer's guesses: wrong ones show in :func:`check_equal`.

    Args:
        model: that is traced.
        what: it becomes, as "a TorchScript".

    Raises:
        ExportError: the tracer or the exporter failed.
    """
    try:
        with torch.no_grad(), warnings.catch_warnings(), _keeping_limit(model):
            warnings.simplefilter("ignore")
            yield
    except RuntimeError as error:
        heads = f" with {type(model.roi_heads).__name__}" if isinstance(model, GeneralizedRCNN) else ""
        reason = str(error).strip().splitlines()[0]
        raise ExportError(
            f"Detectron2 {detectron2.__version__} can't make {what} of a {type(model).__name__}{heads}: {reason}"
        ) from None


class _Limit(int):
    """A number that Python's ``min`` takes whatever a tensor beside it holds."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        # Whether the tensor is smaller.
        return False


@contextlib.contextmanager
def _keeping_limit(model: nn.Module) -> Iterator[None]:
    """Have the traced RetinaNet keep the limit of candidates per level.

    Detectron2 0.5 cuts a level's candidates to the smaller of the limit and their number. Of a picture with fewer than
    the limit the tracer would take their number, which cuts nothing. Later versions clamp it.
    """
    if not isinstance(model, RetinaNet) or hasattr(model, "forward_training"):
        yield
        return
    limit = model.test_topk_candidates
    model.test_topk_candidates = _Limit(limit)
    try:
        yield
    finally:
        model.test_topk_candidates = limit


class Limits(NamedTuple):
    """What keeps a detection out of a model's results, as far as the model tells.

    Attributes:
        threshold: of scores.
        most: the most detections per image.
        overlap: the IoU above which the better of two detections of a class suppresses the other.
    """

    threshold: float = -math.inf
    most: float = math.inf
    overlap: float = 1.0

    @classmethod
    def of(cls, model: nn.Module) -> Limits:
        """Read them from a GeneralizedRCNN or RetinaNet; those of another kind of heads stay unknown."""
        if isinstance(model, RetinaNet):
            return cls(model.test_score_thresh, model.max_detections_per_image, model.test_nms_thresh)
        predictor = getattr(model.roi_heads, "box_predictor", None)
        if isinstance(predictor, nn.ModuleList):
            # Of a cascade, whose last stage decides.
            predictor = predictor[-1]
        most = getattr(predictor, "test_topk_per_image", -1)
        return cls(
            getattr(predictor, "test_score_thresh", -math.inf),
            most if most >= 0 else math.inf,
            getattr(predictor, "test_nms_thresh", 1.0),
        )


def check_equal(
    model: nn.Module, other: Callable[[Tensor], Instances], pictures: list[Tensor], what: str, score_tolerance: float
) -> None:
    """Compare what a model and its export detect, one by one, in any order: that of equal scores is not defined.

    A detection has its like where the class is the same, the IoU of the boxes is above 0.99, or they differ by rounding
    errors alone, and the scores differ by no more than a tolerance. One without it may only be where rounding errors
    decide: whose score is the threshold's, or the lowest of as many detections as there may be; or which of two with
    equal scores suppresses the other.

    Args:
        model: the detector.
        other: its export, from an image to detections in its size.
        pictures: C,H,W each.
        what: the export is called, as "TorchScript".
        score_tolerance: of scores.

    Raises:
        ExportError: the model detects nothing on all of the pictures; or a detection of one has no like in the other.
    """
    limits, total = Limits.of(model), 0
    for picture in pictures:
        expected = detect(model, picture)
        total += len(expected)
        _check_one(expected, other(picture), limits, what, score_tolerance)
    if not total:
        above = "" if math.isinf(limits.threshold) else f" above its score threshold, {limits.threshold:g},"
        raise ExportError(
            f"the student detects nothing{above} on the {counted(len(pictures), 'sample picture')}, so that its {what} "
            "can't be checked: train it longer, name pictures with objects by --image, or lower "
            "MODEL.ROI_HEADS.SCORE_THRESH_TEST or MODEL.RETINANET.SCORE_THRESH_TEST at the end of the command"
        )


def _check_one(expected: Instances, found: Instances, limits: Limits, what: str, score_tolerance: float) -> None:
    differences = torch.cdist(expected.pred_boxes.tensor, found.pred_boxes.tensor, p=float("inf"))
    overlaps = pairwise_iou(expected.pred_boxes, found.pred_boxes)
    scores = (expected.scores[:, None] - found.scores).abs()
    same_class = expected.pred_classes[:, None] == found.pred_classes
    near = (differences <= _BOX_ROUNDING) | (overlaps > 0.99)
    lost = torch.ones(len(expected), dtype=torch.bool)
    new = torch.ones(len(found), dtype=torch.bool)
    _pair(differences, same_class & near & (scores <= score_tolerance), lost, new)
    _pair(differences, same_class & (overlaps > limits.overlap) & (scores <= _SCORE_ROUNDING), lost, new)
    left = torch.cat([expected.scores[lost], found.scores[new]])
    decided = limits.threshold
    if max(len(expected), len(found)) >= limits.most:
        decided = torch.cat([expected.scores, found.scores]).min().item()
    if (left <= decided + _SCORE_ROUNDING).all():
        return
    height, width = expected.image_size
    example = _first_words(expected, lost, "the model") or _first_words(found, new, f"the {what}")
    raise ExportError(
        f"the {what} differs from the model on an image of {height} x {width} pixels: {int(lost.sum())} of the model's "
        f"{counted(len(expected), 'detection')} and {int(new.sum())} of the {what}'s {len(found)} have no like in "
        f"class, box (IoU above 0.99) and score (within {score_tolerance}), such as {example}"
    )


def _pair(differences: Tensor, alike: Tensor, lost: Tensor, new: Tensor) -> None:
    """Pair detections that are alike, each with one other, the nearest first; what is paired is neither lost nor new.

    Args:
        differences: M,N, of the boxes of M and N detections.
        alike: M,N, bool.
        lost: M, bool; changed in place.
        new: N, bool; changed in place.
    """
    order = differences.masked_fill(~alike, math.inf).flatten().argsort()[: int(alike.sum())]
    for pair in order.tolist():
        ours, theirs = divmod(pair, len(new))
        if lost[ours] and new[theirs]:
            lost[ours] = new[theirs] = False


def _first_words(instances: Instances, which: Tensor, whose: str) -> str:
    if not which.any():
        return ""
    first = instances[which][0]
    box = ", ".join(f"{value:.1f}" for value in first.pred_boxes.tensor[0].tolist())
    return f"{whose}'s box ({box}) of class {first.pred_classes.item()} and score {first.scores.item():.3f}"


def instances_of(boxes: Tensor, scores: Tensor, classes: Tensor, size: tuple[int, int]) -> Instances:
    """Detections as Detectron2 has them.

    Args:
        boxes: N,4, xyxy in pixels of the image.
        scores: N.
        classes: N, int64.
        size: height and width of the image.
    """
    instances = Instances(size)
    instances.pred_boxes = Boxes(boxes)
    instances.scores, instances.pred_classes = scores, classes
    return instances
