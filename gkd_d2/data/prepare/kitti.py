"""What makes a download of KITTI a checked folder: unpacking, the split, counts, and COCO's form for other tools."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import stat
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from detectron2.data.detection_utils import read_image
from PIL import Image

from gkd_d2.data.datasets.kitti import IMAGE_SUFFIXES, SPLITS, load_kitti, split_folder
from gkd_d2.data.datasets.kitti_labels import CLASSES, DIFFICULTIES, IGNORED_TYPES
from gkd_d2.utils.files import nearest_folder, replacing, write_whole
from gkd_d2.utils.progress import track

# All that the official archives of images and labels hold.
_SUFFIXES = "|".join(suffix[1:] for suffix in IMAGE_SUFFIXES)
_ENTRY = re.compile(rf"(training|testing)/(image_2|label_2)/[A-Za-z0-9_-]+\.((?i:{_SUFFIXES})|txt)", re.ASCII)
_FOLDER = re.compile(r"(training|testing)/((image_2|label_2)/)?", re.ASCII)
_ENCRYPTED = 0x1


def unpack(archive: str | os.PathLike, root: str | os.PathLike, *, force: bool = False) -> int:
    """Unpack one of KITTI's two archives, images or labels, into a dataset folder.

    Everything about the entries is checked before the first file is written; each file is written beside its place
    and moved there once its checksum is right. A file that is there already with the same content stays. Shows its
    progress.

    Args:
        archive: data_object_image_2.zip or data_object_label_2.zip.
        root: the dataset's folder; made if need be.
        force: replace files of other content.

    Returns:
        The number of files written.

    Raises:
        FileExistsError: a file is there with other content, and ``force`` is not set.
        OSError: the archive can't be opened, a file can't be written, or there is too little room.
        ValueError: the archive is damaged or holds something else; the message begins with the archive.
    """
    archive, root = Path(archive), Path(root)
    written = 0
    with _named(archive), zipfile.ZipFile(archive) as file:
        entries = _entries(archive, file)
        size, free = sum(entry.file_size for entry in entries), shutil.disk_usage(nearest_folder(root)).free
        if size > free:
            raise OSError(f"{archive}: its files need {size / 1e9:.1f} GB, {root} has room for {free / 1e9:.1f} GB")
        missing = []
        for entry in track(entries, total=len(entries), title=f"{archive.name}: files looked for"):
            target = root / entry.filename
            if not target.exists():
                missing.append(entry)
            elif not _equals(target, entry):
                if not force:
                    raise FileExistsError(f"{target} is there with other content than in {archive}: see --force")
                missing.append(entry)
        for entry in track(missing, total=len(missing), title=f"{archive.name}: files written"):
            _extract(file, entry, root / entry.filename)
            written += 1
    return written


def write_split(root: str | os.PathLike) -> bool:
    """Write ImageSets/train.txt and val.txt, 8:2 by a hash of the ids, unless there are lists.

    Both are written or none.

    Args:
        root: the dataset's folder, whose splits can be loaded.

    Returns:
        Whether they were written.

    Raises:
        OSError: they can't be written.
        ValueError: a list would be empty.
    """
    folder = Path(root) / "ImageSets"
    paths = {split: folder / f"{split}.txt" for split in SPLITS}
    if any(path.exists() for path in paths.values()):
        return False
    splits = split_folder(root)
    write_whole({paths[split]: "".join(f"{image_id}\n" for image_id in ids) for split, ids in splits.items()})
    return True


def check_images(records: Iterable[dict[str, Any]]) -> Counter:
    """Decode every image as Detectron2 does in training.

    Args:
        records: of :func:`gkd_d2.data.datasets.kitti.load_kitti`.

    Returns:
        The number of images by Pillow's mode, "RGB" for those of the benchmark.

    Raises:
        ValueError: an image can't be decoded, or its size is not the header's; the message begins with the file.
    """
    modes: Counter = Counter()
    for record in records:
        path = record["file_name"]
        try:
            height, width = read_image(path, "BGR").shape[:2]
            with Image.open(path) as image:
                modes[image.mode] += 1
        # Pillow's readers of the many formats raise errors of many kinds on damaged files.
        except Exception as error:
            raise ValueError(f"{path}: Detectron2 can't read this image: {error}") from error
        if (width, height) != (record["width"], record["height"]):
            raise ValueError(
                f"{path}: {width} x {height} pixels, its header says {record['width']} x {record['height']}"
            )
    return modes


def count_objects(records: Iterable[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Objects by type, and of the evaluated classes by difficulty: moderate holds easy, hard holds moderate.

    Args:
        records: of :func:`gkd_d2.data.datasets.kitti.load_kitti`.

    Returns:
        ``{"Car": {"all": n, "easy": n, "moderate": n, "hard": n}, ..., "Van": {"all": n}, ...}``.
    """
    counts = {kind: dict.fromkeys(("all", *DIFFICULTIES), 0) for kind in CLASSES}
    counts |= {kind: {"all": 0} for kind in IGNORED_TYPES}
    for record in records:
        for obj in record["kitti_objects"]:
            found = counts[obj["type"]]
            found["all"] += 1
            if obj["type"] in CLASSES:
                for level, limits in DIFFICULTIES.items():
                    height = obj["bbox"][3] - obj["bbox"][1]
                    found[level] += bool(limits.includes(height, obj["occlusion"], obj["truncation"]))
    return counts


