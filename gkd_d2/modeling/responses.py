"""What the heads of both networks predict from the features of a batch, for the methods that compare predictions."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from gkd_d2.methods import Method, Predictions, Several
from gkd_d2.modeling.split import SplitDetector
from gkd_d2.utils.text import counted, listed

_INSTEAD = "choose a method that compares features, such as gkd or fitnet"


@dataclasses.dataclass(frozen=True)
class TeacherResponses:
    """What the teacher's heads predict of one batch, and what it takes to have them predict more of it. All constant.

    Attributes:
        predictions: the teacher's name of a level -> what its heads predict from its own features.
        features: its name of a level -> N,C,H,W, of all levels that its heads use.
        proposals: its best ones, N tensors K,4, xyxy in pixels of the padded batch; empty where it makes none.
    """

    predictions: dict[str, Predictions]
    features: dict[str, Tensor]
    proposals: list[Tensor]

    def outputs(self) -> list[Tensor]:
        """What the heads gave, as logits and deltas."""
        parts = [part for level in self.predictions.values() for part in (level.cells, level.regions) if part]
        return [tensor for part in parts for tensor in (part.logits, part.deltas)]

    @property
    def region_norm(self) -> float:
        """The number of all proposals, at least 1."""
        return float(max(1, sum(len(boxes) for boxes in self.proposals)))


@dataclasses.dataclass(frozen=True)
class HeadsObservation:
    """What it takes to compare what the heads of both networks predict of one batch. All constant.

    Attributes:
        teacher: of the teacher.
        student_features: the student's name of a level -> N,C,H,W, of all levels that its heads use.
        cell_norm: see :class:`gkd_d2.methods.Responses`.
    """

    teacher: TeacherResponses
    student_features: dict[str, Tensor]
    cell_norm: float


def predictions_of_levels(
    split: SplitDetector,
    given: Mapping[str, Tensor],
    others: Mapping[str, Tensor],
    proposals: Sequence[Tensor],
    classes: Sequence[int] | None = None,
) -> list[Predictions]:
    """What heads predict from features of some levels, leaving no trace in the training of their detector.

    Args:
        split: of the detector whose heads these are.
        given: its name of a level -> N,C,H,W.
        others: the same for all levels that the heads use; those that are not given are taken from here, as constants.
        proposals: see :meth:`SplitDetector.predictions`.
        classes: see :meth:`SplitDetector.predictions`.

    Returns:
        The predictions at each given level, in the order of ``given``. They depend on no other level that is given,
        but for heads with batch norms in training mode.
    """
    dtype = next(iter(given.values())).dtype
    features = {name: given[name] if name in given else feature.detach().to(dtype) for name, feature in others.items()}
    with _without_trace(split.head_modules()):
        found = split.predictions(features, proposals, classes)
    return [found[name] for name in given]


def norms_and_plain_layers(heads: Iterable[nn.Module]) -> tuple[list[nn.Module], list[nn.Module]]:
    """The norms of heads, and their layers without weights, such as dropout and stochastic depth of any library."""
    heads, norms, plain = list(heads), [], []
    for module in itertools.chain.from_iterable(head.modules() for head in heads):
        holds = itertools.chain(module.children(), module.parameters())
        if isinstance(module, _NormBase):
            norms.append(module)
        elif next(holds, None) is None and module not in heads:
            plain.append(module)
    return norms, plain


@contextlib.contextmanager
def _without_trace(heads: list[nn.Module]) -> Iterator[None]:
    """Have heads in training mode leave their detector's training as it is.

    Norms update copies of their running statistics. Layers without weights, such as dropout, are in evaluation mode:
    they would draw from its random stream.
    """
    norms, plain = ([layer for layer in layers if layer.training] for layers in norms_and_plain_layers(heads))
    buffers = [dict(norm._buffers) for norm in norms]
    for norm, kept in zip(norms, buffers):
        norm._buffers.update({name: None if tensor is None else tensor.clone() for name, tensor in kept.items()})
    for module in plain:
        module.training = False
    try:
        yield
    finally:
        for norm, kept in zip(norms, buffers):
            norm._buffers.update(kept)
        for module in plain:
            module.training = True


def check_responses(
    method: Method,
    student: SplitDetector,
    teacher: SplitDetector,
    pairs: Iterable[tuple[str, str]],
    classes: Sequence[int | None] | None,
) -> None:
    """Refuse detectors whose predictions a method can't compare.

    Args:
        method: that compares them, alone or as one of several.
        student: the student.
        teacher: the teacher.
        pairs: the student's and the teacher's name of each distilled level.
        classes: the teacher's number of each of the student's classes; None: both have the same classes.

    Raises:
        ValueError: what the heads of one predict is not known, or they predict for other anchors, regions or classes.
    """
    wants = f"{_comparing(method)} what the heads predict"
    for who, split in (("student", student), ("teacher", teacher)):
        try:
            split.check_predictions()
        except ValueError as error:
            raise ValueError(f"{wants}, but of the {who} {error}: {_INSTEAD}") from error
    if student.two_stage != teacher.two_stage:
        kinds = ["two-stage" if split.two_stage else "one-stage" for split in (student, teacher)]
        raise ValueError(
            f"{wants}, but the student is a {kinds[0]} detector, {type(student.model).__name__}, and the teacher a "
            f"{kinds[1]} one, {type(teacher.model).__name__}: {_INSTEAD}"
        )
    unknown = [str(number) for number, theirs in enumerate(classes or ()) if theirs is None]
    if unknown:
        raise ValueError(
            f"{wants}, but GKD.TEACHER.CLASSES does not name the student's classes {listed(unknown)}, counted from 0: "
            f"correct the names, or {_INSTEAD}"
        )
    for ours, theirs in pairs:
        _check_level(wants, student, ours, teacher, theirs)
    if not method.needs_student_predictions:
        return
    settings = student.region_settings(), teacher.region_settings()
    for name, ours in settings[0].items():
        if ours != settings[1][name]:
            raise ValueError(
                f"{wants} of the same proposals, but {name} of the student is {ours}, of the teacher "
                f"{settings[1][name]}: give both box heads the same, or {_INSTEAD}"
            )


def _comparing(method: Method) -> str:
    """The methods that compare predictions, as the subject of a sentence with its verb."""
    alone = [part for part in method.modules() if isinstance(part, Method) and not isinstance(part, Several)]
    names = [type(part).__name__ for part in alone if part.needs_predictions]
    return f"{' and '.join(names)} {'compares' if len(names) == 1 else 'compare'}"


def _check_level(wants: str, student: SplitDetector, ours: str, teacher: SplitDetector, theirs: str) -> None:
    """Refuse a level whose cells have no anchors in one of the detectors, or others in each."""
    for who, split, level in (("student", student, ours), ("teacher", teacher, theirs)):
        generator, levels = split.anchor_generator() or (None, [])
        if level not in levels:
            raise ValueError(
                f"{wants}, but the {who}'s {type(split.model).__name__} predicts nothing for the cells of {level}, "
                f"only for those of {', '.join(levels)} (MODEL.RPN.IN_FEATURES of a Faster R-CNN): choose distilled "
                f"levels among these by GKD.FEATURES, or {_INSTEAD}"
            )
    found = _anchors(student, ours), _anchors(teacher, theirs)
    if found[0].shape != found[1].shape or not torch.allclose(*found, rtol=0.0, atol=1e-3):
        raise ValueError(
            f"{wants}, but at {ours} the student has {_described(found[0])}, the teacher at {theirs} has "
            f"{_described(found[1])}: give both the same anchors (MODEL.ANCHOR_GENERATOR), or {_INSTEAD}"
        )


def _anchors(split: SplitDetector, level: str) -> Tensor:
    """Those of two by two cells, which hold the stride and the offset: 2,2,A,4."""
    return split.anchors({level: torch.empty(0, 0, 2, 2, device=split.model.device)})[level].cpu()


def _described(anchors: Tensor) -> str:
    sides = anchors[0, 0, :, 2:] - anchors[0, 0, :, :2]
    sizes = [f"{width:.4g} x {height:.4g}" for width, height in sides.tolist()]
    x, y = ((anchors[0, 0, 0, :2] + anchors[0, 0, 0, 2:]) / 2).tolist()
    step = (anchors[0, 1, 0, 0] - anchors[0, 0, 0, 0]).item()
    return (
        f"{counted(len(sizes), 'anchor')} a cell, of {listed(sizes, 9)} pixels, each {step:.4g} pixels from ({x:.4g}, "
        f"{y:.4g}) on"
    )
