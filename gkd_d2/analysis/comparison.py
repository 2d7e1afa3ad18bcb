"""A comparison of finished runs on one validation set: Markdown tables and pictures."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from PIL import Image

from gkd_d2.analysis.runs import HEADLINE, Run, find_baselines, find_teacher, training_differences

METRICS = {HEADLINE: "AP", "bbox/AP50": "AP50", "kitti/AP_moderate": "KITTI AP moderate"}
CLASS_METRIC = "bbox/AP-"
NONE = "–"


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a run's detector costs for one image.

    Attributes:
        parameters: their number.
        gflops: billions of operations; None where it was not measured.
        milliseconds: None where it was not measured.
    """

    parameters: int
    gflops: float | None = None
    milliseconds: float | None = None


def find_roles(runs: Sequence[Run]) -> dict[str, str]:
    """Run name -> "teacher", "student alone", "student distilled", or "" for a run that belongs to no distilled one."""
    roles = {run.name: "" for run in runs}
    distilled = [run for run in runs if run.distilled]
    for run in distilled:
        roles |= {baseline.name: "student alone" for baseline in find_baselines(run, runs)}
    for run in distilled:
        teacher = find_teacher(run, runs)
        if teacher is not None:
            roles[teacher.name] = "teacher"
    return roles | {run.name: "student distilled" for run in distilled}


def markdown_table(
    runs: Sequence[Run],
    dataset: str,
    *,
    roles: Mapping[str, str] | None = None,
    costs: Mapping[str, Cost] | None = None,
) -> str:
    """The average precision of every run, in percent, as a Markdown table.

    Args:
        runs: evaluated on ``dataset``.
        dataset: name of the validation set.
        roles: run name -> its role, as a column.
        costs: run name -> what its detector costs, as columns.

    Raises:
        ValueError: a run was never evaluated on ``dataset``.
    """
    metrics = [run.metrics(dataset) for run in runs]
    classes = sorted({name for found in metrics for name in found if name.startswith(CLASS_METRIC)})
    labels = METRICS | {name: f"AP {name.removeprefix(CLASS_METRIC)}" for name in classes}
    columns = {"": [run.name for run in runs]}
    if roles is not None:
        columns["role"] = [roles[run.name] for run in runs]
    for name, label in labels.items():
        if any(name in found for found in metrics):
            columns[label] = [_number(found.get(name)) for found in metrics]
    if costs is not None:
        columns["parameters (M)"] = [_number(costs[run.name].parameters / 1e6, 2) for run in runs]
        columns["GFLOPs"] = [_number(costs[run.name].gflops, 2) for run in runs]
        columns["ms an image"] = [_number(costs[run.name].milliseconds) for run in runs]
    columns["iterations"] = [str(run.iterations()) for run in runs]
    return markdown(columns, left=1 if roles is None else 2)


def gain_table(runs: Sequence[Run], dataset: str) -> str:
    """What every distilled run gains over its student trained alone, as a Markdown table; "" where there is no gain.

    The gain is the distilled run's average precision minus that of its baseline, their mean where there are several.
    The part of the gap is the gain over what the teacher is better than the baseline.

    Args:
        runs: evaluated on ``dataset``.
        dataset: name of the validation set.

    Raises:
        ValueError: a run was never evaluated on ``dataset``.
    """
    rows = []
    for run in runs:
        baselines = find_baselines(run, runs) if run.distilled else []
        if not baselines:
            continue
        teacher = find_teacher(run, runs)
        best = teacher.metrics(dataset) if teacher else {}
        alone = [baseline.metrics(dataset) for baseline in baselines]
        for name, value in run.metrics(dataset).items():
            if name not in METRICS or not all(name in found for found in alone):
                continue
            base = statistics.fmean(found[name] for found in alone)
            gap = best[name] - base if name in best else 0
            part = f"{100 * (value - base) / gap:.0f} %" if gap > 0 else NONE
            numbers = [_number(value), _number(base), f"{value - base:+.1f}", _number(best.get(name)), part]
            rows.append([run.name, METRICS[name], *numbers])
    if not rows:
        return ""
    header = ["", "metric", "distilled", "alone", "gain", "teacher", "of the gap to the teacher"]
    return markdown(dict(zip(header, zip(*rows))), left=2)


def notes(runs: Sequence[Run]) -> list[str]:
    """What a reader of the gains must know: who is compared with whom, and what else differs between them."""
    lines = []
    for run in (run for run in runs if run.distilled):
        baselines, teacher = find_baselines(run, runs), find_teacher(run, runs)
        if not baselines:
            lines.append(f"{run.name}: no run here trained the same MODEL alone, so its gain is not known.")
            continue
        names = ", ".join(baseline.name for baseline in baselines)
        mean = "the mean of " if len(baselines) > 1 else ""
        method = run.config.GKD.METHOD
        lines.append(
            f"{run.name}: the method is {method}; alone is {mean}{names}; "
            f"teacher is {teacher.name if teacher else 'no run here'}."
        )
        for baseline in baselines:
            different = training_differences(run, baseline).items()
            if different:
                listed = "; ".join(f"{key} {ours!r} here, {theirs!r} there" for key, (ours, theirs) in different)
                lines.append(
                    f"{run.name} and {baseline.name} were configured differently beside distillation: {listed}."
                )
    return lines


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


def _number(value: float | None, digits: int = 1) -> str:
    return NONE if value is None else f"{value:.{digits}f}"


def markdown(columns: Mapping[str, Sequence[str]], *, left: int) -> str:
    """A Markdown table whose first ``left`` columns are aligned to the left, the others to the right."""
    rows = [list(columns), ["---"] * left + ["---:"] * (len(columns) - left), *zip(*columns.values())]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


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
