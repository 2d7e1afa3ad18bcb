"""COCO-Traffic: the images of COCO 2017 with traffic in them, and their annotations of 13 classes.

An image is kept if it has an annotation of one of nine traffic classes. Of its annotations those of 13 classes are
kept: the nine and person, parking meter, cat, dog. Images are not copied.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from detectron2.data.datasets import load_coco_json

from gkd_d2.data.datasets.coco import CocoFile

# COCO's ids and names; the new ids count from 1 in this order.
NAMES = {
    1: "person", 2: "bicycle", 3: "car", 4: "motorcycle", 6: "bus", 7: "train", 8: "truck", 10: "traffic light",
    11: "fire hydrant", 13: "stop sign", 14: "parking meter", 17: "cat", 18: "dog",
}  # fmt: skip
TRAFFIC_IDS = (2, 3, 4, 6, 7, 8, 10, 11, 13)
CLASS_SETS = {"thirteen": tuple(NAMES), "nine": TRAFFIC_IDS}
SPLITS = ("train", "val")


def class_names(classes: str) -> list[str]:
    """Names of the class set "thirteen" or "nine", in the order of the new ids."""
    return [NAMES[coco_id] for coco_id in CLASS_SETS[classes]]


def load_coco_traffic(
    json_file: str | os.PathLike, image_root: str | os.PathLike, name: str, classes: str
) -> list[dict[str, Any]]:
    """Check a file that tools/prepare_coco_traffic.py wrote and load it as Detectron2's standard records.

    Args:
        json_file: the annotations.
        image_root: the folder of COCO's images.
        name: of the registered dataset.
        classes: "thirteen" or "nine".

    Raises:
        FileNotFoundError: the file or the folder is missing; the message says what to do.
        ValueError: the file's content is wrong; the message names the file and the place in it.
    """
    check_coco_traffic(json_file, image_root, classes)
    file = CocoFile(json_file)
    categories = file.categories()
    if categories != dict(enumerate(class_names(classes), start=1)):
        raise ValueError(
            f"{json_file}: its categories are {', '.join(categories.values())}, not those of COCO-Traffic with "
            f"{classes} classes: write it by tools/prepare_coco_traffic.py --classes {classes}"
        )
    sizes = {image["id"]: (image["width"], image["height"]) for image in file.images()}
    for _ in file.annotations(sizes, categories):
        pass  # each is checked
    return load_coco_json(os.fspath(json_file), os.fspath(image_root), name)


def check_coco_traffic(json_file: str | os.PathLike, image_root: str | os.PathLike, classes: str) -> None:
    """Check cheaply that the files of COCO-Traffic are in place.

    Raises:
        FileNotFoundError: the annotations or the folder of images are missing; the message says what to do.
    """
    if not Path(image_root).is_dir():
        raise FileNotFoundError(
            f"there are no images of COCO 2017 at {image_root}: unpack COCO's archive of that name there "
            "(docs/datasets.md)"
        )
    if not Path(json_file).is_file():
        flag = "" if classes == "thirteen" else f" --classes {classes}"
        raise FileNotFoundError(
            f"there are no annotations of COCO-Traffic at {json_file}: write them by "
            f"`python tools/prepare_coco_traffic.py{flag}` (docs/datasets.md)"
        )
