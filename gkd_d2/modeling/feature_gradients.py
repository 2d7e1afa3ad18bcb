"""Gradients of a detector's own losses with respect to the features that its heads were given."""

from __future__ import annotations

import torch
from torch import Tensor


def feature_gradients(
    losses: dict[str, Tensor],
    features: dict[str, Tensor],
    levels: list[str],
    *,
    retain_graph: bool,
    scale: float = 1.0,
) -> list[Tensor]:
    """The gradient of the sum of a detector's losses with respect to the features its heads were given.

    Args:
        losses: a detector's own loss dictionary.
        features: level name -> N,C,H,W, the very tensors that entered :meth:`SplitDetector.losses`.
        levels: names of the levels asked for.
        retain_graph: whether a backward pass through the same graph follows.
        scale: what the sum is multiplied by, so that gradients of half precision do not underflow.

    Returns:
        One tensor N,C,H,W a level, ``scale`` times the gradient.

    Raises:
        RuntimeError: there is no loss, or a level has no part in any.
    """
    gradients = sum_gradients(losses, [features[name] for name in levels], retain_graph=retain_graph, scale=scale)
    check_levels_used(losses, dict(zip(levels, gradients)))
    return list(gradients)


def sum_gradients(
    losses: dict[str, Tensor], inputs: list[Tensor], *, retain_graph: bool, scale: float
) -> tuple[Tensor | None, ...]:
    """``scale`` times the gradient of the sum of a detector's losses with respect to any tensors; None where unused.

    Raises:
        RuntimeError: there is no loss.
    """
    if not losses:
        raise RuntimeError("the detector returned no loss: are its heads in training mode?")
    return torch.autograd.grad(scale * sum(losses.values()), inputs, retain_graph=retain_graph, allow_unused=True)


def check_levels_used(losses: dict[str, Tensor], gradients: dict[str, Tensor | None]) -> None:
    """Refuse levels that have no gradient.

    Args:
        losses: a detector's own loss dictionary.
        gradients: level name -> of their sum.

    Raises:
        RuntimeError: one is None.
    """
    unused = [name for name, gradient in gradients.items() if gradient is None]
    if unused:
        raise RuntimeError(
            f"levels {', '.join(unused)} have no part in the losses {', '.join(losses)}: take them out of GKD.FEATURES"
        )
