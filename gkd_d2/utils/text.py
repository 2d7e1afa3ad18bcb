"""Small pieces of messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def counted(number: int, singular: str, plural: str = "") -> str:
    """A number with its noun: "1 image", "2 images".

    Args:
        number: how many.
        singular: the noun for one.
        plural: for any other number (default: ``singular`` with an s).
    """
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def listed(names: Iterable[str], limit: int = 8) -> str:
    """Names with commas between them, the first ``limit`` of them where there are more."""
    names = list(names)
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def printable(text: str, limit: int = 100) -> str:
    """Text out of someone's file, cut short and with question marks for what could steer a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text[:limit])


def did_you_mean(name: str, known: Iterable[str], start: str = "") -> str:
    """The known name that is nearest, as the end of a sentence; empty where none is near.

    Args:
        name: is not among ``known``.
        known: names.
        start: what stands before all of them.
    """
    by_lower_case = {other.lower(): other for other in known}
    near = difflib.get_close_matches(name.lower(), by_lower_case, n=1)
    return f": did you mean {start}{by_lower_case[near[0]]}?" if near else ""
