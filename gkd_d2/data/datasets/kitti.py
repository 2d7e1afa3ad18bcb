"""The KITTI object detection benchmark, and any folder of its form, as Detectron2 dataset records.

The folder is read as KITTI ships it (A. Geiger, P. Lenz, R. Urtasun, CVPR 2012)::

    ROOT/training/image_2/ID.png             left colour images: .png, .jpg or .jpeg, in letters of any case
    ROOT/training/label_2/ID.txt             one object a line, 15 fields
    ROOT/ImageSets/train.txt, val.txt        one ID a line; both or neither
    ROOT/testing/image_2/ID.png              images without labels, for the benchmark's server; optional

Without lists the ids are split 8:2 by a hash of the id, the same on every machine.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from detectron2.structures import BoxMode
from PIL import Image

from gkd_d2.data.datasets.kitti_labels import CLASSES, IGNORED_TYPES, read_labels, read_lines

logger = logging.getLogger(__name__)

SPLITS = ("train", "val")

# In letters of any case.
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
_OF_IMAGES = ", ".join(IMAGE_SUFFIXES[:-1]) + f" or {IMAGE_SUFFIXES[-1]}"
_TESTING = Path("testing", "image_2")
# EXIF orientations that lay the picture on its side; Detectron2 turns it before anything else.
_EXIF_ORIENTATION, _SIDEWAYS = 0x0112, (5, 6, 7, 8)


class _ListedId(NamedTuple):
    """An image id and the place that names it: "list file:line", or None for the split by hash."""

    image_id: str
    source: str | None


def load_kitti(root: str | os.PathLike, split: str) -> list[dict[str, Any]]:
    """Read one split of a folder of KITTI's form into Detectron2's standard dataset records.

    Each record holds ``file_name``, ``image_id`` (str, the KITTI id), ``height``, ``width``, and

    * ``annotations``: boxes as XYXY_ABS, float pixels, in KITTI's own coordinates (0-based). An object of one of
      ``CLASSES`` is one annotation with ``iscrowd`` 0. An object of one of ``IGNORED_TYPES`` is an ignored region:
      one annotation with ``iscrowd`` 1 for *every* class, because COCO's evaluation ignores detections per class.
      Detectron2's mapper leaves annotations with ``iscrowd`` 1 out of training.
    * ``kitti_objects``: every line of the label file once and in its order, as
      :func:`gkd_d2.data.datasets.kitti_labels.parse_label_line` returns it, with the type, truncation and occlusion
      that KITTI's official metric needs.

    Args:
        root: the folder that holds ``training`` and, optionally, ``ImageSets``.
        split: "train" or "val".

    Returns:
        The records in the order of the list; by id where the split is by hash.

    Raises:
        FileNotFoundError: the folder, an image, a label file or one of the two lists is missing.
        ValueError: a file's content is wrong; the message begins with the file and, for text files, the line.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; KITTI's labelled images have the splits {', '.join(SPLITS)}")
    root = Path(root)
    check_kitti_root(root)
    images = _images_by_id(root / "training" / "image_2")
    splits = _read_splits(root)
    records = [_read_record(root, entry, images) for entry in splits[split]]
    _log_summary(
        root, split, records, num_unlisted=len(images.keys() - {e.image_id for s in splits.values() for e in s})
    )
    return records


def load_kitti_testing(root: str | os.PathLike) -> list[dict[str, Any]]:
    """Read the benchmark's testing images, which have no labels, into Detectron2's standard dataset records.

    Args:
        root: the folder that holds ``testing``.

    Returns:
        Records with ``file_name``, ``image_id``, ``height`` and ``width``, by id.

    Raises:
        FileNotFoundError: there are no testing images.
        ValueError: an id has two images, or a file is no image; the message begins with the file.
    """
    root = Path(root)
    check_kitti_testing(root)
    records = []
    for image_id, files in _images_by_id(root / _TESTING).items():
        if len(files) > 1:
            raise ValueError(f"{files[0]}: its id has two images, keep one: {', '.join(map(str, files))}")
        width, height = image_size(files[0])
        records.append({"file_name": str(files[0]), "image_id": image_id, "height": height, "width": width})
    return records


def check_kitti_testing(root: str | os.PathLike) -> None:
    """Check cheaply that testing images are there.

    Args:
        root: the folder that holds ``testing``.

    Raises:
        FileNotFoundError: the folder is missing or empty.
    """
    folder = Path(root) / _TESTING
    if not folder.is_dir() or not _holds_images(folder):
        raise FileNotFoundError(
            f"{folder} holds no {_OF_IMAGES} file: put there the testing images of KITTI's archive "
            "of left colour images (docs/datasets.md)"
        )


