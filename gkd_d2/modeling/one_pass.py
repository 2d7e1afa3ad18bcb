"""Detection losses whose one backward pass through the heads serves the distillation and the training step alike.

The distillation needs the gradients of the student's detection losses at its features before there is anything to
train with; the training step needs them too, and those of the heads' parameters. So the pass is made as soon as the
losses are there, the heads' graph is freed, and the later backward only multiplies what was stored and goes on from the
features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from detectron2.structures import ImageList
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gkd_d2.modeling.feature_gradients import check_levels_used, feature_gradients, sum_gradients
from gkd_d2.modeling.split import SplitDetector

_UNEQUAL = (
    "the detection losses were differentiated with unequal weights, but the gradient of their sum alone was computed: "
    "sum all of them, with one common factor, or set GKD.ONE_PASS to False"
)


def detection_losses(
    split: SplitDetector,
    images: ImageList,
    features: dict[str, Tensor],
    batched_inputs: list[dict],
    levels: list[str],
    *,
    with_gradients: bool,
    one_pass: bool,
    scale: float,
) -> tuple[dict[str, Tensor], list[Tensor] | None]:
    """A detector's own losses, and the gradients of their sum at some levels.

    The gradients are those of the heads alone, and not also of levels that the pyramid derives from others: so the
    heads are given aliases of the features.

    Args:
        split: of the detector.
        images: from its ``features``.
        features: the same; level name -> N,C,H,W.
        batched_inputs: with ground truth.
        levels: names of the levels whose gradients are asked for.
        with_gradients: whether they are computed at all.
        one_pass: whether one pass may serve them and the training step, where it can: see :func:`one_pass_losses`.
        scale: see :func:`gkd_d2.modeling.feature_gradients.feature_gradients`.

    Returns:
        The loss dictionary, and one tensor N,C,H,W a level, ``scale`` times the gradient, or None.

    Raises:
        RuntimeError: as :func:`one_pass_losses`.
    """
    if with_gradients and one_pass and _can_store(split.model, features, scale):
        return one_pass_losses(
            lambda aliases: split.losses(images, aliases, batched_inputs),
            features,
            levels,
            split.model.parameters(),
            scale=scale,
        )
    aliases = {name: feature.view_as(feature) for name, feature in features.items()}
    losses = split.losses(images, aliases, batched_inputs)
    if not with_gradients:
        return losses, None
    return losses, feature_gradients(losses, aliases, levels, scale=scale, retain_graph=True)


def _can_store(model: nn.Module, features: dict[str, Tensor], scale: float) -> bool:
    """Whether gradients that are stored before the backward pass are what that pass would give."""
    # A gradient scaler that the distiller was not told of would come too late for what has underflowed.
    unscaled = scale == 1.0 and any(feature.dtype == torch.float16 for feature in features.values())
    # A hook would change a gradient when it is stored, and again when it is used.
    hooked = any(parameter._backward_hooks for parameter in model.parameters())
    return not (unscaled or hooked)


def one_pass_losses(
    compute: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    features: dict[str, Tensor],
    levels: list[str],
    parameters: Iterable[Tensor],
    *,
    scale: float = 1.0,
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """A detector's losses, and the gradient of their sum with respect to the features its heads are given.

    The losses have their true values and can be differentiated once, as functions of ``features`` and ``parameters``,
    if all enter with one common weight, as in the sum that a trainer makes.

    Args:
        compute: features -> the detector's own loss dictionary.
        features: level name -> N,C,H,W, from the backbone.
        levels: names of the levels whose gradients are asked for.
        parameters: that the losses may depend on beside the features.
        scale: what the gradients are computed times, so that those of half precision do not underflow.

    Returns:
        The loss dictionary, and one tensor N,C,H,W a level, ``scale`` times the gradient.

    Raises:
        RuntimeError: there is no loss, or a level has no part in any. In backward: the losses' weights differ; on a GPU
            that is a failed assertion of the device, for which nothing waits.
    """
    sources = {name: feature for name, feature in features.items() if feature.requires_grad}
    leaves = {name: feature.detach().requires_grad_(name in sources) for name, feature in features.items()}
    losses = compute(leaves)
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    inputs = [*(leaves[name] for name in sources), *parameters]
    gradients = sum_gradients(losses, inputs, retain_graph=False, scale=scale)
    by_level = dict(zip(sources, gradients))
    check_levels_used(losses, {name: by_level.get(name) for name in levels})
    # What the losses do not depend on must stay without a gradient, as DistributedDataParallel wants it.
    pairs = [(source, g) for source, g in zip([*sources.values(), *parameters], gradients) if g is not None]
    used, stored = zip(*pairs)
    values = _StoredGradients.apply(torch.stack([loss.detach() for loss in losses.values()]), stored, scale, *used)
    return dict(zip(losses, values.unbind())), [by_level[name] for name in levels]


class _StoredGradients(torch.autograd.Function):
    """Values as a function of tensors, with the gradient of the values' sum known beforehand."""

    @staticmethod
    def forward(ctx, values: Tensor, gradients: tuple[Tensor, ...], scale: float, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        ctx.scale = scale
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, weights: Tensor):
        equal = torch.isclose(weights, weights[0], rtol=0.0, atol=0.0, equal_nan=True).all()
        torch._assert_async(equal, _UNEQUAL)
        factor = weights[0] / ctx.scale
        return None, None, None, *(factor * gradient for gradient in ctx.saved_tensors)
