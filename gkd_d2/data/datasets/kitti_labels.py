"""KITTI's label format: its types, its difficulties, and its files read and checked line by line."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gkd_d2.utils.text import counted

CLASSES = ("Car", "Pedestrian", "Cyclist")
IGNORED_TYPES = ("Van", "Truck", "Person_sitting", "Tram", "Misc", "DontCare")
LABEL_FIELDS = (
    "type", "truncated", "occluded", "alpha", "left", "top", "right", "bottom",
    "height", "width", "length", "x", "y", "z", "rotation_y",
)  # fmt: skip
# Narrower than float(), which also takes "nan", "inf" and "1_000".
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_CANONICAL_TYPES = {name.lower(): name for name in CLASSES + IGNORED_TYPES}


@dataclass(frozen=True)
class Difficulty:
    """A difficulty of KITTI's official metric.

    Attributes:
        min_height: least height of a box in pixels.
        max_occlusion: highest level of occlusion.
        max_truncation: largest share of an object outside its image.
    """

    min_height: float
    max_occlusion: int
    max_truncation: float

    def includes(self, height: np.ndarray, occlusion: np.ndarray, truncation: np.ndarray) -> np.ndarray:
        """Whether objects belong to it, elementwise."""
        return (height >= self.min_height) & (occlusion <= self.max_occlusion) & (truncation <= self.max_truncation)


DIFFICULTIES = {
    "easy": Difficulty(40, 0, 0.15),
    "moderate": Difficulty(25, 1, 0.30),
    "hard": Difficulty(25, 2, 0.50),
}


def read_labels(
    path: Path, image_size: tuple[int, int] | None = None, *, any_case: bool = False
) -> list[dict[str, Any]]:
    """Read and check a KITTI label file.

    Args:
        path: the file, one object a line; without objects it is empty.
        image_size: as for :func:`parse_label_line`.
        any_case: as for :func:`parse_label_line`.

    Returns:
        What :func:`parse_label_line` returns, a line each.

    Raises:
        OSError: the file can't be read.
        ValueError: its content is wrong; the message begins with the file and the line.
    """
    return [
        parse_label_line(line, f"{path}:{number}", image_size, any_case=any_case)
        for number, line in enumerate(read_lines(path), start=1)
    ]


def parse_label_line(
    line: str, where: str, image_size: tuple[int, int] | None, *, any_case: bool = False
) -> dict[str, Any]:
    """Parse and check one line of a KITTI label file.

    Args:
        line: 15 fields separated by white space: type, truncated, occluded, alpha, left, top, right, bottom, and the
            7 fields of the 3D box, which are checked to be numbers and not kept.
        where: "file:line", put in front of an error's message.
        image_size: width and height of the image in pixels; None where they are not known, so that boxes are not
            compared with them.
        any_case: take a type in letters of any case, as KITTI's development kit does.

    Returns:
        ``{"type": str, "truncation": float, "occlusion": int, "bbox": [left, top, right, bottom]}``. Truncation is
        in [0, 1]; occlusion is 0 (fully visible), 1 (partly), 2 (largely occluded) or 3 (unknown). Both are -1 where
        DontCare has none. The box's height, bottom - top in pixels, decides the official metric's difficulty.

    Raises:
        ValueError: the line is no valid label.
    """
    fields = line.split()
    if len(fields) != len(LABEL_FIELDS):
        hint = "; 16 fields are a detection result with its score, no label" if len(fields) == 16 else ""
        raise ValueError(
            f"{where}: {counted(len(fields), 'field')}, a KITTI label has {len(LABEL_FIELDS)}{hint}: {line!r}"
        )
    kind = parse_type(fields[0], where, any_case=any_case)
    numbers = dict(
        zip(LABEL_FIELDS[1:], (parse_number(text, name, where) for name, text in zip(LABEL_FIELDS[1:], fields[1:])))
    )

    truncation, occlusion = numbers["truncated"], numbers["occluded"]
    unknown = kind == "DontCare"
    if not (0 <= truncation <= 1 or (unknown and truncation == -1)):
        raise ValueError(f"{where}: truncated is {truncation:g}, not in [0, 1] (-1 is for DontCare alone)")
    if not (occlusion in (0, 1, 2, 3) or (unknown and occlusion == -1)):
        raise ValueError(f"{where}: occluded is {occlusion:g}, not 0, 1, 2 or 3 (-1 is for DontCare alone)")

    bbox = [numbers[side] for side in ("left", "top", "right", "bottom")]
    left, top, right, bottom = bbox
    shown = "left {:g}, top {:g}, right {:g}, bottom {:g}".format(*bbox)
    if right <= left or bottom <= top:
        raise ValueError(f"{where}: the box is empty: {shown}")
    if image_size is not None:
        width, height = image_size
        # KITTI's own boxes end at width - 1 and height - 1; a converter that counts pixel edges at width and height.
        if left < 0 or top < 0 or right > width or bottom > height:
            raise ValueError(f"{where}: the box lies outside its image of {width} x {height} pixels: {shown}")
    return {"type": kind, "truncation": truncation, "occlusion": int(occlusion), "bbox": bbox}


def parse_type(text: str, where: str, *, any_case: bool) -> str:
    """One of KITTI's types, in KITTI's own letters.

    Raises:
        ValueError: there is no such type; the message begins with ``where``.
    """
    kind = _CANONICAL_TYPES.get(text.lower(), text) if any_case else text
    if kind not in CLASSES + IGNORED_TYPES:
        raise ValueError(f"{where}: unknown type {kind!r}; KITTI's types are {', '.join(CLASSES + IGNORED_TYPES)}")
    return kind


def parse_number(text: str, name: str, where: str) -> float:
    """A finite number in decimal notation.

    Raises:
        ValueError: it is none; the message begins with ``where`` and calls the number ``name``.
    """
    value = float(text) if _NUMBER.fullmatch(text) else math.nan
    if not math.isfinite(value):
        raise ValueError(f"{where}: {name} is {text!r}, not a finite number")
    return value


def read_lines(path: Path) -> list[str]:
    """Lines of a text file, whatever its line ends. The last line's end is optional; blank lines are kept.

    Raises:
        OSError: the file can't be read.
        ValueError: it is not text in UTF-8; the message begins with the file and the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: not a text file in UTF-8") from error
    lines = text.split("\n")
    return lines[:-1] if lines[-1] == "" else lines
