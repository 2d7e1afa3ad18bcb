"""The public losses: arguments are checked here, once, and the implementation is chosen here.

Formulas: docs/method.md and the docstrings of :mod:`gkd_d2.losses.reference`.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from gkd_d2.losses import fused, reference
from gkd_d2.losses.options import (
    MAP_IMPORTANCES,
    RECTIFIERS,
    LossOptions,
    LossWeights,
    check_choice,
    check_implementation,
)
from gkd_d2.utils.text import counted

# Reasons why the slower implementation is used that were told.
_logged: set[str] = set()


def gradient_map(feature: Tensor, gradient: Tensor, rectifier: str = "abs", importance: str = "channel") -> Tensor:
    """The gradient-guided map of one level: see :func:`gkd_d2.losses.reference.gradient_map`.

    Args:
        feature: N,C,H,W, any floating dtype.
        gradient: N,C,H,W, the detection loss's gradient with respect to ``feature``; or, for the importance "channel",
            N,C,1,1, its spatial mean.
        rectifier: "abs" or "relu".
        importance: "channel" or "element".

    Returns:
        N,H,W in [0, 1], float32 (float64 for float64 features); differentiable in ``feature``.

    Raises:
        ValueError: shapes disagree, or the rectifier or the importance is unknown.
    """
    check_choice("rectifier", rectifier, RECTIFIERS)
    check_choice("importance", importance, MAP_IMPORTANCES)
    if feature.dim() != 4 or gradient.shape not in (feature.shape, _mean_shape(feature)):
        raise ValueError(
            "feature and gradient must have one shape N,C,H,W, or the gradient N,C,1,1, "
            f"got {tuple(feature.shape)} and {tuple(gradient.shape)}"
        )
    if importance != "channel":
        _check_cells("gradient", importance, feature, gradient)
    return reference.gradient_map(feature, gradient, rectifier, importance)


def box_context_mask(
    boxes: list[Tensor],
    image_size: tuple[int, int],
    feature_size: tuple[int, int],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The box context mask of one level: see :func:`gkd_d2.losses.reference.box_context_mask`.

    Args:
        boxes: N tensors K,4, xyxy, pixels of the padded batch.
        image_size: (height, width) of the padded batch in pixels.
        feature_size: (height, width) of the level in cells.
        device: of the result; default: that of the boxes.
        dtype: of the result; default: torch's default dtype.

    Returns:
        N,H,W.

    Raises:
        ValueError: a box tensor is not K,4 or a size is not positive.
    """
    _check_boxes(boxes, image_size)
    _check_size("feature_size", feature_size)
    return reference.box_context_mask(boxes, image_size, feature_size, device=device, dtype=dtype)


