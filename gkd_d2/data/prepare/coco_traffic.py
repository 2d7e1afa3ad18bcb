"""The annotations of COCO-Traffic, written from COCO's own."""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gkd_d2.data.datasets.coco import CocoFile, overhang
from gkd_d2.data.datasets.coco_traffic import CLASS_SETS, NAMES, TRAFFIC_IDS
from gkd_d2.utils.text import counted


@dataclass
class Summary:
    """What :func:`prepare_coco_traffic` wrote.

    Attributes:
        num_images: images kept.
        num_source_images: images of the source file.
        objects: kept annotations by class name, crowds included.
        images: images by class name.
        num_crowds: kept annotations with iscrowd 1.
        num_without_area: kept boxes of width or height 0, which Detectron2 leaves out of training.
        num_clipped: kept boxes that stick out of their image, which Detectron2 clips.
    """

    num_images: int = 0
    num_source_images: int = 0
    objects: Counter = field(default_factory=Counter)
    images: Counter = field(default_factory=Counter)
    num_crowds: int = 0
    num_without_area: int = 0
    num_clipped: int = 0

    def text(self) -> str:
        """The counts, a line a class."""
        lines = [
            f"images: {self.num_images} of {self.num_source_images}",
            *(
                f"  {name}: {counted(self.objects[name], 'object')} in {counted(self.images[name], 'image')}"
                for name in self.objects
            ),
            f"objects: {self.objects.total()}, of which {self.num_crowds} are crowd regions",
            f"boxes without area, left out of training by Detectron2: {self.num_without_area}",
            f"boxes that stick out of their image, clipped by Detectron2: {self.num_clipped}",
        ]
        return "\n".join(lines)


def prepare_coco_traffic(source: str | os.PathLike, target: str | os.PathLike, classes: str = "thirteen") -> Summary:
    """Write the annotations of COCO-Traffic. The same source gives the same bytes.

    The source is streamed; what is held are the kept annotations as text.

    Args:
        source: COCO's own instances_train2017.json or instances_val2017.json.
        target: the file to write, beside its place at first and then moved there.
        classes: "thirteen" or "nine"; which images are kept does not depend on it.

    Returns:
        Counts of what was written.

    Raises:
        OSError: a file can't be read or written.
        ValueError: the source is no annotation file of COCO 2017; the message names the file and the place in it.
    """
    kept_ids = CLASS_SETS[classes]
    file = CocoFile(source)
    categories = file.categories()
    for coco_id in NAMES:
        if categories.get(coco_id) != NAMES[coco_id]:
            raise ValueError(
                f"{source}: category {coco_id} is {categories.get(coco_id)!r}, in COCO 2017 it is {NAMES[coco_id]!r}"
            )
    images = list(file.images())
    sizes = {image["id"]: (image["width"], image["height"]) for image in images}
    new_ids = {coco_id: new_id for new_id, coco_id in enumerate(kept_ids, start=1)}

    with_traffic: set[int] = set()
    candidates: list[tuple[dict[str, Any], str]] = []
    for annotation in file.annotations(sizes, categories):
        coco_id = annotation["category_id"]
        if coco_id in TRAFFIC_IDS:
            with_traffic.add(annotation["image_id"])
        if coco_id in new_ids:
            # Text takes a tenth of the memory of lists of numbers; the few fields that are counted stay apart.
            counted = {key: annotation[key] for key in ("image_id", "category_id", "bbox", "iscrowd")}
            annotation["category_id"] = new_ids[coco_id]
            candidates.append((counted, _line(annotation)))
    if not with_traffic:
        raise ValueError(f"{source}: no image has an object of the traffic classes")

    kept_images = [image for image in images if image["id"] in with_traffic]
    kept = [(counted, line) for counted, line in candidates if counted["image_id"] in with_traffic]
    sections = {
        "info": _line({"description": f"COCO-Traffic, {classes} classes, from {Path(source).name}"}),
        "licenses": _array(map(_line, file.licenses())),
        "images": _array(map(_line, kept_images)),
        "annotations": _array(line for _, line in kept),
        "categories": _array(_line({"id": new_ids[i], "name": NAMES[i], "coco_id": i}) for i in kept_ids),
    }
    _write(Path(target), sections)
    return _summarise(images, kept_images, kept_ids, [counted for counted, _ in kept], sizes)


def _line(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _array(lines) -> str:
    return "[\n" + ",\n".join(lines) + "\n]"


def _write(target: Path, sections: dict[str, str]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            for number, (key, text) in enumerate(sections.items()):
                file.write("{" if number == 0 else ",\n")
                file.write(f'"{key}":')
                file.write(text)
            file.write("}\n")
        temporary.replace(target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def _summarise(
    images: list[dict],
    kept_images: list[dict],
    kept_ids: tuple[int, ...],
    kept: list[dict[str, Any]],
    sizes: dict[int, tuple[int, int]],
) -> Summary:
    summary = Summary(num_images=len(kept_images), num_source_images=len(images))
    # Every class is listed, in the order of its id, even one without objects.
    summary.objects.update({NAMES[coco_id]: 0 for coco_id in kept_ids})
    summary.images.update({NAMES[coco_id]: 0 for coco_id in kept_ids})
    summary.objects.update(NAMES[annotation["category_id"]] for annotation in kept)
    pairs = {(annotation["image_id"], annotation["category_id"]) for annotation in kept}
    summary.images.update(NAMES[coco_id] for _, coco_id in pairs)
    summary.num_crowds = sum(annotation["iscrowd"] for annotation in kept)
    summary.num_without_area = sum(annotation["bbox"][2] * annotation["bbox"][3] == 0 for annotation in kept)
    summary.num_clipped = sum(overhang(a["bbox"], sizes[a["image_id"]]) > 0 for a in kept)
    return summary
