"""Small datasets in COCO's form, registered as users register theirs."""

from __future__ import annotations

import copy
import json
from pathlib import Path

from detectron2.data.datasets import register_coco_instances
from PIL import Image

# Two objects in the first of two images, of 96 x 64 pixels.
COCO = {
    "info": {},
    "images": [{"id": number, "file_name": f"{number}.png", "width": 96, "height": 64} for number in (1, 2)],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 40, 30], "area": 1000, "iscrowd": 0},
        {"id": 2, "image_id": 1, "category_id": 2, "bbox": [60, 10, 20, 40], "area": 700, "iscrowd": 0},
    ],
    "categories": [{"id": 1, "name": "car"}, {"id": 2, "name": "dog"}],
}


def write_coco(folder: Path, name: str, change=None, classes: tuple[str, ...] = ("car", "dog"), **metadata) -> Path:
    """Register a dataset of :data:`COCO`; its annotation file is written into ``folder``, beside its images.

    Args:
        folder: exists.
        name: of the dataset.
        change: applied to a copy of the content.
        classes: names of the categories, numbered from 1.
        metadata: given to register_coco_instances.

    Returns:
        The annotation file.
    """
    content = copy.deepcopy(COCO)
    content["categories"] = [{"id": number, "name": name} for number, name in enumerate(classes, start=1)]
    if change is not None:
        change(content)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content))
    for image in content.get("images", ()):
        Image.new("RGB", (96, 64)).save(folder / image["file_name"])
    register_coco_instances(name, metadata, str(path), str(folder))
    return path
