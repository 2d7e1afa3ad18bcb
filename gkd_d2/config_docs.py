"""The table of the config's keys, with each default and the comment that stands above it in gkd_d2/config/keys.py.

python -m gkd_d2.config_docs > docs/configuration.md
"""

from __future__ import annotations

import ast
import inspect
import io
import re
import textwrap
import tokenize
from collections.abc import Callable, Iterator

from detectron2.config import CfgNode, get_cfg

from gkd_d2.config import add_gkd_config

COMMAND = "python -m gkd_d2.config_docs > docs/configuration.md"
HEAD = f"""\
# Configuration

The keys that `gkd_d2.add_gkd_config` adds to those of Detectron2. They are set in a config file, or as `KEY VALUE` at
the end of the command line. Of Detectron2's own, `MODEL.DEVICE` may also be `auto` for the tools of this project:
`cuda` where torch finds a GPU, else `cpu`. This page is made from the comments in gkd_d2/config/keys.py by

    {COMMAND}
"""


def documented_keys(add_config: Callable[[CfgNode], None]) -> list[tuple[str, object, str]]:
    """What a function that adds keys to a config adds, and what its comments say of it.

    A comment is that of all keys below it, up to the next comment or empty line.

    Args:
        add_config: adds keys by assignments of the form ``cfg.A.B = value``.

    Returns:
        (key, default, comment) in the order of the source.

    Raises:
        ValueError: a key has no comment, or is added in another way.
    """
    source = textwrap.dedent(inspect.getsource(add_config))
    plain, cfg = get_cfg(), get_cfg()
    add_config(cfg)
    defaults = dict(_leaves(cfg))
    comments = _comments(source)
    keys = [(key, defaults[key], comments.get(line, "")) for key, line in _assignments(source) if key in defaults]
    bare = [key for key, _, comment in keys if not comment]
    if bare:
        raise ValueError(f"{', '.join(bare)}: {add_config.__name__} has no comment above it")
    hidden = defaults.keys() - dict(_leaves(plain)).keys() - {key for key, *_ in keys}
    if hidden:
        raise ValueError(f"{', '.join(sorted(hidden))}: {add_config.__name__} does not add it by `cfg.A.B = value`")
    return keys


def markdown(keys: list[tuple[str, object, str]]) -> str:
    """The page of some keys: see :func:`documented_keys`."""
    rows = [f"| `{key}` | `{default!r}` | {_escaped(comment)} |" for key, default, comment in keys]
    return "\n".join([HEAD, "| key | default | effect |", "| --- | --- | --- |", *rows, ""])


def _escaped(text: str) -> str:
    """``text``, with nothing in it that Markdown takes for a cell's end, a tag or emphasis."""
    return re.sub(r"[<|*]", r"\\\g<0>", text)


def _leaves(node: CfgNode, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in node.items():
        if isinstance(value, CfgNode) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            # A node without keys takes those that its user gives it.
            yield prefix + name, dict(value) if isinstance(value, CfgNode) else value


def _assignments(source: str) -> list[tuple[str, int]]:
    """(A.B, line) of each ``cfg.A.B = value``."""
    nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.Assign, ast.AnnAssign))]
    targets = [t for n in nodes for t in (n.targets if isinstance(n, ast.Assign) else [n.target])]
    names = [(ast.unparse(t), t.lineno) for t in targets if isinstance(t, ast.Attribute)]
    return sorted(((name[4:], line) for name, line in names if name.startswith("cfg.")), key=lambda pair: pair[1])


def _comments(source: str) -> dict[int, str]:
    """Line -> the comment that stands above it, for the lines that have one."""
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT]
    own = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.line.strip() == t.string}
    comments: dict[int, str] = {}
    current: list[str] = []
    for number, line in enumerate(source.splitlines(), start=1):
        if number in own:
            current = [*(current if number - 1 in own else []), own[number]]
        elif not line.strip():
            current = []
        elif current:
            comments[number] = " ".join(current)
    return comments


if __name__ == "__main__":
    print(markdown(documented_keys(add_gkd_config)), end="")
