"""How a student starts: with the heads of its teacher."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from gkd_d2.modeling.split import SplitDetector

_logger = logging.getLogger(__name__)


@torch.no_grad()
def copy_heads(teacher: SplitDetector, student: SplitDetector, *, same_classes: bool = True) -> list[str]:
    """Copy each of the teacher's heads whose tensors have the student's names and shapes.

    A head is copied whole or not at all: a layer in front of or between copied ones that is random, or that only one of
    the two networks has, makes the copied ones useless. So is one that predicts other classes, or the same in another
    order, where all shapes may fit. Heads that are not copied are named in a warning.

    Source: the inheriting strategy of the public code of GKD (arXiv 2303.04240) and FGD (arXiv 2111.11837).

    Args:
        teacher: the detector to copy from.
        student: the detector to copy to, changed in place.
        same_classes: whether both detect the same classes in the same order.

    Returns:
        The names of the copied heads, as :meth:`SplitDetector.head_of` calls them.

    Raises:
        ValueError: no head can be copied.
    """
    source, target = _heads(teacher), _heads(student)
    differences = {name: _difference(source.get(name, {}), tensors) for name, tensors in target.items()}
    if not same_classes:
        for name in target:
            if not differences[name] and student.predicts_classes(name):
                differences[name] = "it predicts classes, which are others in the teacher, or in another order"
    copied = [name for name, difference in differences.items() if not difference]
    left = "; ".join(f"{name}: {difference}" for name, difference in differences.items() if difference)
    if not copied:
        raise ValueError(
            f"GKD.STUDENT.INIT_FROM_TEACHER is True, but no head of the teacher fits the student ({left}). Configure "
            "the student's heads, anchors and FPN as the teacher's, choose another teacher, or set "
            "GKD.STUDENT.INIT_FROM_TEACHER to False"
        )
    for name in copied:
        for key, tensor in target[name].items():
            tensor.copy_(source[name][key])
    if left:
        _logger.warning("These heads of the student do not start with the teacher's weights. %s", left)
    return copied


def warn_of_other_heads(teacher: SplitDetector, student: SplitDetector) -> None:
    """Warn where inherited heads have the student's shapes, but were trained for other anchors, levels or boxes.

    Args:
        teacher: whose heads were copied.
        student: that they were copied to.
    """
    theirs, ours = _head_settings(teacher.model), _head_settings(student.model)
    found = [
        f"{name} is {ours[name]}, the teacher's {theirs[name]}"
        for name in ours
        if name in theirs and ours[name] != theirs[name]
    ]
    if found:
        _logger.warning(
            "The student's heads start with the teacher's weights, which were trained with other settings: %s. Unless "
            "that is meant, give both the same",
            "; ".join(found),
        )


def _head_settings(model: nn.Module) -> dict[str, list]:
    """What the outputs of a detector's heads mean: their anchors, levels and units of boxes, by place in the model."""
    found: dict[str, list] = {}
    for place, module in model.named_modules():
        if place.startswith("backbone"):
            continue
        start = f"{place}." if place else ""
        for name, value in vars(module).items():
            if name.endswith("in_features") and isinstance(value, list | tuple):
                found[start + name] = list(value)
            elif name == "box2box_transform" and hasattr(value, "weights"):
                found[f"{start}{name}.weights"] = list(value.weights)
        for level in getattr(module, "cell_anchors", None) or ():
            widths, heights = (level[:, 2:] - level[:, :2]).double().unbind(dim=1)
            found.setdefault(f"{place} sizes", []).append(_distinct((widths * heights).sqrt()))
            found.setdefault(f"{place} aspect ratios", []).append(_distinct(heights / widths))
    return found


def _distinct(values: Tensor) -> list[float]:
    return values.round(decimals=3).unique().tolist()


def differing_heads(teacher: SplitDetector, student: SplitDetector, names: list[str]) -> list[str]:
    """Those of some heads, of equal shapes in both networks, whose tensors differ."""
    source, target = _heads(teacher), _heads(student)
    return [n for n in names if any(not _same(source[n][key], tensor) for key, tensor in target[n].items())]


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=0.0, atol=0.0, equal_nan=True)


def _heads(detector: SplitDetector) -> dict[str, dict[str, Tensor]]:
    """Head -> its tensors by name, for all tensors outside the backbone."""
    heads: dict[str, dict[str, Tensor]] = {}
    for name, tensor in detector.model.state_dict().items():
        if not name.startswith("backbone."):
            heads.setdefault(detector.head_of(name), {})[name] = tensor
    return heads


def _difference(source: dict[str, Tensor], target: dict[str, Tensor]) -> str:
    """The first difference between the teacher's tensors of a head and the student's; nothing where there is none."""
    if not source:
        return "the teacher has no such head"
    for name in [*target, *source]:
        if name not in source:
            return f"the teacher has no {name}"
        if name not in target:
            return f"the student has no {name}"
        if source[name].shape != target[name].shape:
            return f"{name} is {tuple(target[name].shape)}, the teacher's {tuple(source[name].shape)}"
    return ""
