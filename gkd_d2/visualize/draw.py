"""Draws gradient maps, box context masks and detections over their image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from PIL import Image
from torch import Tensor

from gkd_d2.visualize.legend import COLUMNS
from gkd_d2.visualize.picture import LevelMaps, Picture

# Inches.
_LARGEST_PANEL, _SMALLEST_PANEL = (4.0, 3.0), (2.4, 1.2)
_LEFT, _RIGHT, _TOP, _BOTTOM, _ACROSS, _DOWN = 0.95, 0.15, 0.75, 0.15, 0.12, 0.28
_DPI = 100
_MAP = {"norm": Normalize(0, 1), "cmap": "inferno", "alpha": 0.65}
# The more opaque, the more the maps differ.
_BLUE, _RED = (0.1, 0.45, 1), (1, 0.2, 0.1)
_STOPS = [(0, (*_BLUE, 1)), (0.5, (*_BLUE, 0)), (0.5, (*_RED, 0)), (1, (*_RED, 1))]
_DIFFERENCE = {"norm": Normalize(-1, 1), "cmap": LinearSegmentedColormap.from_list("difference", _STOPS)}
_CLASS_COLORS = colormaps["tab20"].colors[::2] + colormaps["tab20"].colors[1::2]


def render(figure: Figure) -> np.ndarray:
    """The pixels of a figure: height,width,3, uint8, RGB."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def draw(picture: Picture, *, class_names: Sequence[str] = (), score: float = 0.5, title: str = "") -> Figure:
    """A grid: ground truth and both networks' detections on top; below, a row a level and a column a map.

    Args:
        picture: of one image.
        class_names: of the classes; their numbers where it is empty.
        score: detections below it are left out.
        title: at the top left.
    """
    height, width = picture.image.shape[:2]
    scale = min(_LARGEST_PANEL[0] / width, _LARGEST_PANEL[1] / height)
    panel = [max(scale * pixels, least) for pixels, least in zip((width, height), _SMALLEST_PANEL)]
    rows, columns = 1 + len(picture.levels), len(COLUMNS)
    size = (
        _LEFT + columns * panel[0] + (columns - 1) * _ACROSS + _RIGHT,
        _TOP + rows * panel[1] + (rows - 1) * _DOWN + _BOTTOM,
    )
    figure = Figure(figsize=size, dpi=_DPI)
    grid = figure.add_gridspec(
        rows,
        columns,
        left=_LEFT / size[0],
        right=1 - _RIGHT / size[0],
        top=1 - _TOP / size[1],
        bottom=_BOTTOM / size[1],
        wspace=_ACROSS / panel[0],
        hspace=_DOWN / panel[1],
    )
    axes = [[figure.add_subplot(grid[row, column]) for column in range(columns)] for row in range(rows)]
    figure.text(_LEFT / size[0], 1 - 0.1 / size[1], title, va="top", fontsize=11, weight="bold")
    mask = {"norm": _mask_norm(picture.levels), "cmap": "viridis", "alpha": 0.65}
    drawn = _draw_objects(axes[0], picture, score)
    _draw_scales(axes[0][-1], panel, mask)
    for row, level in zip(axes[1:], picture.levels):
        _draw_level(row, picture, level, mask)
    names = [class_names[number] if number < len(class_names) else f"class {number}" for number in drawn]
    handles = [Patch(color=_class_color(number), label=name) for number, name in zip(drawn, names)]
    if handles:
        corner = (_LEFT / size[0], 1 - 0.5 / size[1])
        style = {"borderaxespad": 0, "borderpad": 0, "fontsize": 8, "frameon": False}
        figure.legend(handles=handles, loc="lower left", bbox_to_anchor=corner, ncols=len(handles), **style)
    return figure


def _draw_objects(axes: list[Axes], picture: Picture, score: float) -> list[int]:
    """Ground truth and detections in the first three panels; returns the classes drawn."""
    truth = picture.truth
    panels = [(f"ground truth: {len(truth)}", truth.gt_boxes, truth.gt_classes, None)]
    for name, found in (("teacher", picture.teacher), ("student", picture.student)):
        found = found[found.scores >= score]
        heading = f"{name}: {len(found)} of score \N{GREATER-THAN OR EQUAL TO} {score:g}"
        panels.append((heading, found.pred_boxes, found.pred_classes, found.scores))
    for panel, (heading, boxes, classes, scores) in zip(axes, panels):
        _draw_image(panel, picture.image, heading)
        for index, (box, number) in enumerate(zip(boxes.tensor.tolist(), classes.tolist())):
            color = _class_color(number)
            _draw_box(panel, box, color, 1.5)
            if scores is not None:
                style = {"facecolor": color, "edgecolor": "none", "pad": 0.5}
                text = f"{scores[index]:.2f}"
                above = box[1] > 0.1 * picture.image.shape[0]
                panel.text(*box[:2], text, fontsize=6, va="bottom" if above else "top", color="white", bbox=style)
    return sorted({number for _, _, classes, _ in panels for number in classes.tolist()})