def distillation_losses(
    student: list[Tensor],
    teacher: list[Tensor],
    student_grad: list[Tensor] | None,
    teacher_grad: list[Tensor] | None,
    boxes: list[Tensor],
    image_size: tuple[int, int],
    *,
    weights: LossWeights = LossWeights(),
    temperature: float = LossOptions.temperature,
    weighting: str = LossOptions.weighting,
    rectifier: str = LossOptions.rectifier,
    map_region: str = LossOptions.map_region,
    importance: str = LossOptions.importance,
    importance_floor: float = LossOptions.importance_floor,
    importance_cap: float = LossOptions.importance_cap,
    implementation: str = "auto",
) -> dict[str, Tensor]:
    """The four distillation losses of a batch, weighted and summed over L levels.

    Args:
        student: L tensors N,C,H,W (C, H, W may differ per level); the only argument that receives a gradient.
        teacher: L tensors of the same shapes.
        student_grad: L tensors of the same shapes: the student's own detection loss's gradient with respect to
            ``student``; or, for the importance "channel", N,C,1,1, its spatial mean, for no more of it enters the
            losses. May be None where :meth:`LossOptions.need_student_grad` is False.
        teacher_grad: the same of the teacher. May be None where :meth:`LossOptions.need_teacher_grad` is False.
        boxes: N tensors K,4 of ground truth, xyxy, pixels of the padded batch; K may be 0.
        image_size: (height, width) of the padded batch in pixels.
        weights: of the four losses; default: those of a config, as for all options.
        temperature, weighting, rectifier, map_region, importance, importance_floor, importance_cap: see
            :class:`gkd_d2.losses.LossOptions`.
        implementation: "reference" (PyTorch), "fused" (the extension) or "auto": fused where the extension is built
            for the features' device and knows the options, else reference.

    Returns:
        ``loss_gkd_gradient``, ``loss_bmfi_box``, ``loss_bmfi_attention``, ``loss_bmfi_image``: scalars of float32
        (float64 for float64 features).

    Raises:
        ValueError: lists, shapes, dtypes or devices disagree, a needed gradient is None, or its mean where that is not
            enough; an option is unknown or out of range, or "fused" does not know it.
        RuntimeError: ``implementation`` is "fused" and the extension is not built for the device.
    """
    options = LossOptions(
        temperature=temperature,
        weighting=weighting,
        rectifier=rectifier,
        map_region=map_region,
        importance=importance,
        importance_floor=importance_floor,
        importance_cap=importance_cap,
    )
    check_implementation(implementation, options, weights)
    _check_boxes(boxes, image_size)
    if not options.need_student_grad(weights):
        student_grad = None
    elif student_grad is None:
        raise ValueError("student_grad is None, but loss_gkd_gradient and the importance 'student' need it")
    if not options.need_teacher_grad(weights):
        teacher_grad = None
    elif teacher_grad is None:
        raise ValueError(
            "teacher_grad is None, but loss_gkd_gradient and the weightings 'gradient' and 'attention_gradient' need it"
        )
    _check_levels(student, teacher, student_grad, teacher_grad, len(boxes))
    if options.need_cell_grads(weights):
        _check_all_cells(student, student_grad, teacher_grad, options, weights)
    compute = _choose(implementation, options, weights, student[0].device)
    return compute(
        list(student),
        list(teacher),
        student_grad,
        teacher_grad,
        list(boxes),
        image_size,
        weights=weights,
        options=options,
    )


def describe_implementation(
    implementation: str, options: LossOptions, weights: LossWeights, device: torch.device
) -> str:
    """Who computes the losses on a device and why, in words.

    Args:
        implementation: as for :func:`distillation_losses`.
        options: of the losses.
        weights: of the losses.
        device: of the features.

    Raises:
        RuntimeError: ``implementation`` is "fused" and the extension is not built for the device.
    """
    if implementation == "reference":
        return "PyTorch (GKD.IMPLEMENTATION is reference)"
    reason = _fallback_reason(implementation, options, weights, device)
    if reason is None:
        return f"the compiled extension, on {device.type}"
    return f"PyTorch, which is slower: {reason}"


def _choose(implementation: str, options: LossOptions, weights: LossWeights, device: torch.device):
    """The function that computes the losses."""
    if implementation == "reference":
        return reference.distillation_losses
    reason = _fallback_reason(implementation, options, weights, device)
    if reason is None:
        return fused.distillation_losses
    _log_fallback(reason)
    return reference.distillation_losses


def _fallback_reason(
    implementation: str, options: LossOptions, weights: LossWeights, device: torch.device
) -> str | None:
    """Why "auto" does without the extension; None where it does not."""
    unfused = options.unfused(weights)
    if unfused:
        return f"the extension does not support {', '.join(unfused)}"
    reason = fused.unavailable_reason(device)
    if reason is not None and implementation == "fused":
        raise RuntimeError(f"implementation 'fused' is not available: {reason}")
    return reason


# torch.compile can't trace a logger; it takes what is returned as it is.
@torch.compiler.assume_constant_result
def _log_fallback(reason: str) -> None:
    """Say once per reason that the slower implementation is used."""
    if reason not in _logged:
        _logged.add(reason)
        logging.getLogger(__name__).warning("The reference implementation of the losses is used: %s", reason)


