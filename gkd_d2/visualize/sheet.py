"""The sheet of a picture: the objects on top, below them a row a level and a column a map, each over the image."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from PIL import Image

from gkd_d2.visualize.picture import Picture

# Inches.
_LARGEST_PANEL, _SMALLEST_PANEL = (4.0, 3.0), (2.4, 1.2)
_LEFT, _RIGHT, _TOP, _BOTTOM, _ACROSS, _DOWN = 0.95, 0.15, 0.75, 0.15, 0.12, 0.28
_DPI = 100
_CLASS_COLORS = colormaps["tab20"].colors[::2] + colormaps["tab20"].colors[1::2]


@dataclasses.dataclass(frozen=True)
class Scale:
    """The colours of a map.

    Attributes:
        norm: value -> [0, 1].
        colors: of [0, 1].
        alpha: opacity; None: that of the colours.
        ticks: value -> its label; None: chosen by matplotlib.
    """

    norm: Normalize
    colors: Colormap
    alpha: float | None = None
    ticks: Mapping[float, str] | None = None


@dataclasses.dataclass(frozen=True)
class Panel:
    """A map over the image.

    Attributes:
        heading: above it.
        values: H,W cells that cover the padded batch; None: there is no such map, and the heading stands alone.
        scale: of the values.
    """

    heading: str
    values: np.ndarray | None
    scale: Scale


@dataclasses.dataclass(frozen=True)
class Row:
    """The maps of a level.

    Attributes:
        text: to the left of them.
        panels: as many as any other row has, at least 4.
    """

    text: str
    panels: Sequence[Panel]


def draw_sheet(
    picture: Picture,
    rows: Sequence[Row],
    scales: Mapping[str, Scale],
    *,
    class_names: Sequence[str],
    score: float,
    title: str,
) -> Figure:
    """Ground truth and both networks' detections on top, with the scales to their right; below, a row a level.

    Args:
        picture: of one image; its levels are not read.
        rows: at least one.
        scales: name -> scale, to be explained.
        class_names: of the classes; their numbers where it is empty.
        score: detections below it are left out.
        title: at the top left.
    """
    height, width = picture.image.shape[:2]
    scale = min(_LARGEST_PANEL[0] / width, _LARGEST_PANEL[1] / height)
    panel = [max(scale * pixels, least) for pixels, least in zip((width, height), _SMALLEST_PANEL)]
    down, across = 1 + len(rows), len(rows[0].panels)
    size = (
        _LEFT + across * panel[0] + (across - 1) * _ACROSS + _RIGHT,
        _TOP + down * panel[1] + (down - 1) * _DOWN + _BOTTOM,
    )
    figure = Figure(figsize=size, dpi=_DPI)
    grid = figure.add_gridspec(
        down,
        across,
        left=_LEFT / size[0],
        right=1 - _RIGHT / size[0],
        top=1 - _TOP / size[1],
        bottom=_BOTTOM / size[1],
        wspace=_ACROSS / panel[0],
        hspace=_DOWN / panel[1],
    )
    axes = [[figure.add_subplot(grid[row, column]) for column in range(across)] for row in range(down)]
    figure.text(_LEFT / size[0], 1 - 0.1 / size[1], title, va="top", fontsize=11, weight="bold")
    drawn = _draw_objects(axes[0], picture, score)
    for free in axes[0][3:]:
        free.axis("off")
    _draw_scales(axes[0][-1], panel, scales)
    for line, row in zip(axes[1:], rows):
        _draw_row(line, picture, row)
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


def _draw_row(axes: list[Axes], picture: Picture, row: Row) -> None:
    """Maps over the image in grey, darkened for the white boxes to be seen."""
    grey = np.asarray(Image.fromarray(picture.image).convert("L").point(lambda value: 0.75 * value).convert("RGB"))
    for axis, panel in zip(axes, row.panels):
        _draw_image(axis, grey, panel.heading)
        if panel.values is None:
            continue
        _lay_over(axis, panel.values, picture.padded_size, panel.scale)
        for box in picture.truth.gt_boxes.tensor.tolist():
            _draw_box(axis, box, "white", 0.6)
    axes[0].text(-0.03, 0.5, row.text, transform=axes[0].transAxes, ha="right", va="center", fontsize=9)


def _draw_image(axes: Axes, image: np.ndarray, heading: str) -> None:
    axes.imshow(image, extent=(0, image.shape[1], image.shape[0], 0))
    axes.set_title(heading, fontsize=9, pad=3)
    axes.set(xticks=[], yticks=[])


def _lay_over(axes: Axes, values: np.ndarray, padded_size: tuple[int, int], scale: Scale) -> None:
    """Stretch a map over the padded batch, and leave the limits of the image as they are: they cut off the padding."""
    limits = axes.get_xlim(), axes.get_ylim()
    style = {"norm": scale.norm, "cmap": scale.colors, "alpha": scale.alpha, "interpolation": "nearest"}
    axes.imshow(values, extent=(0, padded_size[1], padded_size[0], 0), **style)
    axes.set(xlim=limits[0], ylim=limits[1])


def _draw_box(axes: Axes, box: list[float], color, width: float) -> None:
    x0, y0, x1, y1 = box
    axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=color, linewidth=width))


def _draw_scales(axes: Axes, panel: list[float], scales: Mapping[str, Scale]) -> None:
    """The colours of the maps, in a panel that is left free."""
    for row, (label, scale) in enumerate(scales.items()):
        bar = axes.inset_axes([0.35, 1 - (0.2 + 0.4 * row) / panel[1], 0.5, 0.12 / panel[1]])
        axes.figure.colorbar(ScalarMappable(scale.norm, scale.colors), cax=bar, orientation="horizontal")
        if scale.ticks is not None:
            bar.set_xticks(list(scale.ticks), list(scale.ticks.values()))
        bar.tick_params(labelsize=7, length=2, pad=1)
        bar.text(-0.05, 0.5, label, transform=bar.transAxes, ha="right", va="center", fontsize=8)


def _class_color(number: int) -> tuple[float, float, float]:
    return _CLASS_COLORS[number % len(_CLASS_COLORS)]
