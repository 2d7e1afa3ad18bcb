"""Names in configs that are looked up in registries, and what is said where one is not registered."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from detectron2.config import CfgNode
from detectron2.modeling import (
    ANCHOR_GENERATOR_REGISTRY,
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    GeneralizedRCNN,
    RetinaNet,
)
from fvcore.common.registry import Registry
from torch import nn

from gkd_d2.utils.timm_models import TIMM_BACKBONES, config_problems, has_timm_backbone

# So many names are all listed where none is near.
_FEW = 10
# Key of MODEL -> registry of its name, of the meta-architectures that are known to use it.
_PARTS = {
    RetinaNet: {"BACKBONE": BACKBONE_REGISTRY, "ANCHOR_GENERATOR": ANCHOR_GENERATOR_REGISTRY},
    GeneralizedRCNN: {
        "BACKBONE": BACKBONE_REGISTRY,
        "ANCHOR_GENERATOR": ANCHOR_GENERATOR_REGISTRY,
        "PROPOSAL_GENERATOR": PROPOSAL_GENERATOR_REGISTRY,
        "ROI_HEADS": ROI_HEADS_REGISTRY,
        "ROI_BOX_HEAD": ROI_BOX_HEAD_REGISTRY,
    },
}
# Names with a meaning of their own in Detectron2.
_NOT_LOOKED_UP = {"PROPOSAL_GENERATOR": "PrecomputedProposals", "ROI_BOX_HEAD": ""}


def not_registered(name: str, known: Iterable[str]) -> str:
    """What to say after a name that is not registered: the nearest names, and where a user's own modules are named.

    Args:
        name: is not among ``known``.
        known: the registered names.
    """
    names = {other.lower(): other for other in known}
    near = [names[other] for other in difflib.get_close_matches(name.lower(), names)]
    text = "is not registered"
    if near:
        text += f": did you mean {' or '.join(near)}?"
    elif len(names) <= _FEW:
        text += f"; registered are {', '.join(sorted(names.values()))}."
    else:
        text += "."
    return f"{text} If a module of your own registers it, name that module in GKD.IMPORTS or by --import"


def architecture_class(name: str) -> type[nn.Module] | None:
    """The class that is registered as a meta-architecture; None where there is none, or a function."""
    kind = META_ARCH_REGISTRY.get(name) if name in META_ARCH_REGISTRY else None
    return kind if isinstance(kind, type) else None


def find_unregistered(cfg: CfgNode, architecture_key: str = "MODEL.META_ARCHITECTURE", place: str = "") -> list[str]:
    """The names in a plain detector's config that are not registered, and what is wrong with a backbone of timm.

    Args:
        cfg: from :func:`gkd_d2.config.detector_config` or :func:`gkd_d2.config.teacher_config`.
        architecture_key: the key that the user sets the meta-architecture by.
        place: where the keys are set, as " of teacher.yaml".

    Returns:
        A sentence for each.
    """
    name = cfg.MODEL.META_ARCHITECTURE
    if name not in META_ARCH_REGISTRY:
        return [f"{architecture_key}{place} is {name!r}, which {not_registered(name, _names(META_ARCH_REGISTRY))}"]
    parts = _PARTS.get(META_ARCH_REGISTRY.get(name), {})
    named = {part: cfg.MODEL[part].NAME for part in parts}
    of_backbone = config_problems(cfg, place) if has_timm_backbone(cfg) else _ignored_model(cfg, place)
    return of_backbone + [
        f"MODEL.{part}.NAME{place} is {name!r}, which {not_registered(name, _names(parts[part]))}"
        for part, name in named.items()
        if name not in parts[part] and name != _NOT_LOOKED_UP.get(part)
    ]


def _ignored_model(cfg: CfgNode, place: str) -> list[str]:
    """What is wrong where a model of timm is named and a backbone of Detectron2's own is built; others may read it."""
    name, builder = cfg.MODEL.get("TIMM", {}).get("NAME"), cfg.MODEL.BACKBONE.NAME
    if not name or builder not in BACKBONE_REGISTRY:
        return []
    if not BACKBONE_REGISTRY.get(builder).__module__.startswith("detectron2."):
        return []
    return [
        f"MODEL.TIMM.NAME{place} is {name!r}, but MODEL.BACKBONE.NAME is {builder}, which does not read it: set "
        f"that to {' or, for RetinaNet, '.join(TIMM_BACKBONES)}, or MODEL.TIMM.NAME to ''"
    ]


def build_detector(cfg: CfgNode, architecture_key: str = "MODEL.META_ARCHITECTURE", place: str = "") -> nn.Module:
    """Build a plain detector on the CPU, with random weights.

    Args:
        cfg, architecture_key, place: as for :func:`find_unregistered`.

    Raises:
        ValueError: a name in the config is not registered, or its parts do not fit together.
    """
    problems = find_unregistered(cfg, architecture_key, place)
    if problems:
        raise ValueError("; ".join(problems))
    name = cfg.MODEL.META_ARCHITECTURE
    try:
        return META_ARCH_REGISTRY.get(name)(cfg)
    # As of a head that takes levels which the backbone does not give.
    except (AssertionError, KeyError) as error:
        reason = f"{type(error).__name__} {error}".strip()
        raise ValueError(
            f"{architecture_key}{place} is {name}, which can't be built from this config ({reason}): name the kind of "
            "detector that the config is for, whose heads take levels of its backbone (IN_FEATURES)"
        ) from error


def _names(registry: Registry) -> list[str]:
    return [name for name, _ in registry]
