"""Detectron2's COCOEvaluator for ground truth that Detectron2 loads but pycocotools can't evaluate as it is."""

from __future__ import annotations

import contextlib
import io
import logging
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_dict
from detectron2.evaluation import COCOEvaluator
from detectron2.utils.logger import log_first_n

from gkd_d2.data.contents import DatasetContents, read_contents
from gkd_d2.utils.text import counted


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


def check_coco_ground_truth(dataset: str, *, masks: bool, keypoints: bool) -> DatasetContents:
    """Check that a test set can be loaded and evaluated by :class:`CompletingCOCOEvaluator`.

    Args:
        dataset: a registered name.
        masks: whether the model predicts masks, MODEL.MASK_ON.
        keypoints: whether it predicts keypoints, MODEL.KEYPOINT_ON.

    Returns:
        What it holds.

    Raises:
        OSError: a file can't be read.
        ValueError: the dataset can't be loaded or evaluated; the message names the file and the place in it.
    """
    contents = read_contents(dataset, evaluate=True, masks=masks, keypoints=keypoints)
    if contents.class_names is None:
        raise ValueError(
            "it has no thing_classes in its metadata, which the evaluation needs: set them by "
            f"MetadataCatalog.get({dataset!r}).thing_classes = [...]"
        )
    if not MetadataCatalog.get(dataset).get("json_file"):
        try:
            convert_to_coco_dict(dataset)
        except Exception as error:
            raise ValueError(
                f"its records can't be converted to COCO's form for the evaluation: {type(error).__name__}: {error}"
            ) from error
    return contents
