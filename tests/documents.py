"""Reading the project's Markdown."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

MARK = "<!-- test -->"


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of a document.

    Attributes:
        line: number of the line that opens it.
        language: what follows the fence, as "python".
        text: what it holds.
        marked: whether the line above it is :data:`MARK`.
    """

    line: int
    language: str
    text: str
    marked: bool


def fenced_blocks(document: Path) -> list[Block]:
    """All fenced blocks of a document, in order."""
    text = document.read_text(encoding="utf-8")
    return [
        Block(
            line=text.count("\n", 0, match.start("fence")) + 1,
            language=match["language"],
            text=match["text"],
            marked=match["mark"] is not None,
        )
        for match in re.finditer(
            rf"^(?P<mark>{MARK}\n)?(?P<fence>```)(?P<language>\w*)\n(?P<text>.*?)^```$", text, re.MULTILINE | re.DOTALL
        )
    ]
