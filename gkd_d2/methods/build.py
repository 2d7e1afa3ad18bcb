"""Builds the method, or the several at once, that a config asks for."""

from __future__ import annotations

from detectron2.config import CfgNode

from gkd_d2.config.method_names import method_names
from gkd_d2.methods.method import METHOD_REGISTRY, Method, settle_weights
from gkd_d2.methods.several import Several
from gkd_d2.utils.registries import not_registered


def build_method(cfg: CfgNode) -> Method:
    """The method that GKD.METHOD names, or all of GKD.METHODS as one.

    Args:
        cfg: a distiller's.

    Raises:
        ValueError: there is no such method, an option is out of range, or the methods can't run together.
        TypeError: what is registered under the name returns no Method.
    """
    methods = {name: _build(name, cfg) for name in method_names(cfg)}
    method = Several(**methods) if len(methods) > 1 else next(iter(methods.values()))
    settle_weights(method, cfg.GKD.BALANCE, cfg.GKD.RATIOS)
    return method


def _build(name: str, cfg: CfgNode) -> Method:
    """One method, with the weights that its own keys give it."""
    if name not in METHOD_REGISTRY:
        known = [other for other, _ in METHOD_REGISTRY]
        key = "GKD.METHODS names" if cfg.GKD.METHODS else "GKD.METHOD is"
        raise ValueError(f"{key} {name!r}, which {not_registered(name, known)}")
    method = METHOD_REGISTRY.get(name)(cfg)
    if not isinstance(method, Method):
        raise TypeError(f"what is registered as the method {name} returned {method!r}, but must return a Method")
    return method
