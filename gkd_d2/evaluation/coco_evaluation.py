"""Detectron2's COCOEvaluator for ground truth that Detectron2 loads but pycocotools can't evaluate as it is."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_dict
from detectron2.evaluation import COCOEvaluator
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import log_first_n

from gkd_d2.data.classes import class_names
from gkd_d2.data.coco import category_names, elements
from gkd_d2.text import counted

_REQUIRED = {"images": ("id",), "categories": ("id", "name"), "annotations": ("id", "image_id", "category_id", "bbox")}


class CompletingCOCOEvaluator(COCOEvaluator):
    """COCOEvaluator that supplies what pycocotools requires and training does without.

    An annotation without ``iscrowd`` is not a crowd region, one without ``area`` has the area of its box, and one with
    ``keypoints`` but without ``num_keypoints`` has as many as are labelled. Ids that are not positive integers are
    replaced: pycocotools counts an object with the id 0 as missed even where it was found. The file itself is not
    changed; a warning names it and what was supplied.
    """

    def __init__(self, dataset_name: str, *args, **kwargs) -> None:
        """Takes the arguments of COCOEvaluator."""
        super().__init__(dataset_name, *args, **kwargs)
        dataset = self._coco_api.dataset
        # Required by some versions of pycocotools only.
        dataset.setdefault("info", {})
        supplied = _complete(dataset.get("annotations", []))
        if supplied:
            with contextlib.redirect_stdout(io.StringIO()):
                self._coco_api.createIndex()
            log_first_n(
                logging.WARNING,
                f"{self._metadata.json_file}, the ground truth of {dataset_name}, is completed for the evaluation: "
                f"{'; '.join(supplied)}. The file itself is not changed",
                key="message",
            )


def _complete(annotations: list[dict[str, Any]]) -> list[str]:
    """Supply in place what is missing; return what that was, in words."""
    supplied = []
    without = [annotation for annotation in annotations if annotation.get("iscrowd") is None]
    for annotation in without:
        annotation["iscrowd"] = 0
    if without:
        supplied.append(f"{counted(len(without), 'annotation')} without iscrowd got 0")
    without = [annotation for annotation in annotations if annotation.get("area") is None]
    for annotation in without:
        annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
    if without:
        supplied.append(f"{counted(len(without), 'annotation')} without area got that of the box")
    without = [a for a in annotations if a.get("keypoints") and a.get("num_keypoints") is None]
    for annotation in without:
        annotation["num_keypoints"] = sum(visibility > 0 for visibility in annotation["keypoints"][2::3])
    if without:
        supplied.append(f"{counted(len(without), 'annotation')} without num_keypoints got the number of those labelled")
    if not all(isinstance(annotation["id"], int) and annotation["id"] > 0 for annotation in annotations):
        for number, annotation in enumerate(annotations, start=1):
            annotation["id"] = number
        supplied.append("the annotations were numbered from 1, as not all ids are positive integers")
    return supplied


def check_coco_ground_truth(dataset: str, *, masks: bool, keypoints: bool) -> None:
    """Check that a test set can be loaded and evaluated by :class:`CompletingCOCOEvaluator`.

    The dataset is loaded, and its annotation file is read once.

    Args:
        dataset: a registered name.
        masks: whether the model predicts masks, MODEL.MASK_ON.
        keypoints: whether it predicts keypoints, MODEL.KEYPOINT_ON.

    Raises:
        OSError: the annotation file can't be read.
        ValueError: the dataset can't be loaded or evaluated; the message names the file and the place in it.
    """
    metadata = MetadataCatalog.get(dataset)
    json_file = metadata.get("json_file")
    path = PathManager.get_local_path(os.fspath(json_file)) if json_file else None
    if path is not None:
        _check_file(path, masks=masks, keypoints=keypoints)
    # A loader of the user's own may raise anything, and Detectron2's reports by assertions.
    try:
        num_images = len(DatasetCatalog.get(dataset))
    except Exception as error:
        raise ValueError(f"loading it fails with {type(error).__name__}: {error}") from error
    if num_images == 0:
        raise ValueError("it has no images")
    names = class_names(dataset)
    if names is None:
        raise ValueError(
            "it has no thing_classes in its metadata, which the evaluation needs: set them by "
            f"MetadataCatalog.get({dataset!r}).thing_classes = [...]"
        )
    if path is None:
        try:
            convert_to_coco_dict(dataset)
        except Exception as error:
            raise ValueError(
                f"its records can't be converted to COCO's form for the evaluation: {type(error).__name__}: {error}"
            ) from error
    elif len(category_names(path)) != len(names):
        raise ValueError(
            f"it has {counted(len(names), 'class', 'classes')} in its metadata, but {path} has "
            f"{counted(len(category_names(path)), 'category', 'categories')}: make them equal, or leave json_file out "
            "of the metadata to have the loaded records evaluated instead"
        )


def _check_file(path: str, *, masks: bool, keypoints: bool) -> None:
    for key, required in _REQUIRED.items():
        for index, element in enumerate(elements(path, key)):
            where = f"{path}: {key}[{index}]"
            if not isinstance(element, dict):
                raise ValueError(f"{where} is not an object")
            missing = [name for name in required if name not in element]
            if missing:
                raise ValueError(f"{where} has no {' and no '.join(missing)}")
            if key == "annotations":
                _check_annotation(element, f"{where} (id {element['id']})", masks=masks, keypoints=keypoints)


def _check_annotation(annotation: dict[str, Any], where: str, *, masks: bool, keypoints: bool) -> None:
    bbox = annotation["bbox"]
    if not (isinstance(bbox, list) and len(bbox) == 4 and all(_is_finite(number) for number in bbox)):
        raise ValueError(f"{where}: bbox is {bbox!r}; it must be 4 finite numbers: x, y, width, height")
    # Absent ones are supplied, as are those that are null.
    if annotation.get("iscrowd") not in (None, 0, 1):
        raise ValueError(f"{where}: iscrowd is {annotation['iscrowd']!r}; it must be 0 or 1")
    if annotation.get("area") is not None and not _is_finite(annotation["area"]):
        raise ValueError(f"{where}: area is {annotation['area']!r}; it must be a finite number")
    for wanted, key, field in ((masks, "MASK_ON", "segmentation"), (keypoints, "KEYPOINT_ON", "keypoints")):
        if wanted and not annotation.get(field):
            raise ValueError(f"{where} has no {field}, which the evaluation needs as MODEL.{key} is True")


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
