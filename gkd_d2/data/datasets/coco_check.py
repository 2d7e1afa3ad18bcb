"""Whether Detectron2 can train with an annotation file of COCO's form, or evaluate on it.

Less is required here than in :mod:`gkd_d2.data.datasets.coco`: users' files are as other tools have written them, and
Detectron2 does without much of COCO's form.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from typing import Any

from gkd_d2.data.datasets.coco import in_order_of_ids, sections

_REQUIRED = {
    "images": ("id",),
    "categories": ("id", "name"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
}
_LOADED = ("file_name", "width", "height")  # of an image


def check_coco_file(
    path: str | os.PathLike, *, load: bool, evaluate: bool, masks: bool, keypoints: bool
) -> tuple[dict[Any, str], list[str]]:
    """Check what training needs of a file, or training and evaluation, in one pass.

    One of the file's arrays is in memory at a time; Detectron2's own loader holds the whole file.

    Args:
        path: the file.
        load: whether Detectron2's own ``load_coco_json`` loads it, or a loader of the user's own.
        evaluate: whether its objects are ground truth of an evaluation by
            :class:`gkd_d2.evaluation.CompletingCOCOEvaluator`.
        masks: whether the model predicts masks, MODEL.MASK_ON.
        keypoints: whether it predicts keypoints, MODEL.KEYPOINT_ON.

    Returns:
        The names of the categories by id, in the order of the ids, which is that of Detectron2's contiguous ids; and
        the ``file_name`` of the first and of the last image, where ``load`` is True.

    Raises:
        OSError: the file can't be read.
        ValueError: it can't be used; the message begins with the file and names the place in it.
    """
    ids: dict[str, set] = {key: set() for key in _REQUIRED}
    names: dict[Any, str] = {}
    file_names: list[str] = []
    categories_used: dict[Any, str] = {}  # id -> the place where it is used first
    images_used = set()
    for key, elements in sections(path):
        if key not in _REQUIRED:
            continue
        if not isinstance(elements, list):
            raise ValueError(f"{path}: {key} is not an array")
        for index, element in enumerate(elements):
            where = f"{path}: {key}[{index}]"
            _check_element(element, where, _REQUIRED[key] + (_LOADED if load and key == "images" else ()))
            if element["id"] in ids[key] and not (key == "annotations" and _may_repeat(path)):
                raise ValueError(f"{where}: the id {element['id']!r} stands twice among the {key}")
            ids[key].add(element["id"])
            if key == "categories":
                names[element["id"]] = str(element["name"])
            elif key == "annotations":
                where += f" (id {element['id']})"
                if load and element.get("ignore"):
                    raise ValueError(f"{where}: Detectron2 does not support ignore, which is {element['ignore']!r}")
                _check_annotation(element, where, evaluate=evaluate, masks=masks, keypoints=keypoints)
                categories_used.setdefault(element["category_id"], where)
                images_used.add(element["image_id"])
        if load and key == "images" and elements:
            file_names = [str(elements[position]["file_name"]) for position in (0, -1)]
    for key in ("images", "categories"):
        if not ids[key]:
            raise ValueError(f"{path}: it has no {key}")
    for category, where in categories_used.items():
        if category not in names:
            raise ValueError(f"{where}: category_id is {category!r}, which is the id of none of the file's categories")
    # Detectron2 warns of single ones, which are left out: they are common in files of a part of a dataset.
    if images_used and images_used.isdisjoint(ids["images"]):
        raise ValueError(
            f"{path}: no annotation has the id of one of the file's images: the first image_id is "
            f"{_first(images_used)}, the first id of an image {_first(ids['images'])}"
        )
    return in_order_of_ids(names, path), file_names


def _check_element(element: object, where: str, required: tuple[str, ...]) -> None:
    if not isinstance(element, dict):
        raise ValueError(f"{where} is not an object")
    missing = [name for name in required if name not in element]
    if missing:
        raise ValueError(f"{where} has no {' and no '.join(missing)}")
    for name in ("id", "image_id", "category_id"):
        if name in element and not isinstance(element[name], (int, float, str)):
            raise ValueError(f"{where}: {name} is {element[name]!r}; it must be a number or text")


def _check_annotation(annotation: dict[str, Any], where: str, *, evaluate: bool, masks: bool, keypoints: bool) -> None:
    bbox = annotation["bbox"]
    if not (isinstance(bbox, list) and len(bbox) == 4 and all(_is_finite(number) for number in bbox)):
        raise ValueError(f"{where}: bbox is {bbox!r}; it must be 4 finite numbers: x, y, width, height")
    if masks and not annotation.get("segmentation") and (evaluate or not annotation.get("iscrowd")):
        raise ValueError(f"{where} has no segmentation, which is needed as MODEL.MASK_ON is True")
    if not evaluate:
        return
    # Absent ones are supplied, as are those that are null.
    if annotation.get("iscrowd") not in (None, 0, 1):
        raise ValueError(f"{where}: iscrowd is {annotation['iscrowd']!r}; it must be 0 or 1")
    if annotation.get("area") is not None and not _is_finite(annotation["area"]):
        raise ValueError(f"{where}: area is {annotation['area']!r}; it must be a finite number")
    if keypoints and not annotation.get("keypoints"):
        raise ValueError(f"{where} has no keypoints, which the evaluation needs as MODEL.KEYPOINT_ON is True")


def _may_repeat(path: str | os.PathLike) -> bool:
    """Detectron2 allows it to COCO 2014's minival files alone, by their names."""
    return "minival" in os.fspath(path)


def _first(values: Iterable) -> str:
    return repr(next(iter(values)))


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