def _draw_level(axes: list[Axes], picture: Picture, level: LevelMaps, mask: dict) -> None:
    """The maps of a level, over the image in grey, darkened for the white boxes to be seen."""
    grey = np.asarray(Image.fromarray(picture.image).convert("L").point(lambda value: 0.75 * value).convert("RGB"))
    difference = (level.teacher - level.student).numpy()
    teacher, student, differs, masked = COLUMNS
    for panel, heading, values, style in (
        (axes[0], teacher + _emptiness(level.teacher), level.teacher.numpy(), _MAP),
        (axes[1], student + _emptiness(level.student), level.student.numpy(), _MAP),
        (axes[2], f"{differs} (mean absolute {np.abs(difference).mean():.3f})", difference, _DIFFERENCE),
        (axes[3], masked, np.ma.masked_equal(level.mask.numpy(), 0), mask),
    ):
        _draw_image(panel, grey, heading)
        _lay_over(panel, values, picture.padded_size, **style)
        for box in picture.truth.gt_boxes.tensor.tolist():
            _draw_box(panel, box, "white", 0.6)
    rows, columns = level.teacher.shape
    text = f"{level.name}\nstride {level.stride}\n{rows} \N{MULTIPLICATION SIGN} {columns}"
    axes[0].text(-0.03, 0.5, text, transform=axes[0].transAxes, ha="right", va="center", fontsize=9)


def _emptiness(values: Tensor) -> str:
    """What a black map means: as where the losses drew no sample at this level, so that there is no gradient."""
    return "" if values.any() else " (0 everywhere)"


def _draw_image(axes: Axes, image: np.ndarray, heading: str) -> None:
    axes.imshow(image, extent=(0, image.shape[1], image.shape[0], 0))
    axes.set_title(heading, fontsize=9, pad=3)
    axes.set(xticks=[], yticks=[])


def _lay_over(axes: Axes, values: np.ndarray, padded_size: tuple[int, int], **style) -> None:
    """Stretch a map over the padded batch, and leave the limits of the image as they are: they cut off the padding."""
    limits = axes.get_xlim(), axes.get_ylim()
    axes.imshow(values, extent=(0, padded_size[1], padded_size[0], 0), interpolation="nearest", **style)
    axes.set(xlim=limits[0], ylim=limits[1])


def _draw_box(axes: Axes, box: list[float], color, width: float) -> None:
    x0, y0, x1, y1 = box
    axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=color, linewidth=width))


def _draw_scales(axes: Axes, panel: tuple[float, float], mask: dict) -> None:
    """The colours of the maps, in the panel that is left free."""
    axes.axis("off")
    for row, (label, style) in enumerate((("gradient map", _MAP), ("difference", _DIFFERENCE), ("mask", mask))):
        bar = axes.inset_axes([0.35, 1 - (0.2 + 0.4 * row) / panel[1], 0.5, 0.12 / panel[1]])
        axes.figure.colorbar(ScalarMappable(style["norm"], style["cmap"]), cax=bar, orientation="horizontal")
        if style is _DIFFERENCE:
            bar.set_xticks([-1, 0, 1], ["\N{MINUS SIGN}1: student's", "0", "1: teacher's"])
        bar.tick_params(labelsize=7, length=2, pad=1)
        bar.text(-0.05, 0.5, label, transform=bar.transAxes, ha="right", va="center", fontsize=8)


def _mask_norm(levels: list[LevelMaps]) -> LogNorm:
    """One logarithmic scale for the masks of all levels."""
    weights = torch.cat([level.mask.flatten() for level in levels])
    weights = weights[weights > 0]
    least, largest = (weights.min().item(), weights.max().item()) if len(weights) else (1.0, 1.0)
    return LogNorm(min(least, 0.1 * largest), largest)


def _class_color(number: int) -> tuple[float, float, float]:
    return _CLASS_COLORS[number % len(_CLASS_COLORS)]