def check_kitti_root(root: str | os.PathLike) -> None:
    """Check cheaply, before any model is built, that a folder of KITTI's form is there. No file's content is read.

    Args:
        root: the folder that holds ``training`` and, optionally, ``ImageSets``.

    Raises:
        FileNotFoundError: a folder is missing or empty, or only one of the two lists exists. The message says what
            belongs where and how to get data.
    """
    root = Path(root)
    if not root.is_dir():
        raise _no_dataset(root, "the folder does not exist")
    for folder in ("training/image_2", "training/label_2"):
        if not (root / folder).is_dir():
            raise _no_dataset(root, f"its folder {folder} does not exist")
    if not _holds_images(root / "training/image_2"):
        raise _no_dataset(root, f"its folder training/image_2 holds no {_OF_IMAGES} file")
    if not any(name.endswith(".txt") for name in _names_in(root / "training/label_2")):
        raise _no_dataset(root, "its folder training/label_2 holds no .txt file")
    missing = [path for path in _list_paths(root).values() if not path.is_file()]
    if len(missing) == 1:
        raise FileNotFoundError(
            f"{missing[0]} is missing, though the other list is there. Add it, or remove the other list too "
            "to split the images 8:2 by a hash of their ids"
        )


def _no_dataset(root: Path, problem: str) -> FileNotFoundError:
    datasets = os.environ.get("DETECTRON2_DATASETS")
    now = f"it is {datasets!r}" if datasets else "it is not set, so ./datasets is used"
    return FileNotFoundError(
        f"no KITTI dataset at {root}: {problem}.\n"
        "Put there the left colour images and the training labels of the KITTI object detection benchmark "
        "(docs/datasets.md): training/image_2/*.png, .jpg or .jpeg, training/label_2/*.txt and, optionally, "
        "ImageSets/train.txt and val.txt.\n"
        f"The built-in datasets are looked for below the environment variable DETECTRON2_DATASETS; {now}.\n"
        "To start without a download, make toy data: python tools/make_toy_kitti.py, "
        "datasets toy_kitti_train and toy_kitti_val."
    )


def _list_paths(root: Path) -> dict[str, Path]:
    return {split: root / "ImageSets" / f"{split}.txt" for split in SPLITS}


def _names_in(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries]


def _holds_images(folder: Path) -> bool:
    return any(name.lower().endswith(IMAGE_SUFFIXES) for name in _names_in(folder))


def _images_by_id(folder: Path) -> dict[str, list[Path]]:
    images: dict[str, list[Path]] = {}
    for name in sorted(_names_in(folder)):
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in IMAGE_SUFFIXES:
            images.setdefault(stem, []).append(folder / name)
    return images


def _read_splits(root: Path) -> dict[str, list[_ListedId]]:
    paths = _list_paths(root)
    if paths["train"].is_file():
        return _read_lists(paths)
    splits = split_folder(root)
    logger.info(
        "%s has no train.txt and val.txt: its images are split 8:2 by a hash of their ids. Neighbouring frames of one "
        "drive may fall in both parts; for numbers to publish, use a published split.",
        paths["train"].parent,
    )
    return {split: [_ListedId(image_id, None) for image_id in ids] for split, ids in splits.items()}


def split_folder(root: str | os.PathLike) -> dict[str, list[str]]:
    """The 8:2 split by :func:`split_by_hash` of all ids that a folder of KITTI's form has images or labels of.

    An image without a label file, or the reverse, is found when the split is loaded.

    Args:
        root: the folder that holds ``training``.

    Returns:
        As :func:`split_by_hash`.

    Raises:
        ValueError: the folder has so few images that a part would be empty.
    """
    training = Path(root) / "training"
    stems = {os.path.splitext(name) for name in _names_in(training / "label_2")}
    images = _images_by_id(training / "image_2")
    splits = split_by_hash(images.keys() | {stem for stem, suffix in stems if suffix == ".txt"})
    for split, ids in splits.items():
        if not ids:
            raise ValueError(
                f"{root} has too few images for an 8:2 split, {len(images)}: {split} would be empty. Add images, or "
                f"write {root}/ImageSets/train.txt and val.txt yourself"
            )
    return splits


