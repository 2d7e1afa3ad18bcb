"""Weights of a method's losses as they stand in a config."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import yaml

from gkd_d2.methods.method import Term


def weights_as_yaml(
    terms: Iterable[Term], weights: Mapping[str, float], place: Callable[[str], str] = lambda key: key
) -> str:
    """The YAML of a config file that gives a method's losses their weights, under GKD.BALANCE fixed.

    Args:
        terms: all losses of the method.
        weights: name of a loss -> weight, which is written to four digits; a loss that is not named is off.
        place: what a key of yacs is called in the config.
    """
    values: dict[str, object] = {"GKD.BALANCE": "fixed"}
    values |= {term.key: float(f"{weights.get(term.name, 0.0):.3e}") for term in terms}
    nested: dict = {}
    for key, value in values.items():
        *path, last = place(key).split(".")
        node = nested
        for name in path:
            node = node.setdefault(name, {})
        node[last] = value
    return yaml.safe_dump(nested, sort_keys=False)
