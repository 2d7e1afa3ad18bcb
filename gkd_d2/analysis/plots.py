"""Plots of finished runs: AP and losses over iterations, and detections beside each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from PIL import Image

from gkd_d2.analysis.comparison import METRICS
from gkd_d2.analysis.runs import HEADLINE, Run


def plot_curves(runs: Sequence[Run], dataset: str, path: Path, *, columns: int = 4) -> None:
    """Draw AP over iterations and every loss term over iterations, a panel each.

    Args:
        runs: evaluated on ``dataset``.
        dataset: name of the validation set.
        path: of the PNG file to write.
        columns: of panels.
    """
    losses = list(dict.fromkeys(name for run in runs for name in run.losses()))
    titles = ["AP (%)", *losses]
    figure = Figure(figsize=(3.4 * columns, 2.6 * math.ceil(len(titles) / columns) + 0.3 * len(runs)))
    figure.set_layout_engine("constrained")
    grid = figure.add_gridspec(math.ceil(len(titles) / columns), columns)
    for index, title in enumerate(titles):
        axes = figure.add_subplot(grid[divmod(index, columns)])
        for number, run in enumerate(runs):
            curve = run.curve(title if index else run.prefix(dataset) + HEADLINE)
            if curve:
                axes.plot(curve.keys(), curve.values(), marker="." if index else "o", markersize=4, color=f"C{number}")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("iteration", fontsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        axes.tick_params(labelsize=8)
        axes.margins(y=0.1)
    lines = [figure.axes[0].plot([], [], color=f"C{number}", label=run.name)[0] for number, run in enumerate(runs)]
    figure.legend(handles=lines, loc="outside upper left", fontsize=9)
    figure.savefig(path, dpi=100)


def plot_detections(runs: Sequence[Run], dataset: str, path: Path, *, images: int = 3, score: float = 0.5) -> None:
    """Draw the AP of each run and the detections of each on the images with most objects.

    Args:
        runs: evaluated on ``dataset`` by COCOEvaluator.
        dataset: name of the validation set.
        path: of the PNG file to write.
        images: number of example images.
        score: detections below it are not drawn.
    """
    records = sorted(DatasetCatalog.get(dataset), key=lambda r: -sum(not a["iscrowd"] for a in r["annotations"]))
    records = records[:images]
    columns = 1 + len(runs)
    figure = Figure(figsize=(4 * columns, 3 + 1.8 * images), layout="constrained")
    grid = figure.add_gridspec(1 + images, columns, height_ratios=[3] + [1.8] * images)
    _draw_bars(figure.add_subplot(grid[0, :]), runs, dataset)
    detections = [run.detections(dataset, score) for run in runs]
    for row, record in enumerate(records, start=1):
        truth = [
            (BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS), a["category_id"])
            for a in record["annotations"]
            if not a["iscrowd"]
        ]
        axes = figure.add_subplot(grid[row, 0])
        _draw_boxes(axes, record["file_name"], truth, "ground truth")
        contiguous = MetadataCatalog.get(dataset).get("thing_dataset_id_to_contiguous_id")
        for column, (run, found) in enumerate(zip(runs, detections), start=1):
            boxes = []
            for d in found.get(record["image_id"], []):
                x, y, w, h = d["bbox"]
                boxes.append(((x, y, x + w, y + h), contiguous[d["category_id"]] if contiguous else d["category_id"]))
            _draw_boxes(figure.add_subplot(grid[row, column]), record["file_name"], boxes, run.name)
    figure.savefig(path, dpi=100)


def _draw_bars(axes: Axes, runs: Sequence[Run], dataset: str) -> None:
    metrics = [run.metrics(dataset) for run in runs]
    for offset, name in enumerate((HEADLINE, "bbox/AP50")):
        positions = [i + 0.4 * offset for i in range(len(runs))]
        bars = axes.bar(positions, [found[name] for found in metrics], width=0.38, label=METRICS[name])
        axes.bar_label(bars, fmt="%.1f")
    axes.set_xticks([i + 0.2 for i in range(len(runs))], [run.name for run in runs])
    axes.set_ylabel("average precision (%)")
    axes.margins(y=0.12)
    axes.legend()


def _draw_boxes(axes: Axes, file_name: str, boxes: list[tuple], title: str) -> None:
    axes.imshow(Image.open(file_name).convert("RGB"))
    for (x0, y0, x1, y1), category in boxes:
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=f"C{category + 1}", linewidth=1.5))
    axes.set_title(title, fontsize=9)
    axes.axis("off")
