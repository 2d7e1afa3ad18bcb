"""A comparison of finished runs on one validation set: a Markdown table and a picture."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished training of ``tools/train_net.py``.

    Attributes:
        name: how the run is called in the report.
        folder: its OUTPUT_DIR.
    """

    name: str
    folder: Path

    def metrics(self) -> dict[str, float]:
        """The last value of every scalar in metrics.json.

        Raises:
            FileNotFoundError: the run has none.
        """
        return {name: value for row in self._rows() for name, value in row.items()}

    def iterations(self) -> int:
        """The number of training iterations."""
        return 1 + max(row["iteration"] for row in self._rows() if "total_loss" in row)

    def _rows(self) -> list[dict[str, float]]:
        lines = (self.folder / "metrics.json").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def detections(self, dataset: str, score: float) -> dict[str, list[dict]]:
        """Image id -> detections of at least ``score`` as COCO result records."""
        path = self.folder / "inference" / dataset / "coco_instances_results.json"
        found: dict[str, list[dict]] = {}
        for record in json.loads(path.read_text(encoding="utf-8")):
            if record["score"] >= score:
                found.setdefault(record["image_id"], []).append(record)
        return found


def markdown_table(runs: list[Run], dataset: str) -> str:
    """The average precision of every run, in percent, as a Markdown table.

    Args:
        runs: evaluated on ``dataset`` by COCOEvaluator.
        dataset: name of the validation set.
    """
    classes = MetadataCatalog.get(dataset).thing_classes
    header = ["", "AP", "AP50", *(f"AP {name}" for name in classes), "iterations"]
    rows = [header, ["---", *["---:"] * (len(header) - 1)]]
    for run in runs:
        metrics = run.metrics()
        names = ["bbox/AP", "bbox/AP50", *(f"bbox/AP-{name}" for name in classes)]
        rows.append([run.name, *(f"{metrics[name]:.1f}" for name in names), str(run.iterations())])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def plot(runs: list[Run], dataset: str, path: Path, *, images: int = 3, score: float = 0.5) -> None:
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
    _draw_bars(figure.add_subplot(grid[0, :]), runs)
    detections = [run.detections(dataset, score) for run in runs]
    for row, record in enumerate(records, start=1):
        truth = [(a["bbox"], a["category_id"]) for a in record["annotations"] if not a["iscrowd"]]
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


def _draw_bars(axes: Axes, runs: list[Run]) -> None:
    for offset, (metric, label) in enumerate((("bbox/AP", "AP"), ("bbox/AP50", "AP50"))):
        values = [run.metrics()[metric] for run in runs]
        bars = axes.bar([i + 0.4 * offset for i in range(len(runs))], values, width=0.38, label=label)
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
