"""Annotations of the form and the ids of COCO 2017's."""

from __future__ import annotations

import json

NAMES = {
    1: "person", 2: "bicycle", 3: "car", 4: "motorcycle", 5: "airplane", 6: "bus", 7: "train", 8: "truck", 9: "boat",
    10: "traffic light", 11: "fire hydrant", 13: "stop sign", 14: "parking meter", 15: "bench", 17: "cat", 18: "dog",
}  # fmt: skip


def annotation(number, image, category, bbox=(1.25, 2, 30, 40), **other):
    return {
        "id": number, "image_id": image, "category_id": category, "bbox": list(bbox), "area": bbox[2] * bbox[3],
        "iscrowd": 0, "segmentation": [[1.25, 2, 31.25, 2, 31.25, 42]],
    } | other  # fmt: skip


def coco(annotations, num_images=6):
    return {
        "info": {"description": "toy"},
        "licenses": [{"id": 1, "name": "a licence"}],
        "images": [
            {"id": i, "file_name": f"{i:012d}.jpg", "width": 100, "height": 80, "license": 1}
            for i in range(num_images, 0, -1)
        ],
        "annotations": annotations,
        "categories": [{"id": i, "name": name, "supercategory": "s"} for i, name in NAMES.items()],
    }


DATA = coco(
    [
        annotation(10, 1, 3),  # image 1: a car, a person and a bench
        annotation(11, 1, 1),
        annotation(12, 1, 15),
        annotation(13, 2, 1),  # image 2: a person and a dog only
        annotation(14, 2, 18),
        annotation(15, 3, 13, bbox=(50, 60, 50.5, 20)),  # image 3: a stop sign out of its right side
        annotation(
            16, 4, 7, iscrowd=1, segmentation={"size": [80, 100], "counts": [10, 20, 7970]}
        ),  # image 4: a crowd alone
        annotation(17, 4, 17, bbox=(3, 3, 0, 5)),
        annotation(18, 5, 5),  # image 5: an airplane; image 6: nothing
    ]
)


def write_json(path, data):
    """Write a value, or a text as it is; returns where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path
