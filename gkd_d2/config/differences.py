"""In which keys two configs differ."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence


def config_differences(one: Mapping, other: Mapping, ignored: Sequence[str] = ()) -> dict[str, tuple]:
    """Key -> value in two configs, where they differ; None where one of them does not have the key.

    Numbers that differ by rounding are the same, and so are a list and a tuple.

    Args:
        one: a config: a CfgNode, or nested dictionaries of plain values.
        other: another one.
        ignored: dotted names of nodes and keys that are left out.
    """
    ours, theirs = dict(flattened(one)), dict(flattened(other))
    keys = [key for key in {**ours, **theirs} if not any(key == name or key.startswith(f"{name}.") for name in ignored)]
    return {k: (ours.get(k), theirs.get(k)) for k in keys if not _same(ours.get(k), theirs.get(k))}


def _same(one: object, other: object) -> bool:
    # A weight that a study scaled, 0.2 * 0.1, against the one that is written, 0.02.
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-9)
    # As JSON, for a tuple within a tuple is read back from a file as a list.
    return json.dumps(one) == json.dumps(other)


def flattened(cfg: Mapping, start: str = "") -> Iterator[tuple[str, object]]:
    """Pairs of dotted key and value, of a CfgNode or nested dictionaries; ``start`` stands before each key."""
    for key, value in cfg.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{start}{key}.")
        else:
            yield start + key, value