def _check_size(name: str, size: tuple[int, int]) -> None:
    if len(size) != 2 or min(size) <= 0:
        raise ValueError(f"{name} is {tuple(size)}, but must be (height, width), both positive")


def _check_boxes(boxes: list[Tensor], image_size: tuple[int, int]) -> None:
    _check_size("image_size", image_size)
    for index, box in enumerate(boxes):
        if box.dim() != 2 or box.shape[1] != 4 or not box.is_floating_point():
            raise ValueError(
                f"boxes[{index}] is a tensor of shape {tuple(box.shape)} and {box.dtype}, but must be K,4 and floating"
            )


def _check_all_cells(
    student: list[Tensor],
    student_grad: list[Tensor] | None,
    teacher_grad: list[Tensor] | None,
    options: LossOptions,
    weights: LossWeights,
) -> None:
    """Gradients of which more enters the losses than their spatial means must be whole."""
    whole = {"student_grad": student_grad, "teacher_grad": teacher_grad}
    if not weights.gradient and options.importance == "student":
        whole.pop("teacher_grad")
    for name, gradients in whole.items():
        for level, gradient in enumerate(gradients or ()):
            _check_cells(f"{name}[{level}]", options.importance, student[level], gradient)


def _check_cells(name: str, importance: str, feature: Tensor, gradient: Tensor) -> None:
    if gradient.shape != feature.shape:
        raise ValueError(
            f"{name} has shape {tuple(gradient.shape)}, a mean over cells, but the importance {importance!r} needs the "
            f"gradient of each cell, {tuple(feature.shape)}"
        )


def _mean_shape(feature: Tensor) -> tuple[int, int, int, int]:
    """Of a gradient's spatial mean."""
    return feature.shape[0], feature.shape[1], 1, 1


def _check_levels(
    student: list[Tensor],
    teacher: list[Tensor],
    student_grad: list[Tensor] | None,
    teacher_grad: list[Tensor] | None,
    num_images: int,
) -> None:
    """Every list must match ``student`` in length, and its tensors in shape, dtype and device.

    Gradients may be their spatial means.
    """
    if len(student) == 0:
        raise ValueError("student is an empty list: there is no level to distil")
    for name, tensors in (("teacher", teacher), ("student_grad", student_grad), ("teacher_grad", teacher_grad)):
        if tensors is None:
            continue
        if len(tensors) != len(student):
            raise ValueError(f"student has {counted(len(student), 'level')}, but {name} has {len(tensors)}")
        for level, (s, other) in enumerate(zip(student, tensors)):
            is_mean = name != "teacher" and s.dim() == 4 and other.shape == _mean_shape(s)
            for what, wanted, got in (
                ("shape", tuple(s.shape), tuple(s.shape if is_mean else other.shape)),
                ("dtype", s.dtype, other.dtype),
                ("device", s.device, other.device),
            ):
                if wanted != got:
                    hint = "" if name == "teacher" or what != "shape" else "; its mean, N,C,1,1, would do as well"
                    raise ValueError(f"student[{level}] has {what} {wanted}, but {name}[{level}] has {got}{hint}")
    for level, s in enumerate(student):
        if s.dim() != 4 or 0 in s.shape[1:] or not s.is_floating_point():
            raise ValueError(
                f"student[{level}] has shape {tuple(s.shape)} and {s.dtype}, but must be N,C,H,W, floating"
            )
        if (s.dtype, s.device) != (student[0].dtype, student[0].device):
            raise ValueError(
                f"student[{level}] is {s.dtype} on {s.device}, "
                f"but student[0] is {student[0].dtype} on {student[0].device}"
            )
        if s.shape[0] != num_images or num_images == 0:
            held = counted(s.shape[0], "image")
            raise ValueError(f"student[{level}] holds {held}, but boxes are given for {num_images}")
