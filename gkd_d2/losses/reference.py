"""The four distillation losses in plain PyTorch: the readable statement of docs/method.md.

Shapes: N images, L levels, level l with features of C,H,W; K boxes an image. Everything is accumulated in float32, or
in float64 where the student's features are float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gkd_d2.losses.options import LossOptions, LossWeights

# max - min of a map below so many units in the last place of the sum over c of |alpha * feature| is rounding; the sums
# of equal terms were found to differ by up to 2.3.
NOISE_UNITS = 16


def accumulation_dtype(feature: Tensor) -> torch.dtype:
    """The dtype in which the losses of ``feature`` are summed and returned."""
    return torch.float64 if feature.dtype == torch.float64 else torch.float32


def channel_gradient(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """alpha, the spatial mean of ``gradient``, in the image's unit (:func:`_in_own_unit`).

    Args:
        gradient: N,C,H,W or its spatial mean N,C,1,1.
        dtype: of the result.

    Returns:
        N,C; of magnitudes below 2, where they are finite.
    """
    return _in_own_unit(gradient.detach().to(dtype).mean(dim=(2, 3)))


def _in_own_unit(values: Tensor) -> Tensor:
    """``values`` N,... in units of the power of two at or below the largest magnitude for each n.

    What is scaled to a range or to a mean does not depend on the unit, but without it that would not survive gradients
    near the ends of the dtype's range.
    """
    largest = values.abs().flatten(1).amax(dim=1).view(-1, *[1] * (values.dim() - 1))
    mantissa, _ = largest.frexp()
    return values / torch.where(largest == 0, 1.0, largest / (2 * mantissa))


def gradient_map(feature: Tensor, gradient: Tensor, rectifier: str = "abs", importance: str = "channel") -> Tensor:
    """The gradient-guided map of one level.

    With the importance "channel", and ``alpha[n,c]`` the spatial mean of ``gradient``, ``g = sum over c of alpha *
    feature``; with "element" ``g = sum over c of gradient * feature``. With ``G = |g|`` or ``relu(g)`` the map is
    ``(G - min) / (max - min)``, min and max per image. It is 0 where ``max - min`` is nothing but rounding: below
    ``NOISE_UNITS * epsilon`` times the sum over c of the magnitudes of g's terms, at the image's first cell for
    "channel" and at the cell where it is largest for "element", or below the smallest normal number over epsilon; the
    gradient in the units of :func:`_in_own_unit`. It is differentiable in ``feature``, through min and max too;
    ``gradient`` is a constant.

    Args:
        feature: N,C,H,W.
        gradient: N,C,H,W, the detection loss's gradient with respect to ``feature``; or, for "channel", N,C,1,1, its
            spatial mean.
        rectifier: "abs" or "relu".
        importance: "channel" or "element".

    Returns:
        N,H,W in [0, 1].
    """
    dtype = accumulation_dtype(feature)
    feature = feature.to(dtype)
    # Where a map is flat all cells have about the same sum, and with one factor a channel about the same terms.
    if importance == "channel":
        factor = channel_gradient(gradient, dtype)[:, :, None, None]
        judged = feature[:, :, :1, :1]
    else:
        factor = _in_own_unit(gradient.detach().to(dtype))
        judged = feature
    weighted = (factor * feature).sum(dim=1)
    rectified = weighted.abs() if rectifier == "abs" else weighted.relu()
    low = rectified.amin(dim=(1, 2), keepdim=True)
    span = rectified.amax(dim=(1, 2), keepdim=True) - low
    info = torch.finfo(dtype)
    # This order of the factors does not overflow.
    noise = (NOISE_UNITS * info.eps * factor * judged.detach()).abs().sum(dim=1).amax(dim=(1, 2), keepdim=True)
    flat = (span < noise) | (span < info.tiny / info.eps)
    # The inner `where` keeps the gradient of the branch not taken finite; a NaN is not hidden as a flat map.
    return torch.where(flat, 0.0, (rectified - low) / torch.where(flat, 1.0, span))


def gradient_norm(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """The norm over channels of ``gradient``, in the image's unit (:func:`_in_own_unit`).

    Args:
        gradient: N,C,H,W.
        dtype: of the result.

    Returns:
        N,H,W.
    """
    return _in_own_unit(gradient.detach().to(dtype)).square().sum(dim=1).sqrt()


def box_context_mask(
    boxes: list[Tensor],
    image_size: tuple[int, int],
    feature_size: tuple[int, int],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The box context mask M of one level.

    Every box is rounded outwards to the feature grid, where it has width w and height h. A cell inside it gets
    ``1 / (4wh)``; a cell inside the box doubled about its centre gets that times a Gaussian of its distance to the
    centre in units of w and h; the mask is the maximum over boxes. Boxes that are empty or not finite are skipped.

    Args:
        boxes: N tensors K,4 of ground truth, xyxy, pixels of the padded batch.
        image_size: (height, width) of the padded batch in pixels.
        feature_size: (height, width) of the level in cells.
        device: of the result; default: that of the boxes.
        dtype: of the result; default: torch's default dtype.

    Returns:
        N,H,W.
    """
    height, width = feature_size
    if device is None:
        device = boxes[0].device if boxes else None
    masks = [_image_mask(b.to(device), image_size, feature_size, dtype or torch.get_default_dtype()) for b in boxes]
    return torch.stack(masks) if masks else torch.zeros((0, height, width), device=device, dtype=dtype)


