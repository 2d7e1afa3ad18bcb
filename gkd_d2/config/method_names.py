"""Which methods of distillation a config asks for."""

from __future__ import annotations

from collections.abc import Iterable

from detectron2.config import CfgNode

from gkd_d2.config.keys import DEFAULT_METHOD


def method_names(cfg: CfgNode) -> list[str]:
    """The names in GKD.METHODS or, where that is empty, the one in GKD.METHOD.

    Whether a method is registered under them is not looked at.

    Args:
        cfg: with the node GKD.

    Raises:
        ValueError: a name is no text or stands there twice, or GKD.METHOD is set to another than GKD.METHODS has.
    """
    one, several = cfg.GKD.METHOD, list(cfg.GKD.METHODS)
    if not several:
        return [one]
    check_names(several, "GKD.METHODS")
    if one not in (DEFAULT_METHOD, *several):
        raise ValueError(
            f"GKD.METHOD is {one!r}, but GKD.METHODS is {several}, which takes its place: set GKD.METHODS to [] for "
            f"{one} alone, or leave GKD.METHOD out"
        )
    return several


def method_title(cfg: CfgNode) -> str:
    """The methods of a config as reports and messages name them, such as "gkd + fitnet".

    Raises:
        ValueError: see :func:`method_names`.
    """
    return joined(method_names(cfg))


def joined(names: Iterable[str]) -> str:
    """Names of methods that run together, as one name."""
    return " + ".join(names)


def check_names(names: list, key: str) -> None:
    """Check that a list of names of methods holds different texts.

    Args:
        names: the list.
        key: of the config, where it stands.

    Raises:
        ValueError: it does not.
    """
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"{key} is {names}, but must be a list of names of methods, and {name!r} is none")
        if names.count(name) > 1:
            raise ValueError(f"{key} is {names}, which has {name} twice: leave one out")
