"""Which split belongs to which meta-architecture."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from gkd_d2.modeling.split.base import SplitDetector

_SPLITS: dict[type[nn.Module], type[SplitDetector]] = {}


def register_split(meta_architecture: type[nn.Module]) -> Callable[[type[SplitDetector]], type[SplitDetector]]:
    """Class decorator: the decorated split is that of a meta-architecture.

    It also serves classes derived from ``meta_architecture`` that have no split of their own.

    Args:
        meta_architecture: the class of the detectors, as it stands in Detectron2's META_ARCH_REGISTRY.

    Raises:
        TypeError: ``meta_architecture`` is no module class, or the decorated class is no SplitDetector.
        ValueError: ``meta_architecture`` has a split already.
    """
    if not (isinstance(meta_architecture, type) and issubclass(meta_architecture, nn.Module)):
        raise TypeError(
            f"register_split is given {meta_architecture!r}, but must be given the detector's class, as in "
            "`@register_split(RetinaNet)`"
        )

    def register(split: type[SplitDetector]) -> type[SplitDetector]:
        if not (isinstance(split, type) and issubclass(split, SplitDetector)):
            raise TypeError(
                f"the split of {meta_architecture.__name__} is {split!r}, but must derive from SplitDetector"
            )
        if meta_architecture in _SPLITS:
            raise ValueError(f"{meta_architecture.__name__} has a split already: {_SPLITS[meta_architecture].__name__}")
        _SPLITS[meta_architecture] = split
        return split

    return register


def split_detector(model: nn.Module) -> SplitDetector:
    """The split of a built Detectron2 model: that of its class, else of the nearest class it is derived from.

    Args:
        model: a GeneralizedRCNN, a RetinaNet, an FCOS, or what :func:`register_split` was told of.

    Raises:
        ValueError: there is no split for it, or it is derived from a class with a split, but has a forward of its own.
    """
    kind, name = _class_with_split(model), type(model).__name__
    if kind is None:
        raise ValueError(
            f"{name} can't be distilled: known meta-architectures are "
            f"{', '.join(sorted(known.__name__ for known in _SPLITS))} and what is derived from them; "
            "gkd_d2.register_split adds one, see docs/own_detector.md"
        )
    if type(model).forward is not kind.forward:
        raise ValueError(
            f"{name} can't be distilled as a {kind.__name__}: it has a forward of its own, whose losses the split of "
            f"{kind.__name__} may not compute; register one for {name} by gkd_d2.register_split, see "
            "docs/own_detector.md"
        )
    return _SPLITS[kind](model)


def _class_with_split(model: nn.Module) -> type[nn.Module] | None:
    """The class of ``model``, or else the nearest one it is derived from, that has a split."""
    return next((kind for kind in type(model).__mro__ if kind in _SPLITS), None)


def running_state(model: nn.Module) -> dict[str, float]:
    """The moving averages that a detector keeps outside its state_dict; nothing for one that is not known."""
    kind = _class_with_split(model)
    names = _SPLITS[kind].running_attributes if kind else ()
    return {name: float(getattr(model, name)) for name in names if hasattr(model, name)}


def load_running_state(model: nn.Module, state: dict[str, float]) -> None:
    """Set what :func:`running_state` returned."""
    for name, value in state.items():
        setattr(model, name, value)