def split_by_hash(image_ids: Iterable[str]) -> dict[str, list[str]]:
    """Split ids 8:2 by the rank of their SHA-256 hash: no seed, the same on every machine.

    Args:
        image_ids: distinct ids (str), in any order.

    Returns:
        ``{"train": ids, "val": ids}``, each sorted; train has floor(0.8 * n) of the n ids.
    """
    ranked = sorted(image_ids, key=lambda image_id: hashlib.sha256(image_id.encode()).digest())
    num_train = len(ranked) * 8 // 10
    return {"train": sorted(ranked[:num_train]), "val": sorted(ranked[num_train:])}


def _read_lists(paths: dict[str, Path]) -> dict[str, list[_ListedId]]:
    splits: dict[str, list[_ListedId]] = {}
    seen: dict[str, str] = {}
    for split, path in paths.items():
        splits[split] = []
        for number, line in enumerate(read_lines(path), start=1):
            source, image_id = f"{path}:{number}", line.strip()
            if not image_id:
                raise ValueError(f"{source}: a blank line; one image id a line is expected")
            if image_id in seen:
                raise ValueError(
                    f"{source}: id {image_id!r} is listed already at {seen[image_id]}; list an image once, in one split"
                )
            seen[image_id] = source
            splits[split].append(_ListedId(image_id, source))
        if not splits[split]:
            raise ValueError(f"{path}: the list is empty")
    return splits


def _read_record(root: Path, entry: _ListedId, images: dict[str, list[Path]]) -> dict[str, Any]:
    image_id = entry.image_id
    prefix = f"{entry.source}: " if entry.source else ""
    files = images.get(image_id, [])
    label_path = root / "training" / "label_2" / f"{image_id}.txt"
    if not files:
        missing = root / "training" / "image_2" / image_id
        raise FileNotFoundError(f"{prefix}id {image_id!r} has no image: there is no {missing} with {_OF_IMAGES}")
    if len(files) > 1:
        raise ValueError(f"{prefix}id {image_id!r} has two images, keep one: {', '.join(map(str, files))}")
    if not label_path.is_file():
        raise FileNotFoundError(
            f"{prefix}id {image_id!r} has no labels: {label_path} does not exist (for an image without objects the "
            "file is empty)"
        )
    width, height = image_size(files[0])
    objects = read_labels(label_path, (width, height))
    return {
        "file_name": str(files[0]),
        "image_id": image_id,
        "height": height,
        "width": width,
        "annotations": [annotation for obj in objects for annotation in _annotations(obj)],
        "kitti_objects": objects,
    }


def image_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels as Detectron2 will see the image: turned as its EXIF orientation says.

    Only the header is read.

    Raises:
        ValueError: the file is no image that Pillow knows; the message begins with the file.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            # A PNG is decoded whole in search of EXIF data after its pixels, where hardly any has them.
            exif = {} if image.format == "PNG" and "exif" not in image.info else image.getexif()
            sideways = exif.get(_EXIF_ORIENTATION) in _SIDEWAYS
    # Pillow's readers of the many formats raise errors of many kinds on damaged files.
    except Exception as error:
        raise ValueError(f"{path}: not a readable image: {error}") from error
    return (height, width) if sideways else (width, height)


def _annotations(obj: dict[str, Any]) -> list[dict[str, Any]]:
    ignored = obj["type"] in IGNORED_TYPES
    category_ids = range(len(CLASSES)) if ignored else [CLASSES.index(obj["type"])]
    return [
        {
            "bbox": list(obj["bbox"]),
            "bbox_mode": BoxMode.XYXY_ABS,
            "category_id": category_id,
            "iscrowd": int(ignored),
        }
        for category_id in category_ids
    ]


def _log_summary(root: Path, split: str, records: list[dict[str, Any]], num_unlisted: int) -> None:
    counts = Counter(obj["type"] for record in records for obj in record["kitti_objects"])
    empty = sum(all(annotation["iscrowd"] for annotation in record["annotations"]) for record in records)
    logger.info(
        "KITTI %s from %s\n  images: %d (%d without an object of the classes; %d of the folder are in no list)\n"
        "  objects: %s\n  ignored regions: %s",
        split,
        root,
        len(records),
        empty,
        num_unlisted,
        ", ".join(f"{kind} {counts[kind]}" for kind in CLASSES),
        ", ".join(f"{kind} {counts[kind]}" for kind in IGNORED_TYPES),
    )
