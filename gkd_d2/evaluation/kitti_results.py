"""Detections as text files in KITTI's result format, and the metrics of two folders."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from gkd_d2.data.datasets.kitti_labels import LABEL_FIELDS, parse_number, parse_type, read_labels, read_lines
from gkd_d2.evaluation.kitti_overlaps import Detections, GroundTruth
from gkd_d2.evaluation.kitti_report import evaluate_images
from gkd_d2.utils.text import counted

_FIELDS = (*LABEL_FIELDS, "score")


def read_results(path: Path) -> Detections:
    """Read and check one image's detections in KITTI's result format.

    A line has the 15 fields of a label and a score. Type (letters of any case), box and score are used, the other
    fields are only checked to be numbers. Blank lines are skipped.

    Args:
        path: the file; without detections it is empty.

    Returns:
        The detections in the file's order.

    Raises:
        OSError: the file can't be read.
        ValueError: its content is wrong; the message begins with the file and the line.
    """
    types, boxes, scores = [], [], []
    for number, line in enumerate(read_lines(path), start=1):
        where, fields = f"{path}:{number}", line.split()
        if not fields:
            continue
        if len(fields) != len(_FIELDS):
            hint = "; 15 fields are a label without a score" if len(fields) == 15 else ""
            raise ValueError(
                f"{where}: {counted(len(fields), 'field')}, a KITTI result has {len(_FIELDS)}{hint}: {line!r}"
            )
        types.append(parse_type(fields[0], where, any_case=True))
        numbers = {name: parse_number(text, name, where) for name, text in zip(_FIELDS[1:], fields[1:])}
        box = [numbers[side] for side in ("left", "top", "right", "bottom")]
        if box[2] < box[0] or box[3] < box[1]:
            shown = "left {:g}, top {:g}, right {:g}, bottom {:g}".format(*box)
            raise ValueError(f"{where}: the box ends before it begins: {shown}")
        boxes.append(box)
        scores.append(numbers["score"])
    return Detections(types, np.array(boxes, dtype=np.float64).reshape(-1, 4), np.array(scores, dtype=np.float64))


def write_results(path: Path, detections: Detections) -> None:
    """Write one image's detections in KITTI's result format, with all digits: they read back equal.

    What a 2D detector does not know has the format's value for unknown.

    Args:
        path: the file; its folder must exist. It is written beside its place and then moved there.
        detections: of one image.
    """
    lines = []
    for kind, box, score in zip(detections.types, detections.boxes.tolist(), detections.scores.tolist()):
        corners = " ".join(map(repr, box))
        lines.append(f"{kind} -1 -1 -10 {corners} -1 -1 -1 -1000 -1000 -1000 -10 {score!r}\n")
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text("".join(lines), encoding="utf-8")
        temporary.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def evaluate_folders(
    labels: str | os.PathLike,
    results: str | os.PathLike,
    *,
    image_ids: Iterable[str] | None = None,
    missing_as_empty: bool = False,
    voc_strict: bool = False,
) -> tuple[dict[str, dict[str, Any]], int]:
    """KITTI's official metric, and VOC's, of a folder of result files.

    Args:
        labels: folder of KITTI's label_2 form, one ID.txt an image.
        results: folder of result files, one ID.txt an image; files of other suffixes are left alone.
        image_ids: of the images to evaluate (default: all that have a file in one of the folders).
        missing_as_empty: count images without a result file as images without detections; else they do not count.
        voc_strict: as ``strict`` of :func:`gkd_d2.evaluation.voc_metric.voc_average_precision`.

    Returns:
        What :func:`gkd_d2.evaluation.kitti_report.evaluate_images` returns, and the number of images that counted.

    Raises:
        FileNotFoundError: a folder, or the label file of an image, is missing, or there is no result file.
        ValueError: a file's content is wrong; the message begins with the file and the line.
    """
    labels, results = Path(labels), Path(results)
    missing = images_without_result(labels, results, image_ids)
    wanted = _image_ids(results) | missing if image_ids is None else set(image_ids)
    if wanted == missing:
        raise FileNotFoundError(f"{results} holds no result file, ID.txt of an image each, of the images to evaluate")
    counting = sorted(wanted if missing_as_empty else wanted - missing)
    ground_truth, detections = [], []
    for image_id in counting:
        path, label_path = (folder / f"{image_id}.txt" for folder in (results, labels))
        if not label_path.is_file():
            raise FileNotFoundError(f"{path}: its image has no labels, {label_path} does not exist")
        detections.append(Detections([], np.zeros((0, 4)), np.zeros(0)) if image_id in missing else read_results(path))
        ground_truth.append(GroundTruth.from_objects(read_labels(label_path, any_case=True)))
    return evaluate_images(ground_truth, detections, voc_strict=voc_strict), len(counting)


def images_without_result(
    labels: str | os.PathLike, results: str | os.PathLike, image_ids: Iterable[str] | None = None
) -> set[str]:
    """Ids of the images that have no result file, among those asked for or, by default, those with a label file.

    Args:
        labels, results, image_ids: as of :func:`evaluate_folders`.

    Raises:
        FileNotFoundError: a folder is missing.
    """
    for what, folder in (("label", labels), ("result", results)):
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"there is no folder of {what} files at {folder}")
    return (_image_ids(labels) if image_ids is None else set(image_ids)) - _image_ids(results)


def _image_ids(folder: str | os.PathLike) -> set[str]:
    return {path.stem for path in Path(folder).iterdir() if path.suffix == ".txt"}
