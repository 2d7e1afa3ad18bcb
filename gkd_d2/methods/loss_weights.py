"""Weights of a method's losses as they stand in a config."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import yaml
from detectron2.config import get_cfg

from gkd_d2.config.differences import flattened
from gkd_d2.config.keys import add_gkd_config
from gkd_d2.methods.method import Method, Term


def weights_as_yaml(
    terms: Iterable[Term], weights: Mapping[str, float], place: Callable[[str], str] = lambda key: key
) -> str:
    """The YAML of a config file that gives a method's losses their weights, under GKD.BALANCE fixed.

    Args:
        terms: all losses of the method.
        weights: name of a loss -> weight, which is written to four digits; a loss that is not named is off.
        place: what a key of yacs is called in the config.

    Returns:
        The YAML. Where losses share a key, which can't give them different weights, a comment has these instead.
    """
    by_key: dict[str, dict[str, float]] = {}
    for term in terms:
        by_key.setdefault(term.key, {})[term.name] = float(f"{weights.get(term.name, 0.0):.3e}")
    values: dict[str, object] = {"GKD.BALANCE": "fixed"}
    comments = []
    for key, named in by_key.items():
        if len({*named.values()}) == 1:
            values[key] = next(iter(named.values()))
            continue
        listed = ", ".join(f"{name} {weight:g}" for name, weight in named.items())
        comments.append(f"# {place(key)} is the key of several losses, and can't give each its weight: {listed}\n")
    nested: dict = {}
    for key, value in values.items():
        *path, last = place(key).split(".")
        node = nested
        for name in path:
            node = node.setdefault(name, {})
        node[last] = value
    return "".join(comments) + yaml.safe_dump(nested, sort_keys=False)


def keys_without_effect(method: Method, weights: Mapping[str, float], ratios: Mapping[str, float]) -> list[str]:
    """A sentence for each weight that is set where ratios count, or for each ratio where weights do.

    Args:
        method: whose losses have weights or, after :meth:`Method.weigh_by_ratio`, ratios.
        weights: key -> its value in the config, of weights at least. A key without a default is not looked at.
        ratios: GKD.RATIOS.
    """
    if method.by_ratio:
        return _weights_without_effect(method, weights)
    terms = {term.name.lower(): term for term in method.terms.values()}
    sentences = []
    for name, ratio in ratios.items():
        term = terms.get(str(name).lower())
        instead = f"set {term.key}, which is {term.weight:g}, instead, or " if term else "set "
        sentences.append(
            f"GKD.RATIOS.{str(name).upper()} is {ratio}, which has no effect under GKD.BALANCE fixed: {instead}"
            "GKD.BALANCE to calibrate"
        )
    return sentences


def _weights_without_effect(method: Method, weights: Mapping[str, float]) -> list[str]:
    cfg = get_cfg()
    add_gkd_config(cfg)
    defaults = dict(flattened(cfg))
    sentences = []
    for term in method.terms.values():
        # Those of a method of one's own have none.
        if term.key not in defaults:
            continue
        value = weights[term.key]
        # Where both are 0 the loss is off either way.
        if value != defaults[term.key] and (value or term.ratio):
            sentences.append(
                f"{term.key} is {value:g}, which has no effect under GKD.BALANCE calibrate: set {term.ratio_key}, "
                f"which is {term.ratio:g}, instead"
            )
    return sentences
