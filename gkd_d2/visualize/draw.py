"""Draws gradient maps, box context masks, importances and detections over their image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from torch import Tensor

from gkd_d2.visualize.legend import COLUMNS, IMPORTANCES, SCORE
from gkd_d2.visualize.picture import LevelImportances, LevelMaps, Picture, PlacedMap
from gkd_d2.visualize.sheet import Panel, Row, Scale, draw_sheet

# The more opaque, the more the maps differ.
_BLUE, _RED = (0.1, 0.45, 1), (1, 0.2, 0.1)
_STOPS = [(0, (*_BLUE, 1)), (0.5, (*_BLUE, 0)), (0.5, (*_RED, 0)), (1, (*_RED, 1))]
_MAP = Scale(Normalize(0, 1), colormaps["inferno"], alpha=0.65)
_DIFFERENCE = Scale(
    Normalize(-1, 1),
    LinearSegmentedColormap.from_list("difference", _STOPS),
    ticks={-1: "\N{MINUS SIGN}1: student's", 0: "0", 1: "1: teacher's"},
)


def render(figure: Figure) -> np.ndarray:
    """The pixels of a figure: height,width,3, uint8, RGB."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def draw(picture: Picture, *, class_names: Sequence[str] = (), score: float = 0.5, title: str = "") -> Figure:
    """Objects and detections on top; below, a row a level with both gradient maps, their difference and the mask.

    Args:
        picture: of one image, with :class:`LevelMaps`.
        class_names: of the classes; their numbers where it is empty.
        score: detections below it are left out.
        title: at the top left.
    """
    mask = Scale(_mask_norm(picture.levels), colormaps["viridis"], alpha=0.65)
    rows = [Row(_row_text(level, level.teacher), _map_panels(level, mask)) for level in picture.levels]
    scales = {"gradient map": _MAP, "difference": _DIFFERENCE, "mask": mask}
    return draw_sheet(picture, rows, scales, class_names=class_names, score=score, title=title)


def draw_importances(
    picture: Picture, *, class_names: Sequence[str] = (), score: float = 0.5, title: str = ""
) -> Figure:
    """Objects and detections on top; below, a row a level with a column an importance.

    Args:
        picture: of one image, with :class:`LevelImportances`.
        class_names, score, title: as for :func:`draw`.
    """
    rows = []
    for level in picture.levels:
        panels = [_importance_panel(name, level.maps.get(name)) for name in IMPORTANCES]
        text = _row_text(level, next(iter(level.maps.values())).values)
        rows.append(Row(f"{text}\nboxes: {level.area:.0%}", panels))
    return draw_sheet(picture, rows, {"importance": _MAP}, class_names=class_names, score=score, title=title)


def _map_panels(level: LevelMaps, mask: Scale) -> list[Panel]:
    difference = (level.teacher - level.student).numpy()
    teacher, student, differs, masked, importance = COLUMNS
    panels = [
        Panel(teacher + _emptiness(level.teacher), level.teacher.numpy(), _MAP),
        Panel(student + _emptiness(level.student), level.student.numpy(), _MAP),
        Panel(f"{differs} (mean absolute {np.abs(difference).mean():.3f})", difference, _DIFFERENCE),
        Panel(masked, np.ma.masked_equal(level.mask.numpy(), 0), mask),
    ]
    if level.importance is not None:
        panels.append(Panel(importance + _emptiness(level.importance), _of_largest(level.importance), _MAP))
    return panels


def _importance_panel(name: str, found: PlacedMap | None) -> Panel:
    if found is None:
        return Panel(f"{name}: none at this level", None, _MAP)
    if found.place is None:
        return Panel(name + _emptiness(found.values), found.values.numpy(), _MAP)
    where = "inside" if found.place.peak_inside else "outside"
    # A score is a probability, and low everywhere where the teacher knows little.
    values = found.values.numpy() if name == SCORE else _of_largest(found.values)
    return Panel(f"{name}: {found.place.share:.0%} inside, peak {where}", values, _MAP)


def _row_text(level: LevelMaps | LevelImportances, values: Tensor) -> str:
    rows, columns = values.shape
    return f"{level.name}\nstride {level.stride}\n{rows} \N{MULTIPLICATION SIGN} {columns}"


def _of_largest(values: Tensor) -> np.ndarray:
    """A map >= 0 in proportion to its largest value."""
    return (values / values.amax().clamp(min=torch.finfo(values.dtype).tiny)).numpy()


def _emptiness(values: Tensor) -> str:
    """What a black map means: as where the losses drew no sample at this level, so that there is no gradient."""
    return "" if values.any() else " (0 everywhere)"


def _mask_norm(levels: Sequence[LevelMaps]) -> LogNorm:
    """One logarithmic scale for the masks of all levels."""
    weights = torch.cat([level.mask.flatten() for level in levels])
    weights = weights[weights > 0]
    least, largest = (weights.min().item(), weights.max().item()) if len(weights) else (1.0, 1.0)
    return LogNorm(min(least, 0.1 * largest), largest)
