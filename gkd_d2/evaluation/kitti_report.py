"""What is reported of the detections in KITTI images: the official metric and VOC's, by name and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tabulate import tabulate

from gkd_d2.data.datasets.kitti_labels import CLASSES, DIFFICULTIES
from gkd_d2.evaluation.kitti_metric import average_precision
from gkd_d2.evaluation.kitti_overlaps import Detections, GroundTruth
from gkd_d2.evaluation.voc_metric import voc_average_precision

VOC_AP = "AP50_voc"


def evaluate_images(
    ground_truth: Sequence[GroundTruth], detections: Sequence[Detections], *, voc_strict: bool = False
) -> dict[str, dict[str, Any]]:
    """Both metrics of the same images.

    Args:
        ground_truth: one an image.
        detections: of the same images, in the same order.
        voc_strict: as ``strict`` of :func:`gkd_d2.evaluation.voc_metric.voc_average_precision`.

    Returns:
        What :func:`gkd_d2.evaluation.kitti_metric.average_precision` returns, with VOC's average precision of each
        class beside its difficulties: ``{"Car": {"easy": ..., ..., "AP50_voc": percent}, ...}``.

    Raises:
        ValueError: the lists differ in length, a type is unknown, or a number is not finite.
    """
    official = average_precision(ground_truth, detections)
    voc = voc_average_precision(ground_truth, detections, strict=voc_strict)
    return {name: {**official[name], VOC_AP: voc[name]} for name in CLASSES}


def flat_metrics(result: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The metrics by one name each; the means over the classes come first, the headline ``AP_moderate`` at the front.

    Args:
        result: of :func:`evaluate_images`.
    """
    # Detectron2 prints only names without a hyphen, the means, in its summary.
    levels = ["moderate", *(level for level in DIFFICULTIES if level != "moderate")]
    means = {
        f"{prefix}_{level}": float(np.mean([result[name][level][points] for name in CLASSES]))
        for prefix, points in (("AP", "R40"), ("AP11", "R11"))
        for level in levels
    }
    means[f"m{VOC_AP}"] = float(np.mean([result[name][VOC_AP] for name in CLASSES]))
    single = {
        f"{name}-{level}-{points}": result[name][level][points]
        for name in CLASSES
        for level in DIFFICULTIES
        for points in ("R40", "R11")
    }
    return means | single | {f"{name}-{VOC_AP}": result[name][VOC_AP] for name in CLASSES}


def table(result: dict[str, dict[str, Any]], *, voc_strict: bool = False) -> str:
    """The metrics as text: a line a class and one for their mean.

    There is a column a difficulty and number of recall points, and one for VOC's metric.

    Args:
        result: of :func:`evaluate_images`.
        voc_strict: as it was given to :func:`evaluate_images`; the last column's name says it.
    """
    columns = [(level, points) for points in ("R40", "R11") for level in DIFFICULTIES]
    rows = [
        [name, *(result[name][level][points] for level, points in columns), result[name][VOC_AP]] for name in CLASSES
    ]
    rows.append(["mean", *(float(np.mean(column)) for column in list(zip(*rows))[1:])])
    voc = "AP50 VOC, strict" if voc_strict else "AP50 VOC"
    header = ["AP", *(f"{level} {points}" for level, points in columns), voc]
    return tabulate(rows, headers=header, tablefmt="pipe", floatfmt=".2f")