def export_coco(root: str | os.PathLike, folder: str | os.PathLike, *, force: bool = False) -> list[Path]:
    """Write kitti_train.json and kitti_val.json in COCO's instances form, for other tools: both or none.

    Images are numbered from 1 in the order of the list. Ignored regions are annotations of every class with iscrowd 1.

    Args:
        root: the dataset's folder.
        folder: where to write; made if need be.
        force: replace files that are there.

    Returns:
        The files.

    Raises:
        FileExistsError: a file is there, and ``force`` is not set.
        OSError: they can't be written.
        FileNotFoundError, ValueError: as of :func:`gkd_d2.data.datasets.kitti.load_kitti`.
    """
    paths = coco_paths(folder, force=force)
    write_whole(
        {
            path: json.dumps(_coco(load_kitti(root, split)), separators=(",", ":")) + "\n"
            for path, split in zip(paths, SPLITS)
        }
    )
    return paths


def coco_paths(folder: str | os.PathLike, *, force: bool = False) -> list[Path]:
    """The files that :func:`export_coco` writes.

    Args:
        folder: where it writes.
        force: whether it may replace files.

    Raises:
        FileExistsError: a file is there, and ``force`` is not set.
    """
    paths = [Path(folder) / f"kitti_{split}.json" for split in SPLITS]
    for path in paths:
        if path.exists() and not force:
            raise FileExistsError(f"{path} is there already: see --force")
    return paths


def _coco(records: list[dict[str, Any]]) -> dict[str, list[dict]]:
    images, annotations = [], []
    for number, record in enumerate(records, start=1):
        name = Path(record["file_name"]).name
        images.append({"id": number, "file_name": name, "width": record["width"], "height": record["height"]})
        for annotation in record["annotations"]:
            left, top, right, bottom = annotation["bbox"]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": annotation["category_id"] + 1,
                    "bbox": [left, top, right - left, bottom - top],
                    "area": (right - left) * (bottom - top),
                    "iscrowd": annotation["iscrowd"],
                }
            )
    categories = [{"id": index, "name": name} for index, name in enumerate(CLASSES, start=1)]
    return {"images": images, "annotations": annotations, "categories": categories}


@contextlib.contextmanager
def _named(archive: Path) -> Iterator[None]:
    """Every error about the archive as ValueError that begins with it; those about files, which name them, stay."""
    try:
        yield
    except (FileNotFoundError, FileExistsError, IsADirectoryError, PermissionError):
        raise
    # zipfile lets through what its decompressors, struct and the file raise on damaged archives.
    except Exception as error:
        if str(error).startswith(f"{archive}: "):
            raise
        raise ValueError(f"{archive}: can't be unpacked: {error or type(error).__name__}") from error


def _entries(archive: Path, file: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    entries, names = [], set()
    for entry in file.infolist():
        name = entry.filename
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if entry.is_dir() and _FOLDER.fullmatch(name):
            continue
        if not _ENTRY.fullmatch(name) or kind not in (0, stat.S_IFREG):
            raise ValueError(
                f"{archive}: its entry {name!r} is none of KITTI's, training/image_2/ID.png or training/label_2/ID.txt"
            )
        if entry.flag_bits & _ENCRYPTED:
            raise ValueError(f"{archive}: its entry {name!r} is encrypted")
        if name in names:
            raise ValueError(f"{archive}: its entry {name!r} stands there twice")
        names.add(name)
        entries.append(entry)
    if not entries:
        raise ValueError(f"{archive}: it is empty")
    return entries


def _equals(path: Path, entry: zipfile.ZipInfo) -> bool:
    if not path.is_file() or path.stat().st_size != entry.file_size:
        return False
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum == entry.CRC


def _extract(file: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as temporary, file.open(entry) as source, temporary.open("wb") as out:
        shutil.copyfileobj(source, out, 1 << 20)
        if out.tell() != entry.file_size:
            raise ValueError(f"entry {entry.filename!r} is shorter than its header says")