def _image_mask(
    boxes: Tensor, image_size: tuple[int, int], feature_size: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """``box_context_mask`` of one image: boxes K,4 -> H,W."""
    if len(boxes) == 0:
        return boxes.new_zeros(feature_size, dtype=dtype)
    grid = boxes_on_grid(boxes, image_size, feature_size)
    inside, context, extents = [], [], []
    for axis, cells in enumerate(feature_size):
        first, last = grid[:, 1 - axis, None], grid[:, 3 - axis, None]
        extent = torch.where(last > first, last - first, 1.0)
        middle = (first + last) / 2
        cell = torch.arange(cells, device=boxes.device) + 0.5
        inside.append((cell >= first) & (cell < last))
        gauss = torch.exp(-(((cell - middle) / extent) ** 2) / 2)
        within = (cell >= middle - extent) & (cell < middle + extent)
        context.append(torch.where(within, gauss, 0.0).to(dtype))
        extents.append(extent[:, 0])
    usable = (grid[:, 2:] > grid[:, :2]).all(dim=1)
    (inside_y, inside_x), (context_y, context_x) = inside, context
    scale = torch.where(usable, 1 / (4 * extents[0] * extents[1]), 0.0).to(dtype)
    core = inside_y[:, :, None] & inside_x[:, None, :]
    mask = torch.where(core, 1.0, context_y[:, :, None] * context_x[:, None, :])
    return (scale[:, None, None] * mask).amax(dim=0)


def boxes_on_grid(boxes: Tensor, image_size: tuple[int, int], feature_size: tuple[int, int]) -> Tensor:
    """Boxes rounded outwards to the feature grid; those that are empty or not finite are all 0.

    Args:
        boxes: K,4, xyxy, pixels of the padded batch.
        image_size: (height, width) of the padded batch in pixels.
        feature_size: (height, width) of the level in cells.

    Returns:
        K,4, float64, xyxy in cells, not clipped to the level.
    """
    # Products of float32 coordinates and sizes are exact in float64, so floor and ceil see no rounding error.
    boxes = boxes.detach().double()
    usable = boxes.isfinite().all(dim=1, keepdim=True) & (boxes[:, 2:] > boxes[:, :2]).all(dim=1, keepdim=True)
    (height, width), (rows, columns) = image_size, feature_size
    (x0, x1), (y0, y1) = (boxes[:, 0::2] * columns / width).T, (boxes[:, 1::2] * rows / height).T
    return torch.where(usable, torch.stack([x0.floor(), y0.floor(), x1.ceil(), y1.ceil()], dim=1), 0.0)


def channel_attention(magnitude: Tensor, temperature: float) -> Tensor:
    """``C * softmax over c of (mean over h,w / temperature)`` of N,C,H,W magnitudes -> N,C."""
    return magnitude.shape[1] * (magnitude.mean(dim=(2, 3)) / temperature).softmax(dim=1)


def spatial_attention(magnitude: Tensor, temperature: float) -> Tensor:
    """``H*W * softmax over h,w of (mean over c / temperature)`` of N,C,H,W magnitudes -> N,H,W."""
    mean = magnitude.mean(dim=1)
    return mean[0].numel() * (mean.flatten(1) / temperature).softmax(dim=1).view_as(mean)


def _normalized(values: Tensor) -> Tensor:
    """Scale non-negative ``values`` N,... to mean 1 for each n; all ones where they sum to 0."""
    total = values.flatten(1).sum(dim=1).view(-1, *[1] * (values.dim() - 1))
    scaled = values * (values[0].numel() / torch.where(total == 0, 1.0, total))
    return torch.where(total == 0, 1.0, scaled)


def cell_importance(
    teacher: Tensor, teacher_grad: Tensor | None, student_grad: Tensor | None, options: LossOptions
) -> Tensor:
    """What the gradients make of each cell of one level, of no particular scale.

    Args:
        teacher: N,C,H,W.
        teacher_grad: N,C,H,W, or for the importance "channel" N,C,1,1, its spatial mean; not used by "student".
        student_grad: N,C,H,W, the gradient of the student's own detection loss; used by "student" alone.
        options: of the losses.

    Returns:
        N,H,W, >= 0: the gradient map of :func:`gradient_map` for "channel" and "element"; the :func:`gradient_norm` of
        the teacher's gradient for "norm", and of the student's for "student".
    """
    dtype = accumulation_dtype(teacher)
    if options.importance == "norm":
        return gradient_norm(teacher_grad, dtype)
    if options.importance == "student":
        return gradient_norm(student_grad, dtype)
    return gradient_map(teacher, teacher_grad, options.rectifier, options.importance)


def imitation_weights(
    teacher: Tensor, teacher_grad: Tensor | None, student_grad: Tensor | None, options: LossOptions
) -> tuple[Tensor, Tensor]:
    """The weights u per channel and v per cell of one level, constants.

    Each has mean 1; then v is limited to ``importance_cap``, if that is not 0, and becomes ``r + (1 - r) * v`` with r =
    ``importance_floor``.

    Args:
        teacher: N,C,H,W.
        teacher_grad, student_grad: as for :func:`cell_importance`; used by the weightings "gradient" and
            "attention_gradient" only.
        options: of the losses.

    Returns:
        u of shape N,C and v of shape N,H,W.
    """
    u, v = _mean_one_weights(teacher, teacher_grad, student_grad, options)
    if options.importance_cap:
        v = v.clamp(max=options.importance_cap)
    if options.importance_floor:
        v = options.importance_floor + (1 - options.importance_floor) * v
    return u, v


def _mean_one_weights(
    teacher: Tensor, teacher_grad: Tensor | None, student_grad: Tensor | None, options: LossOptions
) -> tuple[Tensor, Tensor]:
    """u and v before the cap and the floor."""
    dtype = accumulation_dtype(teacher)
    if options.weighting == "gradient":
        channel = _normalized(channel_gradient(teacher_grad, dtype).abs())
        return channel, _normalized(cell_importance(teacher, teacher_grad, student_grad, options))
    if options.weighting in ("attention", "attention_gradient"):
        magnitude = teacher.to(dtype).abs()
        channel = channel_attention(magnitude, options.temperature)
        if options.weighting == "attention":
            return channel, spatial_attention(magnitude, options.temperature)
        importance = cell_importance(teacher, teacher_grad, student_grad, options)
        return channel, _attended(magnitude, importance, options.temperature)
    n, c, h, w = teacher.shape
    return teacher.new_ones((n, c), dtype=dtype), teacher.new_ones((n, h, w), dtype=dtype)


def _attended(magnitude: Tensor, importance: Tensor, temperature: float) -> Tensor:
    """The product of spatial attention and an importance N,H,W, scaled to mean 1 for each n; ones where it is 0."""
    # As one softmax: the product would underflow where the attention's peak lies on cells of no importance.
    logits = (magnitude.mean(dim=1) / temperature + importance.log()).flatten(1)
    weights = (logits.shape[1] * logits.softmax(dim=1)).view_as(importance)
    return torch.where((importance == 0).flatten(1).all(dim=1)[:, None, None], 1.0, weights)


def distillation_losses(
    student: list[Tensor],
    teacher: list[Tensor],
    student_grad: list[Tensor] | None,
    teacher_grad: list[Tensor] | None,
    boxes: list[Tensor],
    image_size: tuple[int, int],
    *,
    weights: LossWeights,
    options: LossOptions,
) -> dict[str, Tensor]:
    """The weighted losses, summed over levels; arguments as in :func:`gkd_d2.losses.distillation_losses`, unchecked.

    With D = v * (sum over c of u * (S - T)^2), M the box context mask, Ghat the gradient maps and Ac, As the channel
    and spatial attention, a level adds

    * to ``loss_gkd_gradient``:   1/(NHW) * sum of ``|Ghat_T - Ghat_S|``, or 1/N * sum of ``sqrt(M) |Ghat_T - Ghat_S|``
      with the map region "boxes"
    * to ``loss_bmfi_box``:       1/N     * sum of ``M * D``
    * to ``loss_bmfi_attention``: 1/N     * (sum of ``|Ac(S) - Ac(T)|`` + sum of ``|As(S) - As(T)|``)
    * to ``loss_bmfi_image``:     1/(NHW) * sum of ``D``
    """
    dtype = accumulation_dtype(student[0])
    zero = student[0].new_zeros((), dtype=dtype)
    gradient = box = attention = image = zero
    for level, (s, t) in enumerate(zip(student, teacher)):
        s, t = s.to(dtype), t.detach().to(dtype)
        s_grad = None if student_grad is None else student_grad[level].detach().to(dtype)
        t_grad = None if teacher_grad is None else teacher_grad[level].detach().to(dtype)
        n = s.shape[0]
        if weights.box or (weights.gradient and options.map_region == "boxes"):
            mask = box_context_mask(boxes, image_size, tuple(s.shape[2:]), device=s.device, dtype=dtype)
        if weights.gradient:
            kind = options.rectifier, options.map_importance
            map_difference = (gradient_map(t, t_grad, *kind) - gradient_map(s, s_grad, *kind)).abs()
            if options.map_region == "boxes":
                gradient = gradient + (mask.sqrt() * map_difference).sum() / n
            else:
                gradient = gradient + map_difference.mean()
        if weights.imitates:
            u, v = imitation_weights(t, t_grad, s_grad, options)
            distance = v * (u[:, :, None, None] * (s - t) ** 2).sum(dim=1)
            if weights.box:
                box = box + (mask * distance).sum() / n
            if weights.image:
                image = image + distance.mean()
        if weights.attention:
            s_abs, t_abs = s.abs(), t.abs()
            channels = channel_attention(s_abs, options.temperature) - channel_attention(t_abs, options.temperature)
            cells = spatial_attention(s_abs, options.temperature) - spatial_attention(t_abs, options.temperature)
            attention = attention + (channels.abs().sum() + cells.abs().sum()) / n
    return {
        "loss_gkd_gradient": weights.gradient * gradient,
        "loss_bmfi_box": weights.box * box,
        "loss_bmfi_attention": weights.attention * attention,
        "loss_bmfi_image": weights.image * image,
    }
