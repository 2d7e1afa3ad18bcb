"""What a training that starts from random weights needs."""

from __future__ import annotations

import logging

from torch import nn

from gkd_d2.modeling.backbone import TimmFeatures


def advice(*, of_timm: bool = False, without_weights: bool = True) -> str:
    """What to set to train from scratch.

    Args:
        of_timm: whether the detector's backbone is timm's.
        without_weights: whether MODEL.WEIGHTS is empty already.
    """
    start = "to train from scratch, set " + ("" if without_weights else "MODEL.WEIGHTS to '', ")
    if of_timm:
        return (
            f"{start}MODEL.TIMM.FREEZE_AT to 0, and MODEL.TIMM.NORM and MODEL.FPN.NORM to BN; or start the backbone "
            "with weights by MODEL.TIMM.PRETRAINED or MODEL.TIMM.WEIGHTS"
        )
    return f"{start}MODEL.BACKBONE.FREEZE_AT to 0, and MODEL.RESNETS.NORM and MODEL.FPN.NORM to BN"


def advice_for(detector: nn.Module) -> str:
    """The same for a detector, by the kind of its backbone."""
    return advice(of_timm=_has_timm(detector))


def random_modules(detector: nn.Module) -> list[nn.Module]:
    """The modules of a detector's backbone that start with random weights where MODEL.WEIGHTS is empty.

    A part that loads weights of its own when it is built says so by a true attribute ``starts_with_weights``, as
    :class:`gkd_d2.modeling.backbone.TimmFeatures` does; it is left out with all that it holds.
    """
    found, parts = [], [getattr(detector, "backbone", detector)]
    while parts:
        part = parts.pop()
        if not getattr(part, "starts_with_weights", False):
            found.append(part)
            parts.extend(part.children())
    return found


def consider_loaded(detector: nn.Module) -> None:
    """Take parts that may load weights of their own for loaded: a resumed run builds them without.

    Args:
        detector: all of which a run's own checkpoint has set.
    """
    for module in detector.modules():
        if hasattr(module, "starts_with_weights"):
            module.starts_with_weights = True


def has_frozen_random_weights(detector: nn.Module) -> bool:
    """Whether parts of a detector's backbone would keep the random weights that they start with."""
    modules = random_modules(detector)
    return _hold_frozen_parameters(modules) or any(map(_is_frozen_norm, modules))


def warn_of_frozen_random_weights(detector: nn.Module) -> None:
    """Warn where parts of a detector's backbone would keep the random weights that they start with.

    Args:
        detector: before its first step, without weights of its own but those of ``starts_with_weights``.
    """
    modules = random_modules(detector)
    node = "TIMM" if _has_timm(detector) else "RESNETS"
    freeze_at = "MODEL.TIMM.FREEZE_AT" if node == "TIMM" else "MODEL.BACKBONE.FREEZE_AT"
    reasons = []
    if _hold_frozen_parameters(modules):
        reasons.append(f"parts of the backbone are frozen by {freeze_at}, and so keep random weights")
    if any(map(_is_frozen_norm, modules)):
        reasons.append(f"MODEL.{node}.NORM or MODEL.FPN.NORM is FrozenBN, which without weights does not normalize")
    if reasons:
        logging.getLogger(__name__).warning(
            "MODEL.WEIGHTS is empty, but %s: %s", ", and ".join(reasons), advice_for(detector)
        )


def _has_timm(detector: nn.Module) -> bool:
    return any(isinstance(module, TimmFeatures) for module in detector.modules())


def _hold_frozen_parameters(modules: list[nn.Module]) -> bool:
    """Whether parameters that they hold themselves take part and are not trained."""
    unused = {id(p) for module in modules if isinstance(module, TimmFeatures) for p in module.unused_parameters}
    parameters = (p for module in modules for p in module.parameters(recurse=False))
    return any(not p.requires_grad and id(p) not in unused for p in parameters)


def _is_frozen_norm(module: nn.Module) -> bool:
    """Whether it is a BatchNorm that is not trained, of Detectron2, torchvision or timm: all of it is buffers."""
    return {"weight", "running_mean", "running_var"} <= dict(module.named_buffers(recurse=False)).keys()
