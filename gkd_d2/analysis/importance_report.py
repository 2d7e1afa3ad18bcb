"""Whether gradients point at the objects: where maps of importance lie, as means over images."""

from __future__ import annotations

import html
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from gkd_d2.utils.files import write_whole
from gkd_d2.utils.text import counted
from gkd_d2.visualize.legend import IMPORTANCES
from gkd_d2.visualize.page import write_page
from gkd_d2.visualize.picture import LevelImportances

_NONE = "–"


class ImportanceReport:
    """Gathers where the maps of images lie.

    At each level only the images count that have an object and no map that is 0 everywhere there, so that all numbers
    of a level are means over the same images.
    """

    def __init__(self):
        self._images = 0
        self._levels: dict[str, list[LevelImportances]] = {}

    def add(self, levels: Sequence[LevelImportances]) -> None:
        """Take one more image, of the same levels as the others."""
        boxed = any(level.area for level in levels)
        self._images += boxed
        for level in levels:
            counted_levels = self._levels.setdefault(level.name, [])
            if boxed and all(found.place is not None for found in level.maps.values()):
                counted_levels.append(level)

    def result(self) -> dict:
        """Means over the images that count.

        Returns:
            ``images``: those with objects. ``levels``: name of a level -> ``images``, those that count there; ``area``,
            the share of its cells in boxes; and ``importances``: name -> ``share`` of the map's sum in them, and
            ``peak``, the part of the images in which its largest cell is one of them. Without images ``area`` is None
            and there are no importances; one that the level does not have is left out.
        """
        return {"images": self._images, "levels": {name: _means(levels) for name, levels in self._levels.items()}}


def _means(levels: list[LevelImportances]) -> dict:
    """Of one level of several images."""
    importances = levels[0].maps if levels else {}
    places = {name: [level.maps[name].place for level in levels] for name in importances}
    return {
        "images": len(levels),
        "area": statistics.fmean(level.area for level in levels) if levels else None,
        "importances": {
            name: {
                "share": statistics.fmean(place.share for place in found),
                "peak": statistics.fmean(place.peak_inside for place in found),
            }
            for name, found in places.items()
        },
    }


def importance_table(result: dict, tablefmt: str = "github") -> str:
    """A column a level; a row for the boxes' area, and one for each importance.

    Args:
        result: of :meth:`ImportanceReport.result`.
        tablefmt: of tabulate.
    """
    levels = result["levels"]
    rows = [["area of the boxes (chance)", *(_number(level["area"]) for level in levels.values())]]
    for importance in IMPORTANCES:
        rows.append([importance, *(_cell(level["importances"].get(importance)) for level in levels.values())])
    headers = [
        name if level["images"] == result["images"] else f"{name} ({counted(level['images'], 'image')})"
        for name, level in levels.items()
    ]
    return tabulate(rows, ["", *headers], tablefmt=tablefmt, disable_numparse=True)


def report_text(result: dict) -> str:
    """The table as Markdown, with what its numbers are above it and what a reader must know of single cells below.

    Args:
        result: of :meth:`ImportanceReport.result`.
    """
    return "\n\n".join([_heading(result), importance_table(result), *_notes(result)])


def write_report(folder: Path, result: dict, facts: dict[str, str], pictures: dict[str, str]) -> None:
    """Write importance.md, importance.json, and a page of pictures with the table, index.html.

    Args:
        folder: exists.
        result: of :meth:`ImportanceReport.result`.
        facts: what it was measured on, name -> value.
        pictures: file in the folder -> caption.

    Raises:
        OSError: a file can't be written.
    """
    title = "Where the importances lie"
    about = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    legend = "\n".join(f"- `{name}`: {text}" for name, text in IMPORTANCES.items())
    texts = {
        folder / "importance.md": "\n\n".join([f"# {title}", about, report_text(result), legend]) + "\n",
        folder / "importance.json": json.dumps({**facts, **result}, indent=2) + "\n",
    }
    write_whole(texts)
    paragraphs = [f"<p>{html.escape(text)}</p>" for text in (_heading(result), *_notes(result))]
    table = "\n".join([paragraphs[0], importance_table(result, "html"), *paragraphs[1:]])
    write_page(folder / "index.html", title, facts, pictures, IMPORTANCES, table)


def _heading(result: dict) -> str:
    return (
        "Share of each map's mass inside the ground-truth boxes, and fraction of images whose peak lies inside: means "
        f"over {counted(result['images'], 'image')} with objects. A cell is inside if a box covers any part of it, as "
        "for the box context mask."
    )


def _notes(result: dict) -> list[str]:
    levels, lines = result["levels"], []
    if any(level["images"] < result["images"] for level in levels.values()):
        lines.append("A number of images in brackets: in the others some map is 0 everywhere; they do not count there.")
    for importance in IMPORTANCES:
        without = [name for name, level in levels.items() if level["images"] and importance not in level["importances"]]
        if without:
            lines.append(
                f"No {importance} at {', '.join(without)}: the teacher's heads score no cells there, or its split does "
                "not implement score_maps, see docs/own_detector.md."
            )
    return lines


def _cell(place: dict | None) -> str:
    return _NONE if place is None else f"{_number(place['share'])}, peak {_number(place['peak'])}"


def _number(value: float | None) -> str:
    return _NONE if value is None else f"{value:.2f}"
