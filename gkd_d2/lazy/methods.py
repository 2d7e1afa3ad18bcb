"""The methods of distillation in a LazyConfig: how they are named, and where each stands."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from detectron2.config import LazyCall
from detectron2.utils.registry import locate
from omegaconf import DictConfig

from gkd_d2.config.method_names import check_names, joined
from gkd_d2.losses import LossWeights
from gkd_d2.methods import FGD, FGFI, GKD, PKD, CrossKD, FitNet, Logits, Method, Nothing, Several
from gkd_d2.utils.text import did_you_mean

_METHODS = {
    "gkd": GKD,
    "fitnet": FitNet,
    "fgfi": FGFI,
    "fgd": FGD,
    "pkd": PKD,
    "crosskd": CrossKD,
    "logits": Logits,
    "none": Nothing,
}


def method_call(method: DictConfig | str | Sequence[str] | Mapping[str, DictConfig | str]) -> DictConfig:
    """The ``model.method`` of a LazyConfig.

    Args:
        method: LazyCall of a :class:`gkd_d2.Method`, or the name of one of this project's; a list of such names, or a
            mapping from names of one's own to either, for several at once.

    Returns:
        LazyCall of the method, or of :class:`gkd_d2.methods.Several`, whose arguments are the methods.

    Raises:
        ValueError: a name is that of no method, or stands there twice.
    """
    if isinstance(method, str):
        return _named(method)
    if isinstance(method, Mapping | DictConfig):
        if "_target_" in method:
            return method
        return LazyCall(Several)(**{name: method_call(part) for name, part in method.items()})
    names = list(method)
    check_names(names, "method")
    # As in GKD.METHODS, one alone is that method.
    return _named(names[0]) if len(names) == 1 else method_call({name: name for name in names})


def _named(name: str) -> DictConfig:
    if name not in _METHODS:
        raise ValueError(
            f"method is {name!r}, which is none of {', '.join(_METHODS)}{did_you_mean(name, _METHODS)}; "
            "one of your own is given as LazyCall of its class"
        )
    # Written out, for `model.method.weights.box=0.02` to find it.
    options = {"weights": dataclasses.asdict(LossWeights())} if name == "gkd" else {}
    return LazyCall(_METHODS[name])(**options)


def title_of(method: Method) -> str:
    """A method as the first lines of a run name it, such as "gkd + fitnet"."""
    if isinstance(method, Several):
        return joined(method.parts)
    return next((name for name, kind in _METHODS.items() if type(method) is kind), type(method).__name__)


def places_of_methods(model: DictConfig) -> dict[str, str]:
    """Where the methods of this project stand in a LazyConfig that has several at once.

    Args:
        model: of the config; of a plain detector too.

    Returns:
        Name of a method -> its place, as "fitnet" -> "model.method.fitnet"; empty where there are not several.
    """
    method = model.get("method")
    if not isinstance(method, DictConfig) or _class_of(method) is not Several:
        return {}
    classes = {name: _class_of(part) for name, part in method.items() if isinstance(part, DictConfig)}
    return {
        known: f"model.method.{name}"
        for name, found in classes.items()
        for known, kind in _METHODS.items()
        # Or of the user's own, derived from it.
        if found is not None and issubclass(found, kind)
    }


def _class_of(node: DictConfig) -> type | None:
    """The class that a node of a LazyConfig calls; None where it calls something else."""
    target = node.get("_target_")
    try:
        target = locate(target) if isinstance(target, str) else target
    except ImportError:
        return None
    return target if isinstance(target, type) else None
