"""A toy data set in KITTI's form, written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from gkd_d2.data.toy.scene import check_scene_arguments, make_scene

logger = logging.getLogger(__name__)

# Validation ids start here, so that they and their scenes do not depend on the number of training images.
FIRST_VAL_ID = 500_000

_FORMAT_VERSION = 1  # raise it when a drawing changes: folders made before are then no longer taken as equal
_PARAMETERS_FILE = "toy_kitti.json"


def make_toy_kitti(
    root: str | os.PathLike,
    num_train: int = 300,
    num_val: int = 100,
    seed: int = 0,
    image_size: tuple[int, int] = (320, 128),
    force: bool = False,
) -> None:
    """Write a toy data set in KITTI's form: images, labels, and the lists of both splits.

    Image i of a split is the same whatever the number of images. The folder appears whole or not at all. A folder
    made before with equal arguments is left as it is.

    Args:
        root: the folder to write.
        num_train: number of training images; their ids count from 000000.
        num_val: number of validation images; their ids count from 500000.
        seed: any integer >= 0; other seeds give other scenes.
        image_size: width and height in pixels.
        force: replace a toy data set made with other arguments. Nothing else is ever replaced.

    Raises:
        ValueError: an argument is out of range.
        FileExistsError: the folder holds something else.
    """
    for name, value in (("num_train", num_train), ("num_val", num_val)):
        if not 1 <= value <= FIRST_VAL_ID:
            raise ValueError(f"{name} is {value}, not in 1..{FIRST_VAL_ID}")
    root = Path(root)
    parameters = {
        "version": _FORMAT_VERSION,
        "num_train": num_train,
        "num_val": num_val,
        "seed": seed,
        "image_size": list(image_size),
    }
    check_scene_arguments(seed, image_size)
    if _is_in_place(root, parameters, force):
        logger.info("%s holds this toy data set already", root)
        return
    with _replacing(root) as folder:
        counts = _write_dataset(folder, num_train, num_val, seed, image_size)
        (folder / _PARAMETERS_FILE).write_text(json.dumps(parameters) + "\n")
    logger.info(
        "wrote %d training and %d validation images to %s; objects: %s",
        num_train,
        num_val,
        root,
        ", ".join(f"{kind} {count}" for kind, count in counts.most_common()),
    )


def _is_in_place(root: Path, parameters: dict, force: bool) -> bool:
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    parameters_path = root / _PARAMETERS_FILE
    if not parameters_path.is_file():
        raise FileExistsError(f"{root} exists and is no toy data set; it is never replaced: choose another folder")
    present = json.loads(parameters_path.read_text())
    if present == parameters:
        return True
    if not force:
        raise FileExistsError(
            f"{root} holds a toy data set made with {present}, not with {parameters}: choose another folder, or "
            "replace it with force (--force)"
        )
    return False


@contextlib.contextmanager
def _replacing(root: Path) -> Iterator[Path]:
    """A new folder beside root that takes root's place when the block ends well and is removed when it does not."""
    root.parent.mkdir(parents=True, exist_ok=True)
    partial = root.parent / f".{root.name}.partial-{os.getpid()}"
    old = root.parent / f".{root.name}.old-{os.getpid()}"
    partial.mkdir()
    try:
        yield partial
        if root.exists():
            root.rename(old)
        partial.rename(root)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_dataset(folder: Path, num_train: int, num_val: int, seed: int, image_size: tuple[int, int]) -> Counter:
    images, labels, lists = (folder / name for name in ("training/image_2", "training/label_2", "ImageSets"))
    for path in (images, labels, lists):
        path.mkdir(parents=True)
    counts: Counter = Counter()
    for split, indices in (("train", range(num_train)), ("val", range(FIRST_VAL_ID, FIRST_VAL_ID + num_val))):
        for index in indices:
            image, objects = make_scene(seed, index, image_size)
            image.save(images / f"{index:06d}.png")
            (labels / f"{index:06d}.txt").write_text("".join(obj.label_line() + "\n" for obj in objects))
            counts.update(obj.type for obj in objects)
        (lists / f"{split}.txt").write_text("".join(f"{index:06d}\n" for index in indices))
    return counts
