"""Pictures of what a study shows."""

from __future__ import annotations

import statistics
from pathlib import Path

from matplotlib.figure import Figure

from gkd_d2.analysis.runs import HEADLINE
from gkd_d2.analysis.study.rows import Row


def plot_settings(rows: dict[str, Row], teacher: float, title: str, path: Path) -> None:
    """Draw the AP of every seed and their mean, a line a setting; the teacher's and the baseline's as marks.

    Args:
        rows: setting -> what is there of it; the first is the baseline.
        teacher: AP of the teacher.
        title: of the picture.
        path: of the PNG file to write.
    """
    found = {name: list(row.values(HEADLINE).values()) for name, row in rows.items() if row.values(HEADLINE)}
    figure = Figure(figsize=(7, 1.2 + 0.24 * len(found)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(teacher, color="black", linestyle=":", linewidth=1, label="teacher")
    first = next(iter(rows))
    if first in found:
        axes.axvspan(min(found[first]), max(found[first]), color="C7", alpha=0.2, label=f"range of {first}")
    for height, values in enumerate(found.values()):
        axes.plot(values, [height] * len(values), "o", color="C0", markersize=4, alpha=0.6)
        axes.plot(statistics.fmean(values), height, "|", color="C3", markersize=12, markeredgewidth=2)
    axes.set_yticks(range(len(found)), list(found), fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("AP (%): each seed as a dot, their mean as a stroke")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8, loc="lower left")
    figure.savefig(path, dpi=110)
